"""Charts of what a run logs every step, and what it does not log; pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from osft_mcore.config.schema import MAX_LOGPROB_DIFF, MEAN_LOGPROB_DIFF
from osft_mcore.report.columns import Column, ColumnChart
from osft_mcore.report.lines import Guide, LineChart, Point, Series
from osft_mcore.report.run import Json, Run, finite, number

MAX_COLUMNS: Final = 60
"""Steps share a column if there are more."""
SAME: Final = 1e-3
"""Lines that differ by less, relatively, would hide each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Metrics that belong into one chart; the first is the one to compare runs by."""

    key: str
    title: str
    y_name: str
    metrics: Mapping[str, str]
    """Metric -> what the legend calls it."""
    band: tuple[str, str] | None = None
    """Metrics that bound the first."""
    log: bool = False
    percent: bool = False


CURVES: Final = (
    Curve(
        key="loss", title="Loss", y_name="nats per token",
        metrics={"loss/loss": "minimised", "loss/nll": "negative log-likelihood"},
    ),
    Curve(
        key="entropy", title="Entropy of the model on its answers", y_name="nats",
        metrics={"loss/entropy": "at tau_train"},
    ),
    Curve(
        key="kl", title="Distance from the reference model", y_name="nats per token",
        metrics={"loss/kl": "estimate of the KL divergence"},
    ),
    Curve(
        key="length", title="Length of the sampled answers", y_name="tokens",
        metrics={
            "rollout/response_length_mean": "mean (band: shortest to longest)",
            "rollout/response_length_median": "median",
        },
        band=("rollout/response_length_min", "rollout/response_length_max"),
    ),
    Curve(
        key="cut-off", title="Answers cut off by the token limit", y_name="share of answers",
        metrics={"rollout/cut_off_ratio": "cut off"}, percent=True,
    ),
    Curve(
        key="tau", title="Temperatures", y_name="temperature",
        metrics={"rollout/tau_sample": "tau_sample", "loss/tau_train": "tau_train"},
    ),
    Curve(
        key="logprob-diff", title="Log-probabilities: engine against actor",
        y_name="nats, log scale",
        metrics={"sync/logprob_diff_max": "largest", "sync/logprob_diff_mean": "mean"}, log=True,
    ),
    Curve(
        key="sync", title="Time of the weight push", y_name="seconds",
        metrics={
            "time/sync_push_s": "push", "time/sync_pack_s": "pack",
            "time/sync_transfer_s": "transfer", "time/sync_write_s": "write",
            "time/sync_verify_s": "verify",
        },
    ),
    Curve(
        key="grad-norm", title="Gradient norm before clipping", y_name="norm",
        metrics={"optim/grad_norm": "mean over updates"},
    ),
    Curve(
        key="lr", title="Learning rate", y_name="learning rate",
        metrics={"optim/lr": "learning rate"},
    ),
    Curve(
        key="throughput", title="Throughput", y_name="tokens/s, all ranks",
        metrics={
            "perf/rollout_tokens_per_s": "sampled", "perf/train_tokens_per_s": "trained on",
        },
    ),
    Curve(
        key="memory", title="Peak memory of the neediest rank", y_name="GiB",
        metrics={"perf/peak_host_memory_gib": "host", "perf/peak_gpu_memory_gib": "GPU"},
    ),
)  # fmt: skip


def curve_charts(run: Run) -> Iterator[LineChart]:
    """Of everything that the run has logged."""
    for curve in CURVES:
        series, same = _distinct([_series(run, curve, name) for name in curve.metrics])
        if series:
            yield _chart(curve, series, _guides(run, curve), _note(run, curve, same))


def shared_charts(runs: Sequence[Run]) -> Iterator[LineChart]:
    """Of each curve the first metric, one line a run."""
    for curve in CURVES:
        name = next(iter(curve.metrics))
        series = [_series(run, curve, name, called=run.name) for run in runs]
        if drawn := [line for line in series if line is not None]:
            without = [run.name for run, line in zip(runs, series, strict=True) if line is None]
            note = f"shown: {curve.metrics[name]}"
            if without:
                note += f"; not logged by {', '.join(without)}"
            yield _chart(curve, drawn, [], note, key=f"shared-{curve.key}")


def absent_metrics(run: Run) -> list[str]:
    """What a chart would have shown, as `title: metrics`; of a run that logs steps at all."""
    if not run.metrics:
        return ["metrics of steps: there is no metrics.jsonl with a step in it"]
    lines = []
    for curve in CURVES:
        names = [*curve.metrics, *(curve.band or ())]
        missing = [name for name in names if all(number(row, name) is None for row in run.metrics)]
        if missing:
            lines.append(f"{curve.title}: {', '.join(missing)}")
    return lines


def step_time(run: Run) -> ColumnChart | None:
    """Where the time of every step went."""
    phases = phase_names(run)
    if not phases:
        return None
    size = math.ceil(len(run.metrics) / MAX_COLUMNS)
    columns = []
    for start in range(0, len(run.metrics), size):
        rows = run.metrics[start : start + size]
        first, last = rows[0]["step"], rows[-1]["step"]
        columns.append(
            Column(
                name=str(first) if first == last else f"{first}-{last}",
                values=tuple(mean_seconds(rows, phase) for phase in phases),
            )
        )
    return ColumnChart(
        key="timeline",
        title="Where the time of a step goes",
        y_name="seconds a step",
        x_name="step",
        parts=phases,
        columns=tuple(columns),
        note="" if size == 1 else f"means over {size} steps",
    )


def phase_names(run: Run) -> tuple[str, ...]:
    """Phases of a step that follow one another: what a push does is inside of `sync`."""
    names = dict.fromkeys(
        name.removeprefix("time/").removesuffix("_s")
        for row in run.metrics
        for name in row
        if name.startswith("time/") and not name.startswith("time/sync_push")
    )
    return tuple(name for name in names if not name.startswith("sync_"))


def mean_seconds(rows: Sequence[Json], phase: str) -> float:
    """Of one phase, over steps; a step without it took no time there."""
    return sum(max(finite(row, f"time/{phase}_s") or 0.0, 0.0) for row in rows) / len(rows)


def logprob_limits(run: Run) -> tuple[float, float] | None:
    """What the agreement gate lets pass, largest and mean; None if the dtype is not known."""
    dtype = str(run.option("model.dtype"))
    if dtype not in MAX_LOGPROB_DIFF:
        return None
    largest, mean = (run.figure(f"sync.{name}_logprob_diff") for name in ("max", "mean"))
    return (
        MAX_LOGPROB_DIFF[dtype] if largest is None else largest,
        MEAN_LOGPROB_DIFF[dtype] if mean is None else mean,
    )


def _series(run: Run, curve: Curve, metric: str, called: str = "") -> Series | None:
    """None if no step has a finite value."""
    banded = curve.band is not None and metric == next(iter(curve.metrics)) and not called
    low, high = curve.band if curve.band is not None and banded else ("", "")
    points = tuple(
        Point(x=row["step"], y=value, low=finite(row, low), high=finite(row, high))
        for row in run.metrics
        if (value := number(row, metric)) is not None
    )
    if not any(math.isfinite(point.y) for point in points):
        return None
    return Series(name=called or curve.metrics[metric], points=points)


def _distinct(found: Sequence[Series | None]) -> tuple[list[Series], list[str]]:
    """The lines that differ from the first one, and the names of those that do not."""
    series = [line for line in found if line is not None]
    same = [line.name for line in series[1:] if _alike(line, series[0])]
    return [line for line in series if line.name not in same], same


def _alike(one: Series, other: Series) -> bool:
    return len(one.points) == len(other.points) and all(
        a.x == b.x and math.isclose(a.y, b.y, rel_tol=SAME, abs_tol=0.0)
        for a, b in zip(one.points, other.points, strict=True)
    )


def _note(run: Run, curve: Curve, same: Sequence[str]) -> str:
    notes = [f"{name}: the same" for name in same]
    values = [number(row, name) for row in run.metrics for name in curve.metrics]
    if broken := sum(value is not None and not math.isfinite(value) for value in values):
        notes.append(f"{broken} values are NaN or infinite, and left out")
    if curve.log and any(value is not None and value <= 0 for value in values):
        notes.append("0 lies at the lower edge")
    return "; ".join(notes)


def _guides(run: Run, curve: Curve) -> list[Guide]:
    if curve.key == "logprob-diff" and (limits := logprob_limits(run)) is not None:
        return [
            Guide(name=f"the run stops: largest above {limits[0]:g}", y=limits[0]),
            Guide(name=f"mean above {limits[1]:g}", y=limits[1]),
        ]
    clip = run.figure("train.clip_grad")
    if curve.key == "grad-norm" and clip is not None and clip > 0:
        norms = [value for row in run.metrics if (value := finite(row, "optim/grad_norm"))]
        # A level far above would flatten the line.
        if max(norms) > clip / 3:
            return [Guide(name=f"clipped to {clip:g}", y=clip)]
    return []


def _chart(
    curve: Curve, series: Sequence[Series], guides: Sequence[Guide], note: str, key: str = ""
) -> LineChart:
    return LineChart(
        key=key or curve.key,
        title=curve.title,
        y_name=curve.y_name,
        series=tuple(series),
        guides=tuple(guides),
        log=curve.log,
        percent=curve.percent,
        note=note,
    )
