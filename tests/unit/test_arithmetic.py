import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.data.arithmetic import (
    PROBLEM_SCHEMA,
    ArithmeticFiles,
    ArithmeticTask,
    TinyModel,
    describe,
    write_arithmetic,
    write_trace,
)
from osft_mcore.data.problems import load_problems
from osft_mcore.data.sft import load_examples
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.errors import ConfigError, DataError

TASK = ArithmeticTask(num_sft=1500, num_train=300, num_eval=100)
TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_arithmetic.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ArithmeticFiles:
    return write_arithmetic(tmp_path_factory.mktemp("arithmetic"), TASK, TinyModel())


def question(row: dict[str, list[dict[str, str]]]) -> str:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


def addends(text: str) -> list[int]:
    assert re.fullmatch(r"\d+(\+\d+)+=\?", text)
    return [int(number) for number in text.removesuffix("=?").split("+")]


def recompute(text: str, response: str) -> list[bool]:
    """Which steps are wrong; asserts that the trace is otherwise consistent."""
    first, *rest = addends(text)
    *steps, box = response.split("\n")
    assert len(steps) == len(rest)
    wrong = []
    for step, addend in zip(steps, rest, strict=True):
        match = re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step)
        assert match
        left, right, written = map(int, match.groups())
        assert (left, right) == (first, addend)
        wrong.append(written != left + right)
        first = written
    assert box == f"\\boxed{{{first}}}"
    return wrong


def test_sft_traces_are_right_but_for_the_stated_share_of_steps(files: ArithmeticFiles) -> None:
    rows = pq.read_table(files.sft).to_pylist()
    wrong = [step for row in rows for step in recompute(question(row), row["response"])]
    assert len(rows) == TASK.num_sft
    assert (len(wrong), sum(wrong)) == (files.num_steps, files.num_wrong_steps)
    tolerance = 4 * math.sqrt(TASK.wrong_share * (1 - TASK.wrong_share) / len(wrong))
    assert abs(sum(wrong) / len(wrong) - TASK.wrong_share) < tolerance


@given(
    numbers=st.lists(st.integers(1, 99), min_size=2, max_size=5),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_a_trace_errs_exactly_where_it_says(numbers: list[int], share: float, seed: int) -> None:
    trace = write_trace(numbers, share, random.Random(seed))
    text = "+".join(map(str, numbers)) + "=?"
    assert recompute(text, trace.text) == list(trace.wrong)
    assert share == 0.3 or set(trace.wrong) == {share == 1.0}
    assert any(trace.wrong) or trace.sums[-1] == sum(numbers)
    assert all(total > 0 for total in trace.sums)


def test_no_question_appears_twice(files: ArithmeticFiles) -> None:
    questions = [
        question(row)
        for file in (files.sft, files.train, files.eval)
        for row in pq.read_table(file).to_pylist()
    ]
    assert len(set(questions)) == len(questions) == TASK.num_questions


def test_problem_files_have_the_schema_and_the_right_answers(files: ArithmeticFiles) -> None:
    for file, num_rows in ((files.train, TASK.num_train), (files.eval, TASK.num_eval)):
        table = pq.read_table(file)
        assert table.schema.equals(PROBLEM_SCHEMA)
        assert table.num_rows == num_rows
        for row in table.to_pylist():
            assert row["reward_model"]["ground_truth"] == str(sum(addends(question(row))))
            assert (row["data_source"], row["ability"]) == ("arithmetic", "math")
            assert row["reward_model"]["style"] == "rule"


def test_the_loaders_read_every_file_and_every_token_comes_back(files: ArithmeticFiles) -> None:
    tokenizer = load_tokenizer(files.model, None)
    rendering = {"prompt_key": "prompt", "system_prompt": "", "prompt_suffix": ""}
    for file, num_rows in ((files.train, TASK.num_train), (files.eval, TASK.num_eval)):
        problems = load_problems(
            file, tokenizer, max_prompt_tokens=32, option="data.train", **rendering
        )
        assert len(problems.prompts) == num_rows
        for prompt, row in zip(problems.prompts, pq.read_table(file).to_pylist(), strict=True):
            assert prompt.prompt_id == row["id"]
            assert prompt.text == f"<bos>{question(row)}\n"
            assert len(prompt.token_ids) == len(question(row)) + 2
            assert tokenizer.decode(prompt.token_ids) == f"{question(row)}\n"
    vocab = read_model_shape(files.model).vocab
    data = load_examples(
        files.sft, tokenizer, response_key="response", chat_template=None, max_tokens=256,
        vocab=vocab, **rendering,
    )  # fmt: skip
    rows = pq.read_table(files.sft).to_pylist()
    for example, row in zip(data.examples, rows, strict=True):
        assert tokenizer.decode(example.response_token_ids) == row["response"]
        assert len(example.response_token_ids) == len(row["response"]) + 1


def test_any_text_survives_the_tokenizer(files: ArithmeticFiles) -> None:
    tokenizer = load_tokenizer(files.model, None)
    text = " Zażółć\t12 ∑\r\n\n"
    assert tokenizer.decode(tokenizer.encode_response(text)) == text


def test_the_model_folder_describes_the_model(files: ArithmeticFiles) -> None:
    shape = read_model_shape(files.model)
    hf_tokenizer = load_tokenizer(files.model, None).hf_tokenizer
    assert (shape.model_type, shape.tied, shape.head_dim) == ("qwen2", True, 32)
    assert shape.vocab == len(hf_tokenizer)
    assert 0.7e6 < shape.num_parameters < 1.0e6


def test_the_same_seed_writes_the_same_data(files: ArithmeticFiles, tmp_path: Path) -> None:
    again = write_arithmetic(tmp_path / "again", TASK, TinyModel())
    other = write_arithmetic(
        tmp_path / "other",
        ArithmeticTask(num_sft=1500, num_train=300, num_eval=100, seed=2),
        TinyModel(),
    )
    for name in ("sft", "train", "eval"):
        table: pa.Table = pq.read_table(getattr(files, name))
        assert table.equals(pq.read_table(getattr(again, name)))
        assert not table.equals(pq.read_table(getattr(other, name)))
    for file in files.model.iterdir():
        assert file.read_bytes() == (again.model / file.name).read_bytes()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    task = ArithmeticTask(num_sft=2, num_train=2, num_eval=2)
    with pytest.raises(DataError, match="not empty; choose another or pass --overwrite"):
        write_arithmetic(tmp_path, task, TinyModel())
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    write_arithmetic(tmp_path, task, TinyModel(), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "eval.parquet").is_file()


def test_impossible_tasks_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ArithmeticTask(num_eval=0, num_addends=2, max_addend=9, wrong_share=1.5)
    message = str(caught.value)
    for part in ("num_eval: found 0", "wrong_share: found 1.5", "2 addends up to 9 make 81"):
        assert part in message


def test_the_tool_writes_and_refuses(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "out")]
    sizes = ["--num-sft", "20", "--num-train", "5", "--num-eval", "5", "--no-tied"]
    first = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "20 SFT traces, 5 prompts, 5 held out" in first.stdout
    assert not read_model_shape(tmp_path / "out" / "model").tied
    second = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert second.returncode == DataError.exit_code
    assert "not empty" in second.stderr


def test_the_summary_states_what_was_written(files: ArithmeticFiles) -> None:
    text = describe(files, TASK, TinyModel())
    assert f"{files.num_wrong_steps / files.num_steps:.1%} of the trace steps wrong" in text
