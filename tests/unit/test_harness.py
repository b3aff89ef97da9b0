"""What lm-evaluation-harness is asked, and what becomes of its numbers in results and report."""

import json
from pathlib import Path

import pytest
from run_folders import write_run

from osft_mcore.errors import ConfigError
from osft_mcore.evaluation.harness import (
    Harness,
    merged,
    options_file,
    parse_harness,
    result_rows,
    summary,
)
from osft_mcore.report.general import harness_table
from osft_mcore.report.page import page
from osft_mcore.report.run import read_runs

OWN = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.25},
        "mmlu_law": {"alias": " - law", "acc,none": 0.75, "acc_stderr,none": "N/A"},
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": float("nan")},
    },
    "group_subtasks": {"mmlu": ["mmlu_law"], "gsm8k": []},
    "n-shot": {"mmlu_law": 5, "gsm8k": 4},
    "n-samples": {"gsm8k": {"original": 9, "effective": 3}},
    "higher_is_better": {"gsm8k": {"exact_match": True}},
    "versions": {"gsm8k": 3.0},
}  # fmt: skip


def test_options_become_words_of_the_harness() -> None:
    asked = parse_harness(
        "mmlu, gsm8k,mmlu", "--num_fewshot 4 --limit=10 --apply_chat_template --model vllm",
        usual="hf",
    )  # fmt: skip
    assert asked == Harness(
        tasks=("mmlu", "gsm8k"), backend="vllm",
        arguments=("--num_fewshot", "4", "--limit", "10", "--apply_chat_template"),
    )  # fmt: skip
    assert parse_harness("a", "--include_path 'my tasks'", usual="hf").include_path == "my tasks"
    assert parse_harness("a", "", usual="vllm").backend == "vllm"


@pytest.mark.parametrize(
    "arguments",
    [
        "--trust_remote_code",
        "--trust",
        "--model_args trust_remote_code=True",
        "--confirm_run_unsafe_code",
        "--hf_hub_log_args push_results_to_hub=True",
        "--output_path elsewhere",
        "--config mine.yaml",
        "-m hf",
        "--wandb_args project=x",
        "stray",
        "--apply_chat_template=x",
    ],
)
def test_what_could_run_code_or_send_things_away_is_not_passed_on(arguments: str) -> None:
    with pytest.raises(ConfigError, match="is not passed on; known: --model, --num_fewshot"):
        parse_harness("mmlu", arguments, usual="hf")


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_harness("mmlu,,", "--limit --num_fewshot --model gpt", usual="hf")
    assert [problem.split(": ")[1][:22] for problem in caught.value.problems] == [
        "found 'mmlu,,', expect", "--limit has no value", "--model is 'gpt', expe",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--lm-eval-args: No closing quotation"):
        parse_harness("mmlu", "--gen_kwargs 'a", usual="hf")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("--num_fewshot", ["0", "5"], ["five", "-1", "1.5", "4x"]),
        ("--limit", ["10", "10.0", "0.25", ".5"], ["0", "0.0", "-1", "ten", "2.5", "nan", "1%"]),
        ("--batch_size", ["8", "auto", "auto:4"], ["0", "auto:", "automatic", "-2", "8.0"]),
        ("--max_batch_size", ["64"], ["0", "auto", "many"]),
        ("--seed", ["0", "None", "0,None,8,52", "1,2,3"], ["x", "1,2", "1,2,3,4,5", "1.5", "-1"]),
    ],
)
def test_numbers_are_checked_at_the_start(name: str, right: list[str], wrong: list[str]) -> None:
    for value in right:
        assert parse_harness("a", f"{name} {value}", usual="hf").arguments == (name, value)
    arguments = " ".join(f"{name}={value}" for value in wrong)
    with pytest.raises(ConfigError) as caught:
        parse_harness("a", arguments, usual="hf")
    told = [problem.partition(", expected")[0] for problem in caught.value.problems]
    assert told == [f"--lm-eval-args: {name} is {value!r}" for value in wrong]


def test_a_path_may_hold_any_character() -> None:
    asked = Harness(tasks=("a",), backend="vllm")
    options = options_file(
        asked,
        ("a",),
        model="x,trust_remote_code=True",
        dtype="bf16",
        tp=2,
        output="o",
        trust_remote_code=False,
    )
    assert options["model_args"] == {
        "pretrained": "x,trust_remote_code=True", "dtype": "bfloat16", "tensor_parallel_size": 2,
        "trust_remote_code": False,
    }  # fmt: skip


def test_rows_by_hand() -> None:
    rows = {(row["task"], row["filter"]): row for row in result_rows(OWN)}
    assert list(rows) == [
        ("mmlu", "none"), ("mmlu_law", "none"), ("gsm8k", "strict-match"),
        ("gsm8k", "flexible-extract"),
    ]  # fmt: skip
    assert (rows["mmlu", "none"]["value"], rows["mmlu", "none"]["stderr"]) == (0.5, 0.25)
    law = rows["mmlu_law", "none"]
    assert (law["within"], law["stderr"], law["num_fewshot"]) == ("mmlu", None, 5)
    assert rows["gsm8k", "strict-match"] == {
        "task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": 0.0,
        "stderr": None, "num_fewshot": 4, "num_samples": 3, "higher_is_better": True,
        "task_version": 3.0, "within": None,
    }  # fmt: skip
    assert rows["gsm8k", "flexible-extract"]["value"] is None
    with pytest.raises(ValueError, match="no results"):
        result_rows({"results": []})


def test_later_numbers_of_a_task_replace_earlier_ones() -> None:
    before = result_rows(OWN)
    new = result_rows({"results": {"mmlu": {"acc,none": 1.0}, "arc": {"acc,none": 0.25}}})
    rows = merged(before, new)
    assert len(rows) == len(before) + 1
    assert summary({3: {"results": rows}}) == {
        "3": {
            "mmlu": {"acc": 1.0},
            "gsm8k": {"exact_match (strict-match)": 0.0, "exact_match (flexible-extract)": None},
            "arc": {"acc": 0.25},
        }
    }


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs: one with numbers of two steps, one of one step and another task."""
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    for folder, step, found in (
        (one, 0, OWN),
        (one, 4, {"results": {"mmlu": {"acc,none": 0.625}}}),
        (two, 4, {"results": {"<b>": {"ppl,none": 12.5}}, "higher_is_better": {"<b>": {
            "ppl": False}}}),
    ):  # fmt: skip
        (folder / "evaluations").mkdir(exist_ok=True)
        file = folder / "evaluations" / f"step_{step}_lm_eval.json"
        file.write_text(json.dumps({"step": step, "results": result_rows(found)}))
    return [one, two]


def test_the_report_sets_steps_and_runs_side_by_side(folders: list[Path]) -> None:
    table = harness_table(read_runs(folders))
    assert table is not None
    assert table.columns == ["one, step 0", "one, step 4", "two, step 4"]
    lines = {(line.task, line.metric): line for line in table.lines}
    assert ("mmlu_law", "acc") not in lines
    mmlu = lines["mmlu", "acc"].cells
    assert [None if cell is None else cell.value for cell in mmlu] == [0.5, 0.625, None]
    assert mmlu[0] is not None
    assert mmlu[0].stderr == 0.25
    assert lines["<b>", "ppl"].better == "lower"
    text = page(read_runs(folders))
    assert text.count('id="general"') == 1
    assert "0.5 <small>± 0.25</small>" in text
    assert "&lt;b&gt;" in text
    single = page(read_runs(folders[:1]))
    assert '<th class="n">step 4</th>' in single.split('id="general"')[1]


def test_without_numbers_or_with_damaged_ones_there_is_no_error(folders: list[Path]) -> None:
    (folders[0] / "evaluations" / "step_0_lm_eval.json").write_text('{"step": 0, "results": 3}')
    (folders[0] / "evaluations" / "step_4_lm_eval.json").write_text("{")
    text = page(read_runs(folders[:1]))
    assert "step_4_lm_eval.json: cannot be read" in text
    for file in (folders[0] / "evaluations").iterdir():
        file.unlink()
    assert harness_table(read_runs(folders[:1])) is None
