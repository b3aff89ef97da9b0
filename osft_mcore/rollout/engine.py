"""What the loop needs of a rollout engine."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from osft_mcore.records import Prompt, Response, Sampling


def sample_seed(*, seed: int, step: int, row: int, sample: int) -> int:
    """Seed of one sampled answer: independent of batch, replica and layout."""
    digest = hashlib.blake2b(f"{seed}:{step}:{row}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class RolloutEngine(Protocol):
    """A sampler whose weights are written from outside. Every rank calls every method."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        """Sample answers. Collective over the world.

        Returns all responses on every rank, ordered by prompt (as given), then sample index.
        Raises WeightError while the weights are being replaced.
        """
        ...

    def begin_update(self) -> dict[str, Tensor]:
        """Close the engine for sampling and return its live parameters, by vLLM name."""
        ...

    def finish_update(self, version: int) -> None:
        """Declare the parameters complete at `version`; cached prefixes are forgotten."""
        ...
