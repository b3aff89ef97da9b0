"""Saves the training state of a run while it goes on. Every rank calls every method."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.training_state import StateTensor
from osft_mcore.checkpoint.background import BackgroundJob
from osft_mcore.checkpoint.folder import STATE, prepare, sweep
from osft_mcore.checkpoint.index import INDEX, Index, Piece, to_json
from osft_mcore.checkpoint.save import (
    Part,
    Rest,
    part_name,
    readable,
    write_part,
    write_rest,
)
from osft_mcore.checkpoint.snapshot import Snapshot
from osft_mcore.config.schema import CheckpointConfig
from osft_mcore.errors import CheckpointError
from osft_mcore.files import json_bytes
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import all_gather_json
from osft_mcore.parallel.rng import rng_state
from osft_mcore.train.room import lacking_room
from osft_mcore.weights.safetensors_stream import TensorSpec, Values

ROOM: Final = 1.02
"""Index, state and tokenizer come on top of the tensors."""
SETUP_S: Final = 5.0
BYTES_A_SECOND: Final = 100e6
"""Of one rank; a guess, until a save has shown it."""
BYTES_A_SECOND_TOGETHER: Final = 1e9
GRACE_S: Final = 5.0
"""For rank 0, which waits for the others until the deadline, to say so."""


class Checkpoints:
    """Writes checkpoints of one actor into one folder, one at a time."""

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        actor: Actor,
        side_files: Mapping[str, bytes],
        console: Console,
        *,
        protected: Path | None = None,
    ) -> None:
        """`side_files` by path: what a checkpoint needs to be complete by itself. Collective.

        `protected` is never deleted, however old.

        Raises CheckpointError on every rank if the disk has no room for a single checkpoint, or
        `root` cannot be looked at.
        """
        self._root, self._config, self._actor, self._console = root, config, actor, console
        self._protected = protected
        self._job = BackgroundJob(background=config.async_)
        self._host: dict[int, Tensor] = {}
        self._failures = 0
        self._pending: int | None = None
        self._expire = True
        self._deadline = self._longest_s = 0.0
        state = self._owned()
        self._specs = [_spec(tensor, actor.shard) for tensor in state]
        pieces, sizes = self._gather_pieces(state)
        self._own_bytes, self._num_bytes = sizes[actor.context.rank], sum(sizes)
        self._contents = {
            INDEX: json_bytes(to_json(_index(actor, pieces))),
            **{f"model/{name}": content for name, content in side_files.items()},
        }
        problem = ""
        if self._is_writer:
            problem = self._refused(partial(sweep, root)) or self._lacking_room()
        if problem := self._together(problem):
            raise CheckpointError(problem)

    def save(self, step: int, state: Mapping[str, Any], *, expire: bool = True) -> None:
        """Save what training has come to; on return it may go on. Collective over the world.

        `state` is what the tensors do not say: JSON-able, the same on every rank. `expire`: older
        checkpoints go as checkpoint.keep_last says. A save that fails is reported and counted;
        CheckpointError on every rank after checkpoint.max_failures in a row.
        """
        self.settle()
        self._deadline = time.monotonic() + 60 * self._config.timeout_minutes
        problem = "the save before this one still hangs" if self._job.running else ""
        if self._is_writer and not problem:
            problem = self._lacking_room() or self._refused(partial(prepare, self._root, step))
        random_states = all_gather_json([problem, rng_state()], self._actor.context)
        if problem := _joined(problem for problem, _ in random_states):
            self._failed(step, problem)
            return
        content = json_bytes({"step": step, **state, "rng": [rng for _, rng in random_states]})
        self._pending, self._expire = step, expire
        self._start(step, content)
        if not self._config.async_:
            self.settle()

    def save_now(self, step: int, state: Mapping[str, Any], *, expire: bool = True) -> None:
        """Save, and wait until it is done. CheckpointError on every rank if it failed."""
        self.save(step, state, expire=expire)
        self.settle()
        if self._failures:
            raise CheckpointError(f"step {step} could not be saved; see above")

    def settle(self) -> None:
        """Wait for the last save, and count it if it failed. Collective over the world."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        problem = self._job.wait(self._deadline + (GRACE_S if self._is_writer else 2 * GRACE_S))
        self._longest_s = max(self._longest_s, self._job.seconds)
        if problem := self._together(problem):
            self._failed(step, problem)
        else:
            self._failures = 0

    @property
    def longest_s(self) -> float:
        """What the longest save took from beginning to end; before the first, what it may take."""
        return self._longest_s or SETUP_S + max(
            self._own_bytes / BYTES_A_SECOND, self._num_bytes / BYTES_A_SECOND_TOGETHER
        )

    @property
    def _file(self) -> str:
        return part_name(self._actor.context.rank)

    def _building(self, step: int) -> Path:
        return self._root / f"step_{step}.tmp"

    @property
    def _is_writer(self) -> bool:
        return self._actor.context.rank == 0

    def _failed(self, step: int, problem: str) -> None:
        """The same on every rank."""
        self._failures += 1
        allowed = self._config.max_failures
        text = f"checkpoint step_{step} was not saved: {problem}"
        if self._failures >= allowed:
            raise CheckpointError(
                f"{text}\nfailed saves in a row: {self._failures} (checkpoint.max_failures = "
                f"{allowed}); earlier checkpoints are untouched in {self._root}"
            )
        self._console.say(
            f"WARNING: {text}\nearlier checkpoints are untouched; training goes on until "
            f"checkpoint.max_failures = {allowed} in a row ({self._failures} so far)"
        )

    def _together(self, problem: str) -> str:
        """All ranks' problems, each once. Collective over the world."""
        return _joined(all_gather_json(problem, self._actor.context))

    def _owned(self) -> list[StateTensor]:
        return [tensor for tensor in self._actor.training_state() if tensor.owned]

    def _gather_pieces(self, state: Sequence[StateTensor]) -> tuple[list[Piece], list[int]]:
        mine = [[tensor.kind, tensor.param, tensor.start, tensor.stop] for tensor in state]
        size = sum(spec.num_bytes for spec in self._specs)
        told = all_gather_json([self._actor.shard, size, mine], self._actor.context)
        pieces = [
            Piece(file=part_name(rank), kind=kind, shard=shard, param=param, start=start, stop=stop)
            for rank, (shard, _, entries) in enumerate(told)
            for kind, param, start, stop in entries
        ]
        return pieces, [size for _, size, _ in told]

    def _lacking_room(self) -> str:
        """Why the disk cannot take another checkpoint; empty if it can."""
        needed = int(ROOM * self._num_bytes)
        return lacking_room(self._root, needed, protected=self._protected)

    def _refused(self, action: Callable[[], object]) -> str:
        """What the file system says against `action`: no exception, for the other ranks wait."""
        try:
            action()
        except OSError as error:
            return f"{self._root}: {error.strerror or error}"
        return ""

    def _start(self, step: int, state: bytes) -> None:
        """Begin to write what the training state is now."""
        live = [tensor.tensor for tensor in self._owned()]
        if not self._config.async_:
            self._job.start(lambda: self._write(step, state, lambda: (t.cpu() for t in live)))
            return
        # Not copied here: forward and backward of the next step only read, and can go on.
        snapshot = Snapshot(live, self._host)
        read_gpu = _gpu_reader(snapshot, self._actor.context.device, deadline=self._deadline)

        def values() -> Iterable[Values]:
            read_gpu()
            return snapshot.values()

        def job() -> None:
            try:
                self._write(step, state, values)
            finally:
                snapshot.abandon()

        self._actor.call_before_step(partial(snapshot.take, self._deadline))
        self._job.start(job)

    def _write(self, step: int, state: bytes, tensors: Callable[[], Iterable[Values]]) -> None:
        """All of one rank's work; no other rank is spoken to but through files."""
        started = time.monotonic()
        building = self._building(step)
        try:
            write_part(building, Part(file=self._file, specs=self._specs, tensors=tensors))
            if not self._is_writer:
                return
            rest = Rest(
                root=self._root,
                step=step,
                parts=[part_name(rank) for rank in range(self._actor.context.topology.world_size)],
                contents={**self._contents, STATE: state},
                details={"step": step},
                keep_last=self._config.keep_last if self._expire else sys.maxsize,
                keep_every=self._config.keep_every,
                protected=self._protected,
            )
            target = write_rest(building, rest, deadline=self._deadline)
        except CheckpointError:
            if self._is_writer:
                # What the others still write there fails too, which is what it should.
                shutil.rmtree(building, ignore_errors=True)
            raise
        self._console.say(
            f"saved {target} ({readable(self._num_bytes)}, {time.monotonic() - started:.1f} s)"
        )


def _index(actor: Actor, pieces: Sequence[Piece]) -> Index:
    topology = actor.context.topology
    places = topology.all_coordinates()
    return Index(
        topology=topology.actor_sizes(),
        layouts={
            place.pp_rank * topology.tp + place.tp_rank: actor.layouts[place.rank]
            for place in places
        },
        pieces=tuple(pieces),
    )


def _spec(state: StateTensor, shard: int) -> TensorSpec:
    name = f"{state.kind}/{shard}/{state.param}"
    return TensorSpec(name, state.tensor.dtype, tuple(state.tensor.shape))


def _gpu_reader(snapshot: Snapshot, device: torch.device, *, deadline: float) -> Callable[[], None]:
    """What the writer's thread begins with: on a GPU to copy all that was asked for so far.

    A disk is slower than the way to the host, which costs training nothing there.
    """
    if device.type != "cuda":
        return lambda: None
    asked = torch.cuda.Event()  # type: ignore[no-untyped-call]
    asked.record()

    def read() -> None:
        # A thread begins on GPU 0, whichever its process uses.
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_event(asked)
            with torch.cuda.stream(stream):
                snapshot.take(deadline)

    return read


def _joined(problems: Iterable[str]) -> str:
    return "\n".join(dict.fromkeys(problem for problem in problems if problem))
