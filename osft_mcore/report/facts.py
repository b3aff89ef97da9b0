"""What a page says of a run in words and tables: headline, starts, options, versions; pure."""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from osft_mcore.config.schema import RunConfig
from osft_mcore.log.redact import holds_text, is_secret, redacted, redacted_arguments, redacted_text
from osft_mcore.report.comparison import Row
from osft_mcore.report.curves import logprob_limits, mean_seconds, phase_names
from osft_mcore.report.run import Json, Run, finite
from osft_mcore.report.scale import written

_METHODS: Final = {
    "train": "online SFT on its own answers",
    "sft": "supervised fine-tuning on given answers",
    "generate": "answers sampled once",
    "evaluate": "scores of a model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One figure to see first."""

    label: str
    value: str
    detail: str = ""
    good: bool | None = None
    """None: neither good nor bad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One line of config.yaml, by its dotted name."""

    name: str
    value: str
    changed: bool
    """It is not the default."""


def sentence(run: Run) -> str:
    """What was done here, to what."""
    what = _METHODS.get(run.phase, "a run of an unknown kind")
    if run.phase == "train" and run.option("algorithm.objective") == "entropy":
        what = "entropy minimisation on its own answers (EM-FT)"
    parts = [f"{what[0].upper()}{what[1:]}"]
    if model := run.option("model.path"):
        parts.append(f"model {redacted_text(str(model))}")
    if (scored := run.option("evaluation.run")) and run.phase == "evaluate":
        parts.append(f"the checkpoints of {redacted_text(str(scored))}")
    if run.phase in ("train", "generate") and (tau := run.figure("rollout.tau_sample")) is not None:
        parts.append(f"sampled at temperature {tau:g}")
    tau = run.figure("algorithm.tau_train")
    if run.phase == "train" and tau is not None:
        same = run.option("algorithm.follow_tau_sample") is True
        parts.append("trained at the same" if same else f"trained at {tau:g}")
    return ", ".join(part for part in parts if part) + "."


def state(run: Run) -> str:
    """How far it is."""
    asked = run.summary.get("steps", run.option("train.steps"))
    of = f" of {asked}" if isinstance(asked, int) and not isinstance(asked, bool) else ""
    if run.phase == "evaluate":
        return (
            "finished" if run.finished else f"not finished: {len(run.evaluations)} results so far"
        )
    unit = "batches" if run.phase == "generate" else "steps"
    if run.finished:
        return f"finished after {run.last_step} {unit}"
    return f"not finished: {run.last_step}{of if unit == 'steps' else ''} {unit} done"


def cards(run: Run, rows: Sequence[Row]) -> list[Card]:
    """Of one run; `rows` are those of its comparison."""
    return [*_score_cards(run, rows), *_step_cards(run), *_trouble_cards(run)]


def _score_cards(run: Run, rows: Sequence[Row]) -> Iterator[Card]:
    if not rows:
        return
    first, last = rows[0], next((r for r in rows if r.what.startswith("the last")), None)
    shown = last or first
    value = shown.pass_at[1]
    yield Card(
        label="pass@1" if last is None else f"pass@1 after step {shown.step}",
        value=written(value.value, percent=True),
        detail=f"temperature {shown.temperature:g}"
        + (f"; {_bounds(value.low, value.high)}" if value.low is not None else ""),
    )
    if last is not None:
        yield _gain_card(run, first, last)
    for row in rows:
        if row.what == "the same, best temperature":
            yield Card(
                label="pass@1 before, at its best temperature",
                value=written(row.pass_at[1].value, percent=True),
                detail=f"temperature {row.temperature:g}",
            )


def _gain_card(run: Run, first: Row, last: Row) -> Card:
    before = written(first.pass_at[1].value, percent=True)
    gain = last.pass_at[1].value - first.pass_at[1].value
    low, high, p = _kept_interval(run.summary)
    if (found := last.gains.get(1)) is not None:
        gain, low, high, p = found.gain.value, found.gain.low, found.gain.high, found.p_value
    if low is None or high is None:
        return Card(label="gain", value=points(gain), detail=f"from {before}; no interval known")
    test = "" if p is None else f"; {p_text(p)}"
    return Card(
        label="gain",
        value=points(gain),
        detail=f"from {before}; 95% interval {signed(low)} to {signed(high)}{test}",
        good=None if low <= 0 <= high else gain > 0,
    )


def _kept_interval(summary: Json) -> tuple[float | None, float | None, float | None]:
    bounds = summary.get("gain_ci95")
    if not isinstance(bounds, list) or len(bounds) != 2:
        return None, None, None
    found = dict(zip(("low", "high"), bounds, strict=True))
    return finite(found, "low"), finite(found, "high"), finite(summary, "gain_p_value")


def _step_cards(run: Run) -> Iterator[Card]:
    losses = [v for row in run.metrics if (v := finite(row, "loss/loss")) is not None]
    if losses:
        value = f"{losses[0]:.3g} → {losses[-1]:.3g}"
        yield Card(label="loss, first to last step", value=value, detail="nats per token")
    worst = [v for row in run.metrics if (v := finite(row, "sync/logprob_diff_max")) is not None]
    if worst:
        limits = logprob_limits(run)
        yield Card(
            label="largest log-probability difference",
            value=f"{written(max(worst))} nats",
            detail=f"the run stops above {limits[0]:g}" if limits else "engine against actor",
            good=None if limits is None else max(worst) <= limits[0],
        )
    if phases := phase_names(run):
        by_phase = {phase: mean_seconds(run.metrics, phase) for phase in phases}
        total = sum(by_phase.values())
        if total > 0:
            slowest = max(by_phase, key=lambda phase: by_phase[phase])
            share = written(by_phase[slowest] / total, percent=True)
            detail = f"{share} of it: {slowest}"
            yield Card(label="mean time of a step", value=f"{written(total)} s", detail=detail)


def _trouble_cards(run: Run) -> Iterator[Card]:
    num_skipped = sum(int(finite(row, "optim/num_skipped") or 0) for row in run.metrics)
    if any("optim/num_skipped" in row for row in run.metrics):
        yield Card(
            label="skipped updates",
            value=str(num_skipped),
            detail="loss or gradient not finite" if num_skipped else "every update was finite",
            good=num_skipped == 0,
        )
    if isinstance(lacking := run.summary.get("unscored"), list) and lacking:
        yield Card(
            label="evaluations that are missing",
            value=str(len(lacking)),
            detail="reasons: unscored in summary.json",
            good=False,
        )
    if num := len(starts(run)) - 1:
        yield Card(label="interruptions survived", value=str(num), detail="see Starts")


def skipped_rows(run: Run) -> list[list[str]]:
    """Of every skipped update that was kept: step, update, reason, loss, gradient norm."""
    return [
        [redacted_text(str(found.get(name, ""))) for name in ("step", "update", "reason", "loss")]
        + [str(found.get("grad_norm", ""))]
        for found in run.skipped
    ]


def starts(run: Run) -> list[list[str]]:
    """Every start of the run: when, where, from which step on, with how many processes."""
    manifests = [made for made in _list(run.manifest, "earlier") if isinstance(made, Mapping)]
    return [
        [
            str(number),
            str(found.get("started", "")),
            str(found.get("host", "")),
            str(found.get("world_size", "")),
            f"step {found['resumed_at_step']}" if "resumed_at_step" in found else "the beginning",
            "; ".join(redacted_text(str(line)) for line in _list(found, "changed_options")),
        ]
        for number, found in enumerate([*manifests, run.manifest], start=1)
    ]


def _list(found: Json, name: str) -> list[Any]:
    value = found.get(name)
    return value if isinstance(value, list) else []


def options(run: Run) -> list[Option]:
    """config.yaml without secrets; those that are not the default first."""
    usual = dict(_flat(dataclasses.asdict(RunConfig())))
    found = [
        Option(name=name, value=_shown(name, value), changed=usual.get(name, value) != value)
        for name, value in _flat(run.options)
    ]
    return sorted(found, key=lambda option: not option.changed)


def made_with(run: Run) -> list[tuple[str, str]]:
    """What the manifest says about how the run was made, without secrets."""
    made = run.manifest
    arguments = [str(part) for part in _list(made, "command")]
    lines = [
        ("command", " ".join(redacted_arguments(arguments))),
        *((name, made.get(name)) for name in ("started", "host", "world_size", "seed", "python")),
        ("source commit", made.get("git_commit")),
        *(
            (f"{title} {name}".strip(), value)
            for title, section in (
                ("", "packages"), ("hardware:", "hardware"), ("kernel:", "kernels"),
                ("SHA-256 of", "data_sha256"),
            )
            if isinstance(made.get(section), Mapping)
            for name, value in made[section].items()
        ),
    ]  # fmt: skip
    # Hashes of data files are no keys, though they look like some.
    return [
        (redacted_text(name), str(value) if name.startswith("SHA-256") else _shown("", value))
        for name, value in lines
        if value not in (None, "")
    ]


def now() -> str:
    """When the page is made."""
    return datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")


def points(value: float) -> str:
    """A difference of two shares."""
    return f"{signed(value)} points"


def signed(value: float) -> str:
    """The same where its unit is known: a bound of it."""
    return f"{100 * value:+.1f}"


def p_text(p: float) -> str:
    """A p value, which is never 0."""
    return f"p = {p:.2g}"


def _bounds(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "no interval known"
    return f"95% interval {written(low, percent=True)} to {written(high, percent=True)}"


def _flat(section: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        # Python keeps `async` for itself.
        name = f"{prefix}{str(key).rstrip('_')}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, list(value) if isinstance(value, tuple) else value


def _shown(name: str, value: Any) -> str:
    leaf = name.split(".")[-1]
    if any(is_secret(part) and holds_text(value, part) for part in name.split(".")[:-1]):
        return str(redacted(value, "secret"))
    found = redacted(value, leaf)
    if found is None or isinstance(found, bool):
        return {None: "none", True: "true", False: "false"}[found]
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)
