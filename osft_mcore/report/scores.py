"""Pass@k with its uncertainty: what every evaluation of a run found, and charts of it."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from osft_mcore.evaluation.aggregate import headline
from osft_mcore.evaluation.measures import ks_for
from osft_mcore.evaluation.results import Evaluation
from osft_mcore.evaluation.statistics import bootstrap_ci
from osft_mcore.report.answers import pass_at, read_evaluation, seed_of
from osft_mcore.report.lines import LineChart, Point, Series
from osft_mcore.report.run import Json, Run, finite, number

MAX_BENCHMARKS: Final = 12
"""With a chart of their own."""
MAX_LINES: Final = 6
_ROW_METRIC: Final = re.compile(r"eval/(.+)/pass@(\d+)")
T = TypeVar("T")
_Y: Final = "pass@k, share of problems"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A mean over problems and its 95% interval; without bounds where nobody knows them."""

    value: float
    low: float | None = None
    high: float | None = None

    def at(self, x: float) -> Point:
        """On a chart."""
        return Point(x=x, y=self.value, low=self.low, high=self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one evaluation found."""

    step: int
    temperature: float
    by_benchmark: Mapping[str, Mapping[int, Figure]]
    """Pass@k, by k."""
    pass_at_1: Figure
    """Over benchmarks, each counting the same."""
    means: Mapping[int, Figure] = field(default_factory=dict)
    """The same of other k, by k; empty where only benchmarks are known."""

    @property
    def average(self) -> float:
        """Of pass@1, 8 and 32, as far as there are samples: by this the best is chosen."""
        values = {
            name: {k: figure.value for k, figure in scores.items()}
            for name, scores in self.by_benchmark.items()
            if 1 in scores
        }
        return headline(values).average if values else self.pass_at_1.value

    @property
    def ks(self) -> list[int]:
        """Those that every benchmark has."""
        sets = [set(scores) for scores in self.by_benchmark.values()]
        return sorted(set.intersection(*sets)) if sets else [1]

    def mean(self, k: int) -> Figure:
        """Pass@k over benchmarks."""
        if len(self.by_benchmark) == 1:
            (scores,) = self.by_benchmark.values()
            return scores[k]
        if k == 1:
            return self.pass_at_1
        if k in self.means:
            return self.means[k]
        values = [scores[k].value for scores in self.by_benchmark.values()]
        return Figure(value=sum(values) / len(values))


def results_of(run: Run) -> list[Result]:
    """In the order of steps and temperatures; from the best source that a result has."""
    found: dict[tuple[int, float], Result] = {}
    for row in run.evaluations:
        if (result := _of_row(row)) is not None:
            found[result.step, result.temperature] = result
    for at in run.answers.keys() - run.results.keys():
        if (evaluation := read_evaluation(run, *at)) is not None:
            found[at] = _of_answers(evaluation, seed=seed_of(run))
    for at, kept in run.results.items():
        if (result := _of_report(kept, *at)) is not None:
            found[at] = result
    return [found[at] for at in sorted(found)]


def usual_temperature(run: Run, results: Sequence[Result]) -> float | None:
    """Where the run scores every model; the highest, if its options do not say."""
    there = {result.temperature for result in results}
    asked = run.figure("evaluation.temperature")
    return asked if asked in there else max(there, default=None)


def score_charts(run: Run, results: Sequence[Result]) -> list[LineChart]:
    """Against steps, temperature and k."""
    tau = usual_temperature(run, results)
    usual = [result for result in results if result.temperature == tau]
    return [
        *_over_steps(usual),
        *_over_temperature(results),
        *_over_k(results, usual),
    ]


def step_series(results: Sequence[Result], k: int, name: str) -> Series:
    """Mean pass@k over steps."""
    return Series(name=name, points=tuple(r.mean(k).at(r.step) for r in results if k in r.ks))


def _over_steps(results: Sequence[Result]) -> Iterator[LineChart]:
    if len({result.step for result in results}) < 2:
        return
    benchmarks = list(dict.fromkeys(name for r in results for name in r.by_benchmark))
    tau = f"temperature {results[0].temperature:g}, 95% intervals"
    if len(benchmarks) != 1:
        yield LineChart(
            key="pass-at-k-steps",
            title="Pass@k over steps, mean of benchmarks",
            y_name=_Y,
            series=tuple(step_series(results, k, f"pass@{k}") for k in _some_ks(results)),
            percent=True,
            note=tau,
        )
    for name in benchmarks[:MAX_BENCHMARKS]:
        of_name = [result for result in results if name in result.by_benchmark]
        yield LineChart(
            key="pass-at-k-steps" if len(benchmarks) == 1 else f"pass-at-k-steps-{name}",
            title=f"Pass@k over steps: {name}",
            y_name=_Y,
            series=tuple(
                Series(
                    name=f"pass@{k}",
                    points=tuple(
                        r.by_benchmark[name][k].at(r.step)
                        for r in of_name
                        if k in r.by_benchmark[name]
                    ),
                )
                for k in _some_ks(of_name)
            ),
            percent=True,
            note=tau,
        )


def _over_temperature(results: Sequence[Result]) -> Iterator[LineChart]:
    by_step: dict[int, list[Result]] = {}
    for result in results:
        by_step.setdefault(result.step, []).append(result)
    several = {step: found for step, found in by_step.items() if len(found) > 1}
    if not several:
        return
    series = []
    for step in spread(list(several), MAX_LINES):
        ks = _some_ks(several[step]) if len(several) == 1 else [1]
        series += [
            Series(
                name=f"step {step}, pass@{k}",
                points=tuple(r.mean(k).at(r.temperature) for r in several[step] if k in r.ks),
            )
            for k in ks
        ]
    # One that was scored at one temperature is a point, to compare with.
    last = max(by_step)
    if last not in several:
        points = tuple(r.mean(1).at(r.temperature) for r in by_step[last])
        series.append(Series(name=f"step {last}, pass@1", points=points))
    yield LineChart(
        key="pass-at-k-temperature",
        title="Pass@k against temperature",
        y_name=_Y,
        x_name="sampling temperature",
        series=tuple(series),
        percent=True,
        whole_x=False,
        note="95% intervals",
    )


def _over_k(results: Sequence[Result], usual: Sequence[Result]) -> Iterator[LineChart]:
    if not usual or all(len(result.ks) < 2 for result in usual):
        return
    chosen = {(r.step, r.temperature): r for r in spread(usual, MAX_LINES - 2)}
    start = [result for result in results if result.step == results[0].step]
    best = max(start, key=lambda result: result.average)
    chosen.setdefault((best.step, best.temperature), best)
    yield LineChart(
        key="pass-at-k-k",
        title="Pass@k against k",
        y_name=_Y,
        x_name="k, samples that a problem is given",
        series=tuple(
            Series(
                name=f"step {step}, temperature {tau:g}",
                points=tuple(result.mean(k).at(k) for k in result.ks),
            )
            for (step, tau), result in sorted(chosen.items())
            if len(result.ks) > 1
        ),
        percent=True,
        doubling_x=True,
        note="95% intervals",
    )


def _some_ks(results: Iterable[Result]) -> list[int]:
    """Few enough to tell their bands apart: 1, 8 if it is there, and the largest."""
    ks = sorted({k for result in results for k in result.ks})
    return ks if len(ks) <= 3 else sorted({1, 8 if 8 in ks else ks[len(ks) // 2], ks[-1]})


def spread(items: Sequence[T], count: int) -> list[T]:
    """Of many the first, the last, and some between."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    places = {round(i * (len(items) - 1) / (count - 1)) for i in range(count)}
    return [items[place] for place in sorted(places)]


def _of_row(row: Json) -> Result | None:
    temperature, score = finite(row, "eval/temperature"), finite(row, "eval/pass_at_1")
    if temperature is None or score is None:
        return None
    scores: dict[str, dict[int, Figure]] = {}
    for name in row:
        value = finite(row, name)
        if (match := _ROW_METRIC.fullmatch(name)) and value is not None:
            scores.setdefault(match[1], {})[int(match[2])] = Figure(value=value)
    return Result(
        step=row["step"],
        temperature=temperature,
        by_benchmark=scores,
        pass_at_1=Figure(value=score),
    )


def _of_answers(evaluation: Evaluation, *, seed: int) -> Result:
    """For runs of versions that kept answers alone."""
    scores: dict[str, dict[int, Figure]] = {}
    for source in evaluation.sources:
        of_source = scores.setdefault(source.data_source, {})
        for k in ks_for(source.num_asked):
            values = source.pass_values(k)
            ci = bootstrap_ci(values, seed=seed)
            of_source[k] = Figure(value=sum(values) / len(values), low=ci.low, high=ci.high)
    means = {}
    for k in set.intersection(*(set(of_source) for of_source in scores.values())):
        value, ci = pass_at(evaluation, k, seed=seed)
        means[k] = Figure(value=value, low=ci.low, high=ci.high)
    return Result(
        step=evaluation.step,
        temperature=evaluation.temperature,
        by_benchmark=scores,
        pass_at_1=means[1],
        means=means,
    )


def _of_report(kept: Json, step: int, temperature: float) -> Result | None:
    try:
        scores = {
            str(name): {int(k): _figure(figure) for k, figure in found["pass@k"].items()}
            for name, found in kept["benchmarks"].items()
        }
        total = _figure(kept["pass_at_1"])
        # Older versions do not have these.
        means = {int(k): _figure(figure) for k, figure in kept.get("pass@k", {}).items()}
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError):
        return None
    return Result(
        step=step, temperature=temperature, by_benchmark=scores, pass_at_1=total, means=means
    )


def _figure(kept: Json) -> Figure:
    value, bounds = number(kept, "value"), kept["ci95"]
    low, high = float(bounds[0]), float(bounds[1])
    if value is None or not all(map(math.isfinite, (value, low, high))):
        raise ValueError("a figure needs a finite value and its bounds")
    return Figure(value=value, low=low, high=high)
