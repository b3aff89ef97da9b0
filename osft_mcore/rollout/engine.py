"""What the loop needs of a rollout engine."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.weights.layout import Layouts


def sample_seed(*, seed: int, step: int, row: int, sample: int) -> int:
    """Seed of one sampled answer: independent of batch, replica and layout."""
    digest = hashlib.blake2b(f"{seed}:{step}:{row}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def samples_whole_vocabulary(*, top_p: float, top_k: int) -> bool:
    """True if nothing cuts the distribution that answers are drawn from."""
    return top_p == 1.0 and top_k == 0


def reported_temperature(tau_sample: float, *, top_p: float, top_k: int) -> float:
    """Temperature of the log-probabilities that come back with answers sampled at `tau_sample`.

    Where top_p or top_k cut the vocabulary, the sampler's own are renormalised over what is left,
    which the actor does not know; then those of the plain model (temperature 1) come back.
    """
    return tau_sample if samples_whole_vocabulary(top_p=top_p, top_k=top_k) else 1.0


class RolloutEngine(Protocol):
    """A sampler whose weights come from outside. Every rank calls every method.

    A push is `begin_update`, then `share` (where there is something to share) and writing in
    place, or else `reload`, then `finish_update`.
    """

    @property
    def layouts(self) -> Layouts:
        """What the parameters of every rank's engine hold, by global rank and name."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        """Sample answers. Collective over the world.

        Returns all responses on every rank, ordered by prompt (as given), then sample index.
        Raises WeightError while the weights are being replaced, or after `refuse`.
        """
        ...

    def begin_update(self) -> dict[str, Tensor]:
        """Close the engine for sampling and return its live parameters, by the engine's names.

        They are for writing in place, unless the engine takes weights by `reload` only.
        """
        ...

    def share(self, memory: Mapping[str, Tensor]) -> None:
        """From now on these parameters are this memory; what they held before is freed.

        Of the same shape and dtype as what they replace. Costs nothing if they are it already.
        Raises WeightError, before anything is changed, where something does not fit.
        """
        ...

    def reload(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take every Hugging Face tensor, whole.

        Tensors may be kept for a while: each must be fresh memory. Raises WeightError on this
        rank alone, after the last one, if a tensor is missing, unknown or of another shape.
        """
        ...

    def finish_update(self, version: int) -> None:
        """Declare the parameters complete at `version`; cached prefixes are forgotten."""
        ...

    def refuse(self, reason: str) -> None:
        """Stay closed, and say why when asked to generate, until an update finishes."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used again."""
        ...
