"""Updates that were skipped because something was not finite: kept, told, counted."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.result import UpdateResult
from osft_mcore.errors import NonFiniteError
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import wait_for_all
from osft_mcore.records import Example, Response


class SkippedUpdates:
    """The updates skipped since the last one that was not, over steps.

    A resumed run starts with none: its weights are those of a checkpoint, so that it may fare
    better, and if not, it stops as soon as the first run would have.
    """

    def __init__(self) -> None:
        self._in_a_row: list[tuple[str, UpdateResult]] = []
        """With what is said of each."""

    @property
    def any(self) -> bool:
        """True if the last update was skipped: then the weights themselves may be to blame."""
        return bool(self._in_a_row)

    def note(
        self,
        update: UpdateResult,
        batch: Iterable[Mapping[str, Any]],
        *,
        step: int,
        number: int,
        actor: Actor,
        folder: RunFolder,
        console: Console,
    ) -> None:
        """Call after every update, on every rank; `batch` says what update `number` was made of.

        It is consumed only if the update was skipped; it then stands in the run folder's skipped/.
        Raises NonFiniteError on every rank when train.max_skipped_updates have followed each other.
        """
        if not update.skipped:
            self._in_a_row.clear()
            return
        limit = actor.train.max_skipped_updates
        name = f"skipped/step_{step}_update_{number}.json"
        record = {
            "step": step,
            "update": number,
            "reason": update.not_finite,
            "loss": _jsonable(update.loss),
            "grad_norm": _jsonable(update.grad_norm),
            "batch": list(batch),
        }
        folder.write_json(name, record)
        what = f"step {step}, update {number}: {update.not_finite}; batch in {folder.path / name}"
        self._in_a_row.append((what, update))
        in_a_row = len(self._in_a_row)
        console.say(f"skipped {what} ({in_a_row} in a row, the run stops at {limit})")
        if in_a_row >= limit:
            # The rank that writes must be done before another one ends the run.
            wait_for_all(actor.context)
            raise NonFiniteError(self._report(step, actor))

    def _report(self, step: int, actor: Actor) -> str:
        train = actor.train
        clip = f"{train.clip_grad:g}" if train.clip_grad else "0, which is off"
        return "\n".join(
            [
                f"step {step}: {len(self._in_a_row)} updates in a row were skipped because loss or "
                "gradient was not finite (option train.max_skipped_updates)",
                *(what for what, _ in self._in_a_row),
                *_on_the_reference((update for _, update in self._in_a_row), actor),
                f"the weights are those from before these; look at train.lr (found {train.lr:g}), "
                f"train.clip_grad (found {clip}) and model.dtype (found {actor.model.dtype}); "
                "started again, the run goes on from its newest checkpoint, which is from before",
            ]
        )


def _on_the_reference(updates: Iterable[UpdateResult], actor: Actor) -> Iterator[str]:
    """What the KL was measured from, if one was not finite, and whether that is to blame."""
    broken = [u for u in updates if u.kl is not None and not math.isfinite(u.kl)]
    if not broken:
        return
    model, algorithm = actor.model, actor.algorithm
    if algorithm.reference:
        whose = f"the model in {algorithm.reference!r}"
    elif model.init == "random":
        whose = "the random weights that the run began with, as it is empty"
    else:
        whose = f"the starting model, model.path {model.path!r}, as it is empty"
    if any(math.isfinite(update.nll) for update in broken):
        verdict = "its log-probabilities are to blame, the trained model's are finite"
    else:
        verdict = "the trained model's own log-probabilities are not finite either"
    yield f"algorithm.reference: the KL is measured from {whose}; {verdict}"


def answer_rows(responses: Sequence[Response], *, tokens: bool) -> Iterator[dict[str, Any]]:
    """Which sampled answers a batch holds; `tokens`: and what they were, to look at later."""
    for response in responses:
        row = {
            "prompt_id": response.prompt.prompt_id,
            "row": response.prompt.row,
            "sample": response.sample_index,
            "replica": response.replica,
            "weight_version": response.weight_version,
            "num_tokens": len(response.token_ids),
            "truncated": response.truncated,
        }
        yield row | ({"response_token_ids": response.token_ids} if tokens else {})


def example_rows(examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """Which given answers a batch holds."""
    for example in examples:
        yield {"row": example.row, "num_tokens": example.num_tokens}


def _jsonable(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
