"""One HTML page from run folders; it fetches nothing and runs no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from osft_mcore import __version__
from osft_mcore.report import facts
from osft_mcore.report.columns import ColumnChart
from osft_mcore.report.comparison import Row, compared
from osft_mcore.report.curves import absent_metrics, curve_charts, shared_charts, step_time
from osft_mcore.report.general import harness_table
from osft_mcore.report.lines import LineChart
from osft_mcore.report.outcomes import COLUMNS, outcome_rows
from osft_mcore.report.outcomes import Row as OutcomeRow
from osft_mcore.report.probe import probe_charts
from osft_mcore.report.run import Run
from osft_mcore.report.samples import Answer, samples_of
from osft_mcore.report.scale import written
from osft_mcore.report.scores import (
    Result,
    results_of,
    score_charts,
    step_series,
    usual_temperature,
)

TEMPLATE: Final = "page.html.jinja"
NO_SCORES: Final = "pass@k: no evaluation is in this folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """What the page shows of one run."""

    run: Run
    sentence: str
    state: str
    cards: list[facts.Card]
    scores: list[LineChart]
    outcomes: list[OutcomeRow]
    curves: list[LineChart]
    timeline: ColumnChart | None
    phase_shares: list[tuple[str, str]]
    absent: list[str]
    skipped: list[list[str]]
    starts: list[list[str]]
    options: list[facts.Option]
    made_with: list[tuple[str, str]]
    answers: list[Answer]


def page(runs: Sequence[Run], *, num_samples: int = 0) -> str:
    """The report of one run, or of several with a comparison in front."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(
        written=written, points=facts.points, signed=facts.signed, version=__version__
    )
    results = [results_of(run) for run in runs]
    rows = compared(runs, results)
    # Within a run: its own start is what its gain is over.
    own = (
        [rows]
        if len(runs) == 1
        else [compared([r], [f]) for r, f in zip(runs, results, strict=True)]
    )
    return templates.get_template(TEMPLATE).render(
        runs=runs,
        rows=rows,
        general=harness_table(runs),
        outcome_columns=list(COLUMNS.values()),
        ks=sorted({k for row in rows for k in row.pass_at}),
        shared=_shared(runs, results),
        parts=[_part(*of_run, num_samples) for of_run in zip(runs, results, own, strict=True)],
        made=facts.now(),
    )


def _part(run: Run, results: Sequence[Result], rows: Sequence[Row], num_samples: int) -> RunPart:
    timeline = step_time(run)
    # Scores alone have no steps that could lack a figure.
    absent = [] if run.phase == "evaluate" else absent_metrics(run)
    if not results and run.phase != "sft":
        absent.append(NO_SCORES)
    return RunPart(
        run=run,
        sentence=facts.sentence(run),
        state=facts.state(run),
        cards=facts.cards(run, rows),
        scores=[
            *score_charts(run, results),
            *probe_charts(run, usual_temperature(run, results)),
        ],
        outcomes=outcome_rows(run, results),
        curves=list(curve_charts(run)),
        timeline=timeline,
        phase_shares=_shares(timeline),
        absent=absent,
        skipped=facts.skipped_rows(run),
        starts=facts.starts(run),
        options=facts.options(run),
        made_with=facts.made_with(run),
        answers=samples_of(run, results, num_samples),
    )


def _shares(timeline: ColumnChart | None) -> list[tuple[str, str]]:
    """Of the time of all steps, by phase."""
    if timeline is None:
        return []
    by_phase = [sum(values) for values in zip(*(c.values for c in timeline.columns), strict=True)]
    total = sum(by_phase)
    return [
        (name, written(seconds / total, percent=True) if total else "")
        for name, seconds in zip(timeline.parts, by_phase, strict=True)
    ]


def _shared(runs: Sequence[Run], results: Sequence[Sequence[Result]]) -> list[LineChart]:
    """Charts with a line for every run; none for a single one."""
    if len(runs) < 2:
        return []
    series = []
    for run, found in zip(runs, results, strict=True):
        tau = usual_temperature(run, found)
        usual = [result for result in found if result.temperature == tau]
        if usual:
            series.append(step_series(usual, 1, f"{run.name}, temperature {tau:g}"))
    scores = LineChart(
        key="shared-pass-at-1",
        title="Pass@1 over steps, mean of benchmarks",
        y_name="pass@1, share of problems",
        series=tuple(series),
        percent=True,
        note="95% intervals",
    )
    return [*([scores] if series else []), *shared_charts(runs)]
