"""One figure for several benchmarks, as the method's paper reports it; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

HEADLINE_KS: Final = (1, 8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Means over benchmarks, each counting the same."""

    pass_at: Mapping[int, float]
    """By k: those of 1, 8 and 32 that there are samples for."""

    @property
    def average(self) -> float:
        """Mean of these: the AVG of the paper's tables, where all three are there."""
        return sum(self.pass_at.values()) / len(self.pass_at)


def headline(by_benchmark: Mapping[str, Mapping[int, float]]) -> Headline:
    """Of pass@k by benchmark and k; a k counts if every benchmark has it."""
    if not by_benchmark or any(1 not in scores for scores in by_benchmark.values()):
        raise ValueError("a headline needs at least one benchmark, and pass@1 of each")
    ks = [k for k in HEADLINE_KS if all(k in scores for scores in by_benchmark.values())]
    return Headline(
        pass_at={
            k: sum(scores[k] for scores in by_benchmark.values()) / len(by_benchmark) for k in ks
        }
    )


def best_temperature(by_temperature: Mapping[float, Headline]) -> float:
    """The temperature of the highest average: the baseline that a trained model has to beat.

    Of equals the first. Raises ValueError if the averages are not of the same k.
    """
    if len({tuple(found.pass_at) for found in by_temperature.values()}) != 1:
        raise ValueError("temperatures can be compared by pass@k of the same k only")
    return max(by_temperature, key=lambda tau: by_temperature[tau].average)
