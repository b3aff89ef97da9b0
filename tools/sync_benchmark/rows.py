"""The rows of the table: arithmetic on what was measured, and how people and programs see it."""

import dataclasses
from dataclasses import dataclass
from statistics import median

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What one way of pushing took."""

    seconds: tuple[float, ...]
    """Of each timed push, on the slowest rank."""
    bytes_received: int
    """By one push, over all ranks."""
    peak_extra_bytes: int
    """On the rank that took most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, measured; the JSON output has these names."""

    num_parameters: int
    num_ranks: int
    actor: str
    rollout: str
    mode: str
    verify: str
    dtype: str
    rounds: int
    seconds: float
    """Median of our push."""
    seconds_usual: float
    """Median of the usual way."""
    speedup: float
    """seconds_usual / seconds"""
    bytes_least: int
    """The parts of its engine that a rank's actor does not hold, over all ranks."""
    bytes_ratio: float
    """What our push brings to all ranks over bytes_least; 1 is the best possible."""
    bytes_ratio_usual: float
    peak_extra_bytes: int
    peak_extra_bytes_usual: int
    bucket_bytes: int


def make_row(
    *,
    num_parameters: int,
    num_ranks: int,
    actor: str,
    rollout: str,
    mode: str,
    verify: str,
    dtype: str,
    ours: Way,
    usual: Way,
    bytes_least: int,
    bucket_bytes: int,
) -> Row:
    """Hold our way against the usual one and against the lower bound."""
    return Row(
        num_parameters=num_parameters,
        num_ranks=num_ranks,
        actor=actor,
        rollout=rollout,
        mode=mode,
        verify=verify,
        dtype=dtype,
        rounds=len(ours.seconds),
        seconds=median(ours.seconds),
        seconds_usual=median(usual.seconds),
        speedup=median(usual.seconds) / median(ours.seconds),
        bytes_least=bytes_least,
        bytes_ratio=_ratio(ours.bytes_received, bytes_least),
        bytes_ratio_usual=_ratio(usual.bytes_received, bytes_least),
        peak_extra_bytes=ours.peak_extra_bytes,
        peak_extra_bytes_usual=usual.peak_extra_bytes,
        bucket_bytes=bucket_bytes,
    )


def _ratio(num_bytes: int, least: int) -> float:
    """1 if nothing has to move and nothing does, as PlanBytes.ratio."""
    return num_bytes / least if least else 1.0 + num_bytes


def as_json(row: Row) -> dict[str, object]:
    """The row as json.dumps takes it."""
    return dataclasses.asdict(row)


def table_head() -> str:
    """The two lines above the rows: what each group of columns is, and the columns."""
    return (
        f"{'':30}{'median seconds':>17}{'usual':>9}{'bytes / bound':>16}"
        f"{'peak extra MiB':>16}{'bucket':>8}\n"
        f"{'params':>7}{'ranks':>6}  {'actor':8}{'rollout':7}"
        f"{'ours':>9}{'usual':>8}{'/ ours':>9}{'ours':>7}{'usual':>9}"
        f"{'ours':>8}{'usual':>8}{'MiB':>8}"
    )


def table_line(row: Row) -> str:
    """One row under that head; no ratio for the usual way where nothing had to move."""
    usual_ratio = f"{row.bytes_ratio_usual:.1f}" if row.bytes_least else "-"
    return (
        f"{row.num_parameters / 1e6:6.1f}M{row.num_ranks:6d}  {row.actor:8}{row.rollout:7}"
        f"{row.seconds:9.4f}{row.seconds_usual:8.4f}{row.speedup:8.1f}x"
        f"{row.bytes_ratio:7.2f}{usual_ratio:>9}"
        f"{row.peak_extra_bytes / MIB:8.1f}{row.peak_extra_bytes_usual / MIB:8.1f}"
        f"{row.bucket_bytes / MIB:8.0f}"
    )
