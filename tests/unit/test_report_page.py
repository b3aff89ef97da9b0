"""What the page about a run shows, what it must not show, and what it says is not there."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    MANIFEST,
    OPTIONS,
    add_result,
    add_scores,
    answer_rows,
    step_row,
    write_lines,
    write_run,
)

from osft_mcore import cli
from osft_mcore.errors import ConfigError
from osft_mcore.evaluation.statistics import paired_gain_ci, paired_p_value
from osft_mcore.report.page import page
from osft_mcore.report.run import read_runs

TRAINING = (
    "loss", "entropy", "kl", "length", "cut-off", "tau", "logprob-diff", "sync", "grad-norm",
    "lr", "throughput", "memory", "timeline",
)  # fmt: skip
SCORES = ("pass-at-k-steps", "pass-at-k-temperature", "pass-at-k-k")
VOID = ("meta", "br")


class Page(HTMLParser):
    """A page taken apart: whatever it could run or fetch, its charts, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.charts: dict[str, str] = {}
        self.chart = ""
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.chart = str(dict(attrs)["data-chart"])
            self.charts[self.chart] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "figure":
            self.chart = ""

    def handle_data(self, data: str) -> None:
        if self.chart:
            self.charts[self.chart] += f"\n{data}"
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """Outside of charts, with single spaces."""
        return " ".join(" ".join(self.words).split())


def shown(*folders: Path, num_samples: int = 0) -> Page:
    return Page(page(read_runs(folders), num_samples=num_samples))


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", summary={"steps": 4})
    add_scores(run, 0, 1.0, [[True, False], [False, False], [False, True], [False, False]])
    add_scores(run, 0, 0.3, [[True, True], [False, True], [False, True], [False, False]])
    add_scores(run, 4, 1.0, [[True, True], [True, False], [True, True], [False, False]])
    return run


def test_every_chart_is_there_and_tells_its_values(scored: Path) -> None:
    found = shown(scored)
    assert tuple(found.charts) == (*SCORES, *TRAINING)
    loss = found.charts["loss"]
    assert "step 2\nminimised: 0.25\nnegative log-likelihood: 0.375" in loss
    assert "nats per token" in loss
    assert "step 4\nmean (band: shortest to longest): 34 (20 to 54)" in found.charts["length"]
    assert "cut off: 37.5%" in found.charts["cut-off"]
    assert "largest: 8e-5" in found.charts["logprob-diff"]
    assert "the run stops: largest above 0.001" in found.charts["logprob-diff"]
    assert "clipped to 1" in found.charts["grad-norm"]
    assert "verify: 0.6" in found.charts["sync"]
    assert "trained on: 8,000" in found.charts["throughput"]


def test_the_timeline_leaves_out_what_is_inside_of_a_push(scored: Path) -> None:
    timeline = shown(scored).charts["timeline"]
    assert "step 1\ntogether: 10\nrollout: 3\ntrain: 5\nsync: 2" in timeline
    assert "train 50%" in timeline
    assert "pack" not in timeline


def test_scores_and_their_intervals(scored: Path) -> None:
    charts = shown(scored).charts
    assert re.search(r"step 4\npass@1: 62.5% \([\d.]+% to 1?[\d.]+%\)", charts["pass-at-k-steps"])
    assert "sampling temperature 0.3\nstep 0, pass@1: 50%" in charts["pass-at-k-temperature"]
    assert "step 4, pass@1: 62.5%" in charts["pass-at-k-temperature"]
    over_k = charts["pass-at-k-k"]
    assert "2\nstep 0, temperature 0.3: 75%" in over_k
    assert "step 4, temperature 1: 75%" in over_k


def test_the_gain_is_that_of_the_statistics(scored: Path) -> None:
    before, after = [0.5, 0, 0.5, 0], [1, 0.5, 1, 0]
    interval = paired_gain_ci(before, after, seed=3)
    p = paired_p_value([before], [after], seed=3)
    text = shown(scored).text
    low, high = f"{100 * interval.low:+.1f}", f"{100 * interval.high:+.1f}"
    assert f"from 25%; 95% interval {low} to {high}; p = {p:.2g}" in text
    assert "+37.5 points" in text
    assert "pass@1 before, at its best temperature 50% temperature 0.3" in text


def test_result_files_are_taken_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in (0, 2):
        add_result(run, step, 1.0, (0.5, 0.41, 0.59), (0.75, 0.7, 0.8))
    found = shown(run)
    assert (
        "step 2\npass@1: 50% (41% to 59%)\npass@2: 75% (70% to 80%)"
        in (found.charts["pass-at-k-steps"])
    )
    assert "its answers are not here, or not whole" in found.text


def test_the_mean_of_benchmarks_has_its_bands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    mean = {"1": {"value": 0.5, "ci95": [0.41, 0.59]}, "2": {"value": 0.75, "ci95": [0.7, 0.8]}}
    for step in (0, 2):
        add_result(run, step, 1.0, (0.5, 0.3, 0.7), (0.75, 0.6, 0.9))
        file = run / "evaluations" / f"step_{step}_temperature_1.json"
        kept = json.loads(file.read_text())
        benchmarks = {name: kept["benchmarks"]["sums"] for name in ("sums", "products")}
        kept |= {"pass@k": mean, "pass_at_1": mean["1"], "benchmarks": benchmarks}
        file.write_text(json.dumps(kept))
    chart = shown(run).charts["pass-at-k-steps"]
    assert "step 2\npass@1: 50% (41% to 59%)\npass@2: 75% (70% to 80%)" in chart


def test_the_best_temperature_is_that_of_the_highest_average(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", options=OPTIONS | {"evaluation": {"num_samples": 8}})
    for step in (0, 4):
        add_scores(run, step, 1.0, [[True] * 2 + [False] * 6] * 2)
    add_scores(run, 0, 0.3, [[True] * 6 + [False] * 2, [False] * 8])
    # Of 0.3 pass@1 is 37.5% and pass@8 50%, of 1 they are 25% and 100%.
    assert "best temperature" not in shown(run).text
    add_scores(run, 0, 0.6, [[True] * 4 + [False] * 4] * 2)
    text = shown(run).text
    assert "pass@1 before, at its best temperature 50% temperature 0.6" in text
    # (25% + 100%) / 2 and (50% + 100%) / 2, in the column after pass@8.
    assert " average " in text
    assert " 62.5% " in text
    assert " 75% " in text


def test_scores_of_lines_alone_have_no_band(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    line = {"eval/temperature": 1.0, "eval/pass_at_1": 0.25, "eval/sums/pass@1": 0.25}
    rows = [{"step": step, **line} for step in (0, 4)]
    write_lines(run / "evaluations.jsonl", rows)
    assert "step 4\npass@1: 25%\n" in shown(run).charts["pass-at-k-steps"] + "\n"


def test_the_entropy_of_probed_answers_is_drawn_by_benchmark(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sources = [f"s{number}" for number in range(7)]
    rows = [
        {"step": step, "eval/temperature": tau, "eval/pass_at_1": 0.25}
        | {f"eval/{source}/probe_entropy_mean": tau + 0.125 * step for source in sources}
        for step in (0, 4)
        for tau in (1.0, 0.0)
    ]
    write_lines(run / "evaluations.jsonl", rows[:1])
    assert "probe-entropy" not in shown(run).charts, "one step is no curve"
    write_lines(run / "evaluations.jsonl", rows)
    chart = shown(run).charts["probe-entropy"]
    assert "step 4\ns0: 1.5" in chart
    assert "temperature 1; not shown: s6" in chart


def test_runs_side_by_side(scored: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    # The same problems in another order.
    rows = answer_rows([[True, True]] * 4)
    write_lines(other / "evaluations" / "step_0_temperature_1.jsonl", rows[::-1])
    strange = write_run(tmp_path / "strange")
    add_scores(strange, 0, 1.0, [[True, True]] * 4, source="others")
    found = shown(scored, other, strange)
    assert "+75.0 points" in found.text
    told = "other problems: 0 of 8 are those of the first row, so nothing is compared"
    assert found.text.count(told) == 1
    assert "step 2\nrun: 0.25\nother: 0.25\nstrange: 0.25" in found.charts["shared-loss"]
    assert "run, temperature 1: 62.5%" in found.charts["shared-pass-at-1"]


def test_another_expected_answer_is_another_problem(scored: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    rows = [row | {"ground_truth": "other"} for row in answer_rows([[True, True]] * 4)]
    write_lines(other / "evaluations" / "step_0_temperature_1.jsonl", rows)
    assert "0 of 8 are those of the first row" in shown(scored, other).text


def test_of_several_expected_answers_all_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [row | {"ground_truth": ["1/2", "0.5"]} for row in answer_rows([[True, True]] * 4)]
    write_lines(run / "evaluations" / "step_0_temperature_1.jsonl", rows)
    assert "correct; expected 1/2 or 0.5" in shown(run, num_samples=1).text


def test_a_folder_of_scores_is_a_run(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    add_scores(scores, 0, 1.0, [[True, False], [True, True]])
    add_scores(scores, 0, 0.5, [[True, True], [True, True]])
    (scores / "manifest.json").write_text(json.dumps({"phase": "evaluate"}))
    found = shown(scores)
    assert set(found.charts) == {"pass-at-k-temperature", "pass-at-k-k"}
    assert "pass@1 75%" in found.text
    assert "Not in this report" not in found.text


def test_what_is_absent_is_named_and_not_drawn(tmp_path: Path) -> None:
    rows = [
        {name: v for name, v in step_row(step).items() if not name.startswith(("loss/kl", "perf/"))}
        for step in (1, 2)
    ]
    found = shown(write_run(tmp_path / "run", rows=rows))
    assert "kl" not in found.charts
    assert "throughput" not in found.charts
    assert "Distance from the reference model: loss/kl: not recorded" in found.text
    assert "perf/rollout_tokens_per_s, perf/train_tokens_per_s: not recorded" in found.text
    assert "pass@k: no evaluation is in this folder: not recorded" in found.text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [step_row(step) for step in range(1, 6)]
    rows[2]["loss/loss"] = math.nan
    rows[3]["loss/loss"] = math.inf
    del rows[2]["loss/nll"], rows[3]["loss/nll"]
    rows[0]["sync/logprob_diff_max"] = 0.0
    run = write_run(tmp_path / "run", rows=rows)
    text = page(read_runs([run]))
    loss = Page(text).charts["loss"]
    assert "minimised: not finite" in loss
    assert "2 values are NaN or infinite, and left out" in loss
    drawing = text.split('data-chart="loss"')[1].split("</figure>")[0]
    lines = re.findall(r'polyline class="line c0[^"]*" points="([^"]*)"', drawing)
    assert [len(line.split()) for line in lines] == [2, 1]
    assert not re.search(
        r"(?i)\b(nan|inf)\b", "".join(re.findall(r'(?:points|[xy])="[^"]*"', text))
    )
    assert "0 lies at the lower edge" in Page(text).charts["logprob-diff"]


def test_a_run_that_writes_its_last_line_just_now(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/lo')
    found = shown(run)
    assert "Not finished: 4 of 4 steps done." in found.text
    assert "metrics.jsonl, line" not in found.text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "\x00{", *lines[1:]]))
    (run / "config.yaml").write_text("a: [")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "step_0_temperature_1.json").write_text("[]")
    text = shown(run).text
    for told in ("metrics.jsonl, line 2", "config.yaml", "step_0_temperature_1.json"):
        assert f"{told}: cannot be read" in text


def test_evaluations_that_did_not_come_are_counted(tmp_path: Path) -> None:
    lacking = [{"step": step, "temperature": 1.0, "reason": "ended"} for step in (2, 4)]
    unscored = {"steps": 4, "gain": None, "gain_ci95": None, "unscored": lacking}
    assert (
        "evaluations that are missing 2"
        in shown(write_run(tmp_path / "run", summary=unscored)).text
    )
    assert "evaluations that are missing" not in shown(write_run(tmp_path / "other")).text


def test_interruptions_and_skipped_updates(tmp_path: Path) -> None:
    first = {"started": "earlier", "host": "host-zero", "world_size": 4}
    again = MANIFEST | {
        "earlier": [first],
        "resumed_at_step": 2,
        "changed_options": ["parallel.tp: 2 -> 1"],
    }
    rows = [step_row(step) | {"optim/num_skipped": float(step == 3)} for step in (1, 2, 3)]
    run = write_run(tmp_path / "run", manifest=again, rows=rows)
    (run / "skipped").mkdir()
    kept = {"step": 3, "update": 1, "reason": "gradient not finite", "loss": 1.5, "answers": []}
    (run / "skipped" / "step_3_update_1.json").write_text(json.dumps(kept))
    text = shown(run).text
    assert "skipped updates 1 loss or gradient not finite" in text
    assert "3 1 gradient not finite 1.5" in text
    assert "interruptions survived 1" in text
    assert "1 earlier host-zero 4 the beginning" in text
    assert "host-one 2 step 2 parallel.tp: 2 -> 1" in text


HOSTILE = '</script><script>alert("1")</script><img src=\'http://x\' onerror="y"> &amp; \ud800 ]]>'


def test_hostile_text_stays_text(scored: Path) -> None:
    tag = HOSTILE.replace("\ud800", "")
    options = OPTIONS | {"output_dir": tag, tag: {"x": tag}}
    manifest = MANIFEST | {"host": tag, "packages": {tag: tag}, "command": [tag]}
    run = write_run(scored.parent / "hostile", options=options, manifest=manifest)
    add_scores(run, 0, 1.0, [[True, False]], source=f"<blink>{tag}", text=HOSTILE)
    add_scores(run, 4, 1.0, [[True, False]], source=f"<blink>{tag}", text=HOSTILE)
    row = {"prompt_id": tag, "prompt": HOSTILE, "response": HOSTILE, "num_tokens": 3}
    write_lines(run / "rollouts" / "step_1.jsonl", [row])
    out = scored.parent / "out.html"
    assert cli.main(["report", str(run), "--samples", "3", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    found = Page(text)
    assert text.count("alert") >= 8
    assert not {tag for tag, _ in found.tags} & {
        "script",
        "img",
        "iframe",
        "object",
        "link",
        "blink",
    }
    assert_fetches_nothing(text, found)


def test_nothing_is_fetched(scored: Path) -> None:
    text = page(read_runs([scored]), num_samples=2)
    assert text.lstrip().startswith("<!doctype html>")
    assert_fetches_nothing(text, Page(text))


def assert_fetches_nothing(text: str, found: Page) -> None:
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "xlink:href", "action", "srcset"), (tag, name)
            assert not name.startswith("on"), (tag, name)
            assert name == "aria-label" or "://" not in (value or ""), (tag, name)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    options = OPTIONS | {
        "logging": {"wandb_api_key": "abc123", "url": "https://me:hunter2@host/x"},
        "tracker": {"credentials": {"user": "somebody"}},
    }
    manifest = MANIFEST | {"command": ["osft", "train", "hf.token=qwerty", "--key", "asdfgh"]}
    text = page(read_runs([write_run(tmp_path / "run", options=options, manifest=manifest)]))
    for secret in ("abc123", "hunter2", "somebody", "qwerty", "asdfgh"):
        assert secret not in text
    found = Page(text).text
    assert "logging.wandb_api_key [redacted]" in found
    assert "https://[redacted]@host/x" in found
    # Not secrets, though their names have a word of one.
    assert "rollout.max_response_tokens 64" in found
    assert "data.prompt_key prompt" in found
    assert "ab" * 32 in found


def test_options_that_are_not_the_default_come_first(tmp_path: Path) -> None:
    text = shown(write_run(tmp_path / "run")).text
    changed, default = text.split("Not the default")[1].split("The default")
    assert "model.path models/tiny" in changed
    assert "rollout.tau_sample 0.6" in default


def test_samples_are_shown_on_demand(scored: Path) -> None:
    row = {"prompt_id": "q1", "prompt": "2+2=?", "response": "I say 5", "num_tokens": 3}
    write_lines(scored / "rollouts" / "step_2.jsonl", [row, row])
    assert "I say 5" not in shown(scored).text
    text = shown(scored, num_samples=2).text
    assert text.count("I say 5") == 2
    assert "2+2=?" in text
    assert "sums, problem p0: step 0, temperature 1, 7 tokens: correct; expected 0 it is 4" in text
    assert "sums, problem p3: step 4, temperature 1, 7 tokens: not correct; expected 3" in text


def test_what_is_no_run_is_refused_all_at_once(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_runs([tmp_path / "a", scored, tmp_path])
    assert len(refused.value.problems) == 2
    assert refused.value.problems[0].startswith(f"RUN: '{tmp_path / 'a'}' is no run folder: found")


def test_the_command(
    scored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["report", str(scored)]) == 0
    assert capsys.readouterr().out == f"written: {scored / 'report.html'}\n"
    assert not list(scored.glob(".*"))
    monkeypatch.chdir(scored.parent)
    assert cli.main(["report", "run", str(scored)]) == 0
    assert (scored.parent / "report.html").is_file()
    for arguments in (["nothing"], ["run", "--out", "no/where.html"], ["run", "--samples", "-1"]):
        assert cli.main(["report", *arguments]) == 2
    assert "'no/where.html' cannot be written: No such file" in capsys.readouterr().err
    for arguments in (["--out", "a.html"], ["--samples", "2"]):
        assert cli.main(["report", "run", "--sync", "wandb", *arguments]) == 2
        assert "--sync: found it with --out or --samples" in capsys.readouterr().err


def imported(code: str) -> Iterator[str]:
    program = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    yield from found.stdout.splitlines()[-1].split()


def test_the_command_imports_nothing_heavy(scored: Path) -> None:
    heavy = {"torch", "transformers", "hydra", "vllm", "megatron", "pyarrow", "wandb"}
    found = set(imported(f"from osft_mcore import cli\ncli.main(['report', {str(scored)!r}])"))
    assert "jinja2" in found
    assert not heavy & found
    assert not {"numpy", "jinja2"} & set(imported("from osft_mcore import cli"))


HUGE = 10**400
"""JSON allows it, and no float holds it."""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", {"evaluation": {"temperature": {}}, "model": {"dtype": []}}),
        ("config.yaml", {"sync": {"max_logprob_diff": [1]}, "model": {"dtype": "fp32"}}),
        ("config.yaml", {"rollout": {"tau_sample": HUGE}, "algorithm": {"tau_train": HUGE}}),
        ("config.yaml", {"train": {"clip_grad": HUGE}}),
        ("manifest.json", MANIFEST | {"changed_options": 1.0, "earlier": 3, "command": 4}),
        ("metrics.jsonl", step_row(1) | {"loss/loss": HUGE}),
        ("evaluations.jsonl", {"step": 0, "eval/temperature": HUGE, "eval/pass_at_1": HUGE}),
        ("evaluations/step_0_temperature_1.jsonl", {"num_tokens": math.inf}),
        ("evaluations/step_0_temperature_1.json", {"pass_at_1": {"value": 1, "ci95": []}}),
        ("evaluations/step_0_temperature_1.json", {"pass_at_1": {"value": 1, "ci95": [0, HUGE]}}),
        (
            "evaluations/step_0_temperature_1.json",
            {"benchmarks": {"sums": {"outcomes": {"correct": {"value": 1, "ci95": [1, None]}}}}},
        ),
    ],
)
def test_values_that_nobody_wrote_break_no_page(
    scored: Path, file: str, content: dict[str, Any]
) -> None:
    add_result(scored, 0, 1.0, (0.5, 0.4, 0.6))
    found = scored / file
    if file.endswith("1.jsonl"):
        content = json.loads(found.read_text().splitlines()[0]) | content
    elif file.endswith("1.json"):
        content = json.loads(found.read_text()) | content
    # YAML takes JSON.
    found.write_text(json.dumps(content) + "\n")
    assert shown(scored, num_samples=1).text


def test_answers_that_are_not_whole_are_not_compared(scored: Path) -> None:
    file = scored / "evaluations" / "step_4_temperature_1.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    add_result(scored, 4, 1.0, (0.5, 0.4, 0.6), (0.75, 0.5, 1.0))
    text = shown(scored).text
    assert "its answers are not here, or not whole" in text
    assert "no interval known" in text
