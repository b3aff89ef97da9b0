"""From solutions.jsonl to a training set."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.sft import SftData, load_examples
from osft_mcore.data.solutions import (
    Conversion,
    Solution,
    convert_solutions,
    read_solutions,
    solution_lines,
)
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.records import Message, Prompt, Response

TOOL = Path(__file__).parents[2] / "tools" / "solutions_to_sft.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, TinyModel())
    return load_tokenizer(folder, None)


def row(number: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    """A whole answer."""
    return {
        "row": number,
        "prompt_id": f"p{number}",
        "sample": sample,
        "data_source": "arithmetic",
        "ground_truth": "3",
        "prompt": [{"role": "user", "content": "1+2=?"}],
        "prompt_token_ids": [1, 4, 5],
        "response": "3",
        "response_token_ids": [7, 2],
        "truncated": False,
        "tau_sample": 0.6,
    } | changes


CUT_OFF = {"response": "12", "response_token_ids": [5, 6], "truncated": True}
EMPTY = {"response": " ", "response_token_ids": [2]}


def write(folder: Path, rows: list[Any]) -> Path:
    file = folder / "solutions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def converted(folder: Path, rows: list[Any], **options: Any) -> Conversion:
    options = {"truncated": "drop"} | options
    return convert_solutions(write(folder, rows), folder / "sft.parquet", **options)


def load(file: Path, tokenizer: ChatTokenizer, **options: Any) -> SftData:
    return load_examples(
        file,
        tokenizer,
        **{
            "prompt_key": "prompt_token_ids",
            "response_key": "response_token_ids",
            "system_prompt": "",
            "prompt_suffix": "",
            "chat_template": None,
            "max_tokens": 100,
            "vocab": 20,
        }
        | options,
    )


def test_a_line_comes_back_as_it_was_sampled(tmp_path: Path) -> None:
    prompt = Prompt(
        row=4, prompt_id="x", data_source="s", text="<bos>1\n", token_ids=(1, 4),
        ground_truth=("é", "2"), messages=(Message(role="user", content="1\u2028"),),
    )  # fmt: skip
    response = Response(
        prompt=prompt, sample_index=1, token_ids=(7, 2), token_logprobs=(), truncated=False,
        weight_version=1, replica=0,
    )  # fmt: skip
    file = tmp_path / "solutions.jsonl"
    both = [response, dataclasses.replace(response, sample_index=2)]
    file.write_text(solution_lines(both, lambda ids: f"\n{ids}", tau_sample=0.3))
    one, two = read_solutions(file, option="--solutions")
    assert one == dataclasses.replace(two, sample=1)
    assert one == Solution(
        row=4, prompt_id="x", sample=1, data_source="s", ground_truth=("é", "2"),
        prompt=prompt.messages, prompt_token_ids=(1, 4), response="\n(7, 2)",
        response_token_ids=(7, 2), truncated=False, tau_sample=0.3,
    )  # fmt: skip


def test_several_accepted_answers_make_a_column_of_lists(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    rows = [row(0), row(1, ground_truth=["3", "4"]), row(2), row(3)]
    converted(tmp_path, rows, val_share=0.5)
    train, val = (pq.read_table(tmp_path / name) for name in ("sft.parquet", "sft_val.parquet"))
    assert train.schema == val.schema
    found = {r["row"]: r["ground_truth"] for t in (train, val) for r in t.to_pylist()}
    assert found == {0: ["3"], 1: ["3", "4"], 2: ["3"], 3: ["3"]}
    assert len(load(tmp_path / "sft.parquet", tokenizer).examples) == 2


@pytest.mark.parametrize("truncated", ["drop", "keep"])
def test_what_is_cut_off_is_dropped_or_kept(
    truncated: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    rows = [row(0, **CUT_OFF), row(1), row(2, **EMPTY), row(3, response_token_ids=[])]
    done = converted(tmp_path, rows, truncated=truncated)
    kept = truncated == "keep"
    assert (done.num_answers, done.num_empty, done.num_truncated) == (4, 2, 1)
    assert (done.num_train, done.num_train_tokens) == ((2, 4) if kept else (1, 2))
    examples = load(tmp_path / "sft.parquet", tokenizer).examples
    # Exactly the sampled tokens: no end is put after an answer that was cut off.
    expected = [((1, 4, 5), (5, 6)), ((1, 4, 5), (7, 2))]
    found = [(e.prompt_token_ids, e.response_token_ids) for e in examples]
    assert found == expected[0 if kept else 1 :]


def test_the_texts_are_there_for_others(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    converted(tmp_path, [row(0)])
    [found] = pq.read_table(tmp_path / "sft.parquet").to_pylist()
    assert found == {"id": "p0"} | {k: v for k, v in row(0).items() if k != "prompt_id"}
    data = load(
        tmp_path / "sft.parquet", tokenizer, prompt_key="prompt", response_key="response", vocab=0
    )
    assert tokenizer.decode(data.examples[0].prompt_token_ids) == "1+2=?\n"


def test_prompts_are_held_out_with_all_their_answers(tmp_path: Path) -> None:
    rows = [row(number, sample) for number in range(10) for sample in range(3)]
    done = converted(tmp_path, rows, val_share=0.2, seed=5)
    assert (done.num_train, done.num_val) == (24, 6)
    train, val = (
        pq.read_table(tmp_path / name).column("row").to_pylist()
        for name in ("sft.parquet", "sft_val.parquet")
    )
    assert sorted({*train, *val}) == list(range(10))
    assert not {*train} & {*val}
    assert len({*val}) == 2
    again = convert_solutions(
        tmp_path / "solutions.jsonl",
        tmp_path / "2.parquet",
        truncated="drop",
        val_share=0.2,
        seed=6,
    )
    assert again.num_val == 6
    assert pq.read_table(tmp_path / "2_val.parquet").column("row").to_pylist() != val


def test_bad_lines_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    without = {key: value for key, value in row(1).items() if key != "truncated"}
    rows = [row(0), without, row(2, response_token_ids=[1, "2"]), row(3, prompt_token_ids=[]), 7]
    with pytest.raises(DataError, match=r"--solutions: .*4 of 5 lines cannot be used") as caught:
        converted(tmp_path, rows)
    for part in (
        "line 2: truncated: ", "line 3: response_token_ids.1: ", "line 4: prompt_token_ids: ",
        "line 5: ",
    ):  # fmt: skip
        assert part in str(caught.value)
    numbers = [row(2**63), row(-5), row(1, 2**31), row(2, tau_sample=-1), row(3), row(3)]
    with pytest.raises(DataError, match="5 of 6 lines cannot be used") as caught:
        converted(tmp_path, numbers)
    for part in ("line 1: row: ", "line 2: row: ", "line 3: sample: ", "line 4: tau_sample: "):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="line 2: row and sample are those of line 1"):
        converted(tmp_path, [row(3), row(3), row(3, 1)])
    (tmp_path / "half").write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1))[:-9])
    with pytest.raises(DataError, match="line 2: Invalid JSON"):
        convert_solutions(tmp_path / "half", tmp_path / "sft.parquet", truncated="drop")
    assert not list(tmp_path.glob("*.parquet*"))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row(0, **CUT_OFF), row(1, **EMPTY)], {}, "of 2 answers 1 are empty and 1 cut off; raise"),
        # Nothing was cut off, so there is no advice on that.
        ([row(0, **EMPTY)], {"truncated": "keep"}, "of 1 answers 1 are empty and 0 cut off$"),
        ([], {}, "the file has no lines"),
        ([row(0), row(1)], {"val_share": 0.1}, "0.1 of 2 prompts leaves one of the two"),
    ],
)
def test_nothing_left_is_refused(
    rows: list[Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        converted(tmp_path, rows, **options)
    assert not list(tmp_path.glob("*.parquet*"))


@pytest.mark.parametrize("name", ["sft.parquet", "sft_val.parquet"])
def test_an_output_that_exists_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"--out: '.*{name}' exists"):
        converted(tmp_path, [row(0), row(1)], val_share=0.5)
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.glob("*.parquet*"))) == 1


def test_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--val-share: found 1, expected"):
        converted(tmp_path, [row(0)], val_share=1.0)
    with pytest.raises(ConfigError, match="--seed: found -1, expected at least 0"):
        converted(tmp_path, [row(0)], seed=-1)


def test_the_tool_prints_the_counts(tmp_path: Path) -> None:
    file = write(tmp_path, [row(0), row(1, **CUT_OFF), row(2, **EMPTY)])
    command = [sys.executable, str(TOOL), "--solutions", str(file), "--truncated", "drop"]
    command += ["--out", str(tmp_path / "sft.parquet")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = {
        cells[1].strip(): cells[2].strip()
        for line in ran.stdout.splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert counts == {
        "answers read": "3", "empty, dropped": "1", "cut off, dropped": "1",
        "written to train on": "1", "their response tokens": "2",
    }  # fmt: skip
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists; name another" in again.stderr
