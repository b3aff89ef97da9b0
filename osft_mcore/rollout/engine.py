"""What the loop needs of a rollout engine."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from osft_mcore.records import Prompt, Response, Sampling


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
