"""Between two steps: saving when it is due, stopping when the run is told to."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from osft_mcore.actor.actor import Actor
from osft_mcore.config.load import as_options
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.errors import Stopped
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel.stop import StopSignals, agreed_stop, deadline
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.identity import identity

BEFORE_A_STEP: Final = "stopping before the next step, with nothing new to save"
"""What a signal is answered with until the loop begins."""
TO_LEAVE_S: Final = 30.0
"""For what a run does when it has done all its steps; kept free twice."""


class StepEdge:
    """What every loop does after a step. Every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        phase: Phase,
        num_steps: int,
        *,
        actor: Actor,
        checkpoints: Checkpoints,
        clock: Clock,
    ) -> None:
        self._every, self._num_steps = config.checkpoint.every, num_steps
        self._evaluation_every = config.evaluation.every
        self._actor, self._checkpoints, self._clock = actor, checkpoints, clock
        self._go_on = "the same command goes on from there"
        if config.checkpoint.resume == "never":
            self._go_on = "start again with checkpoint.resume=auto to go on from there"
        self._signals = StopSignals(actor.context.rank, Path(config.output_dir))
        self._save_and_stop, self._signals.promise = self._signals.promise, BEFORE_A_STEP
        self._deadline = deadline(config.checkpoint.stop_after)
        self._longest_step_s = 0.0
        self._is_due = False
        self._began = time.monotonic()
        self._fixed = {
            "phase": phase,
            "options": as_options(config),
            "identity": identity(config, phase),
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Enter around the loop: signals to stop wait for the end of a step."""
        with self._signals:
            yield

    def stop_if_told(self, num_done: int) -> None:
        """Raise Stopped, on every rank, if the run was told to before its first step. Collective.

        Nothing is saved: nothing has changed since `num_done` steps were.
        """
        if reason := agreed_stop(self._signals.received, self._actor.context):
            raise Stopped(f"{reason}; stopped with {num_done} of {self._num_steps} steps done")

    def stop_before(self, num_done: int) -> None:
        """As `stop_if_told`; from here on a signal waits for the end of a step. Collective."""
        self.stop_if_told(num_done)
        self._signals.promise = self._save_and_stop
        self._began = time.monotonic()

    def passed(self, step: int, *, sound: bool, **state: Any) -> None:
        """Step `step` is done and logged; `state` is what only its loop knows. Collective.

        Not `sound`: its last update was skipped, so that the weights may be to blame. A save that
        is due waits for a sound step: it makes older checkpoints go, which may be better. After the
        last step there is none to wait for: it is saved, and the older ones stay.

        Raises Stopped, on every rank, once the run was told to stop and has saved; CheckpointError
        if saving failed too often.
        """
        self._longest_step_s = max(self._longest_step_s, time.monotonic() - self._began)
        reason = self._signals.received or self._lacks_time(step)
        reason = agreed_stop(reason, self._actor.context)
        if self._every > 0 and (step % self._every == 0 or step == self._num_steps):
            self._is_due = True
        if reason:
            self._settle()
            with self._clock("save"):
                self._checkpoints.save_now(step, self._state(state), expire=sound)
            raise Stopped(
                f"{reason}; stopped after step {step} of {self._num_steps} and saved it; "
                f"{self._go_on}"
            )
        if self._is_due and (sound or step == self._num_steps):
            self._is_due = False
            self._settle()
            with self._clock("save"):
                self._checkpoints.save(step, self._state(state), expire=sound)
        self._began = time.monotonic()

    def finish(self) -> None:
        """All steps are done: wait until the last save is, too. Collective.

        A run that is killed from here on does only the rest again; with checkpoint.every = 0, all.
        """
        self._signals.promise = "what is left to do after the last step is done first"
        self._settle()

    def _settle(self) -> None:
        # A stay of its own: a save may take checkpoint.timeout_minutes, and two in one stay might
        # take longer than deadlines.save, which is held against one.
        with self._clock("save"):
            self._checkpoints.settle()

    def hurry(self) -> str:
        """Why this rank should not wait for anything any more; empty if it may."""
        near = self._deadline.near(time.time(), longest_step_s=0.0, longest_save_s=TO_LEAVE_S)
        return self._signals.received or near

    def _lacks_time(self, step: int) -> str:
        every, is_last = self._evaluation_every, step == self._num_steps
        # What is left to do after the last step is an evaluation as well.
        evaluates = is_last or (every > 0 and (step + 1) % every == 0)
        return self._deadline.near(
            time.time(),
            longest_step_s=self._longest_step_s
            + (self._clock.longest.get("evaluate", 0.0) if evaluates else 0.0),
            longest_save_s=self._checkpoints.longest_s,
        )

    def _state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._fixed,
            **state,
            "num_updates": self._actor.num_updates,
            "seconds": dict(self._clock.totals),
        }
