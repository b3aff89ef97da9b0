"""The rows of the table: a case becomes one for each baseline; how people see them."""

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import median

from loss_benchmark.cases import Case
from loss_benchmark.measure import TOLERANCE, Pass, check_losses, in_turns, weighed
from loss_benchmark.ranks import on_ranks
from loss_benchmark.ways import Way

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ours against one baseline; the JSON output has these names."""

    num_tokens: int
    vocab: int
    hidden: int
    tp: int
    dtype: str
    baseline: str
    rounds: int
    seconds: float
    """Median of a pass by ours, forward and backward, on the slowest rank."""
    seconds_baseline: float
    time_ratio: float
    """seconds / seconds_baseline"""
    spread: float
    """Slowest over fastest pass of the same way, the larger of the two ways': the noise."""
    cpu_ratio: float
    """The same of processor seconds, which other programs on the machine disturb less. A CPU's."""
    peak_bytes: int
    """By ours beyond inputs and gradients, on the rank that takes most."""
    peak_bytes_baseline: int
    memory_ratio: float
    """peak_bytes / peak_bytes_baseline"""
    loss: float
    """Mean over tokens."""
    loss_baseline: float


def run_case(case: Case) -> list[Row]:
    """Run all ways in turns, then once more and weighed, each in a process of its own.

    Raises ArithmeticError in a rank or here if two ways differ in what they compute.
    """
    passes = on_ranks(case.tp, partial(in_turns, case))
    ways: tuple[Way, ...] = ("ours", *case.baselines)
    passes += [on_ranks(case.tp, partial(weighed, case, way)) for way in ways]
    return make_rows(case, [Pass(**found) for found in passes])


def make_rows(case: Case, passes: list[Pass]) -> list[Row]:
    """Hold ours against every baseline.

    Raises ArithmeticError if their losses differ, ValueError if a peak is too small to be seen.
    """
    by_way = {way: [at for at in passes if at.way == way] for way in ("ours", *case.baselines)}
    losses = {way: found[-1].loss for way, found in by_way.items()}
    check_losses(losses, tolerance=TOLERANCE[case.dtype])
    peaks = {way: max(at.peak_bytes or 0 for at in found) for way, found in by_way.items()}
    if min(peaks.values()) <= 0:
        raise ValueError(
            f"found peaks of {peaks} bytes beyond inputs and gradients, expected more than the "
            "noise of a process; raise --tokens or --vocab"
        )
    seconds = {way: [at.seconds for at in found] for way, found in by_way.items()}
    usual = {way: median(found) for way, found in seconds.items()}
    cpu = {way: median(at.cpu_seconds for at in found) for way, found in by_way.items()}
    spread = {way: max(found) / min(found) for way, found in seconds.items()}
    return [
        Row(
            num_tokens=case.num_tokens,
            vocab=case.vocab,
            hidden=case.hidden,
            tp=case.tp,
            dtype=case.dtype,
            baseline=baseline,
            rounds=case.rounds,
            seconds=usual["ours"],
            seconds_baseline=usual[baseline],
            time_ratio=usual["ours"] / usual[baseline],
            spread=max(spread["ours"], spread[baseline]),
            cpu_ratio=cpu["ours"] / cpu[baseline],
            peak_bytes=peaks["ours"],
            peak_bytes_baseline=peaks[baseline],
            memory_ratio=peaks["ours"] / peaks[baseline],
            loss=losses["ours"],
            loss_baseline=losses[baseline],
        )
        for baseline in case.baselines
    ]


def table_head() -> str:
    """The two lines above the rows: what each group of columns is, and the columns."""
    return (
        f"{'':37}{'median seconds of a pass':>32}{'cpu':>7}{'peak MiB beyond gradients':>31}\n"
        f"{'tokens':>6}{'hidden':>8}{'tp':>4}{'rounds':>8}{'baseline':>11}"
        f"{'ours':>9}{'baseline':>10}{'ratio':>7}{'spread':>8}{'ratio':>7}"
        f"{'ours':>11}{'baseline':>10}{'ratio':>8}"
    )


def table_line(row: Row) -> str:
    """One row under that head."""
    return (
        f"{row.num_tokens:6d}{row.hidden:8d}{row.tp:4d}{row.rounds:8d}{row.baseline:>11}"
        f"{row.seconds:9.3f}{row.seconds_baseline:10.3f}{row.time_ratio:7.2f}{row.spread:8.2f}{row.cpu_ratio:7.2f}"
        f"{row.peak_bytes / MIB:11.0f}{row.peak_bytes_baseline / MIB:10.0f}{row.memory_ratio:8.3f}"
    )


def growth_lines(rows: list[Row]) -> list[str]:
    """How our peak grows from the fewest tokens to the most, for each width and layout."""

    def layout(row: Row) -> tuple[int, int]:
        return row.hidden, row.tp

    lines = []
    for (hidden, tp), group in groupby(sorted(rows, key=layout), key=layout):
        peaks = {row.num_tokens: row.peak_bytes for row in group}
        if len(peaks) > 1:
            few, many = min(peaks), max(peaks)
            lines.append(
                f"hidden {hidden}, tp {tp}: {many // few} x the tokens, "
                f"{peaks[many] / peaks[few]:.2f} x the peak of ours"
            )
    return lines
