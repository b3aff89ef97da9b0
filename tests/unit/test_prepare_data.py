"""tools/prepare_data.py: every data set in the hub's layout, what is left out, what is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_preparation.catalog import DATA_SETS
from data_preparation.command import Request, prepare
from data_preparation.convert import Options

from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.parquet import data_sha256
from osft_mcore.data.problems import load_problems
from osft_mcore.data.sft import load_examples
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.log.console import Console

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
LOCAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SUFFIX = r" Please reason step by step, and put your final answer within \boxed{}."
BENCHMARKS = ("math500", "amc23", "amc", "aime", "aime25", "minerva", "olympiadbench")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, TinyModel())
    return load_tokenizer(folder, None)


def request(*names: str, local: Path | None, out: Path, **changes: Any) -> Request:
    options = {"system": "", "suffix": "", "validation_rows": 2, "seed": 1}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    asked = Request(
        names=names, local=local, revision=None, out=out, force=False, options=Options(**options)
    )
    return replace(asked, **changes)


def run(*names: str, local: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Prepare, and return the report of the first."""
    prepare(request(*names, local=local, out=out, **changes), Console(enabled=False), None)
    report: dict[str, Any] = json.loads((out / f"{names[0]}.json").read_text())
    return report


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def brief(row: dict[str, Any]) -> tuple[Any, ...]:
    turns = [(turn["role"], turn["content"]) for turn in row["prompt"]]
    return turns, row["reward_model"]["ground_truth"]


def user(text: str) -> list[tuple[str, str]]:
    return [("user", text)]


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


MATH500 = {"problem": "1+2?", "solution": r"It is \boxed{3}.", "answer": "3",
           "subject": "Algebra", "level": 1, "unique_id": "test/1.json"}  # fmt: skip
THOUGHTS = {"difficulty": 7, "source": "x", "domain": "math"}


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# Of each data set: a row in the hub's columns, and what becomes of it.
HUB_ROWS: dict[str, tuple[dict[str, Any], tuple[Any, ...], str | None]] = {
    "math500": (MATH500, (user("1+2?"), "3"), "test/1.json"),
    "amc23": ({"id": 0, "question": "q", "answer": 27.0, "url": "u"}, (user("q"), "27"), "0"),
    "amc": ({"id": 4, "problem": "q", "answer": 142.0, "url": "u"}, (user("q"), "142"), "4"),
    "aime": (
        {"id": 60, "problem": "q", "solution": "s", "answer": "025", "url": "u", "year": "2024"},
        (user("q"), "25"),
        "60",
    ),
    "aime25": ({"problem": "q", "answer": "70", "id": "0"}, (user("q"), "70"), "0"),
    "minerva": ({"question": "q", "answer": "1.6"}, (user("q"), "1.6"), None),
    "olympiadbench": (
        {"id": 1606, "question": "q", "final_answer": ["2"], "solution": ["s"], "context": None},
        (user("q"), "2"),
        "1606",
    ),
    "deepscaler": (
        {"problem": "q", "answer": r"-\frac{2}{3}", "solution": ""},
        (user("q"), r"-\frac{2}{3}"),
        None,
    ),
    "openthoughts_math": (
        {**THOUGHTS, "conversations": said("q", r"<think>\boxed{1}</think> \boxed{\frac{1}{2}}.")},
        (user("q"), r"\frac{1}{2}"),
        None,
    ),
    "dapo_math_17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": "Solve it.\n\nq", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        (user("Solve it.\n\nq"), "34"),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_row_of_the_hub_becomes_a_problem(
    name: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    row, expected, given_id = HUB_ROWS[name]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in.parquet")
    report = run(name, local=tmp_path / "in.parquet", out=tmp_path / "data")
    output = tmp_path / "data" / f"{name}.parquet"
    [found] = rows_of(output)
    assert brief(found) == expected
    assert found["data_source"] == DATA_SETS[name].data_source
    assert (found["ability"], found["reward_model"]["style"]) == ("math", "rule")
    assert found["id"] == given_id if given_id else len(found["id"]) == 16
    assert found["extra_info"]["index"] == 0
    assert report["outputs"][f"{name}.parquet"]["sha256"] == data_sha256(output)
    [split] = report["splits"].values()
    assert split["source"]["files"][0]["sha256"] == data_sha256(tmp_path / "in.parquet")
    [prompt] = load(output, tokenizer)
    assert (prompt.data_source, prompt.ground_truth) == (found["data_source"], expected[1])


def load(file: Path, tokenizer: ChatTokenizer) -> tuple[Any, ...]:
    return load_problems(
        file, tokenizer, prompt_key="prompt", system_prompt="", prompt_suffix="",
        max_prompt_tokens=100_000, option="evaluation.files",
    ).prompts  # fmt: skip


def load_sft(file: Path, tokenizer: ChatTokenizer) -> tuple[Any, ...]:
    return load_examples(
        file, tokenizer, prompt_key="prompt", response_key="response", system_prompt="",
        prompt_suffix="", max_tokens=100_000, vocab=20, chat_template=None,
    ).examples  # fmt: skip


def test_every_data_set_is_tried_here() -> None:
    assert {*HUB_ROWS, "gsm8k", "tldr"} == set(DATA_SETS)


def gsm8k(folder: Path, num_train: int = 6) -> Path:
    rows = [
        {"question": f"{i}+1?", "answer": f"<<{i}+1>>\n#### 1,{i:03}"} for i in range(num_train)
    ]
    for split, part in (("train", rows), ("test", [{"question": "9?", "answer": "x\n#### -9"}])):
        (folder / "main").mkdir(parents=True, exist_ok=True)
        file = folder / "main" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(part), file)
    return folder


def test_gsm8k_is_cut_in_three(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    source, out = gsm8k(tmp_path / "gsm8k"), tmp_path / "data"
    report = run("gsm8k", local=source, out=out)
    parts = {
        part: rows_of(out / f"gsm8k_{part}.parquet") for part in ("train", "validation", "test")
    }
    assert {part: len(rows) for part, rows in parts.items()} == {
        "train": 4, "validation": 2, "test": 1,
    }  # fmt: skip
    assert brief(parts["test"][0]) == (user("9?"), "-9")
    # Both in the order of the source, and together all of it.
    drawn = [row["extra_info"]["index"] for row in parts["validation"]]
    rest = [row["extra_info"]["index"] for row in parts["train"]]
    assert (drawn, rest) == (sorted(drawn), sorted(rest))
    assert sorted(drawn + rest) == list(range(6))
    row = parts["train"][0]
    index = row["extra_info"]["index"]
    assert brief(row) == (user(f"{index}+1?"), f"1{index:03}")
    assert row["response"] == f"<<{index}+1>>\n#### 1,{index:03}"
    assert report["splits"]["train"]["rows_read"] == 6
    assert len(load_sft(out / "gsm8k_train.parquet", tokenizer)) == 4
    draws = set()
    for seed in range(1, 5):
        run("gsm8k", local=source, out=tmp_path / str(seed), seed=seed)
        rows = rows_of(tmp_path / str(seed) / "gsm8k_validation.parquet")
        draws.add(tuple(row["extra_info"]["index"] for row in rows))
    assert tuple(drawn) in draws
    assert len(draws) > 1


def test_no_validation_rows_make_no_file(tmp_path: Path) -> None:
    run("gsm8k", local=gsm8k(tmp_path / "in"), out=tmp_path / "data", validation_rows=0)
    assert len(rows_of(tmp_path / "data" / "gsm8k_train.parquet")) == 6
    assert not (tmp_path / "data" / "gsm8k_validation.parquet").exists()


def test_tldr_has_prompts_and_summaries(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        turns = [{"role": "user", "content": f"POST {split} TL;DR:"},
                 {"role": "assistant", "content": " short"}]  # fmt: skip
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", [{"prompt": "POST", "messages": turns}])
    run("tldr", local=tmp_path / "in", out=tmp_path / "data")
    for split, name in (("train", "tldr"), ("validation", "tldr_validation")):
        [row] = rows_of(tmp_path / "data" / f"{name}.parquet")
        assert brief(row) == (user(f"POST {split} TL;DR:"), " short")
        assert (row["response"], row["data_source"]) == (" short", "tldr")
        assert (row["ability"], row["reward_model"]["style"]) == ("summarization", "model")
        assert len(load(tmp_path / "data" / f"{name}.parquet", tokenizer)) == 1


def test_all_formats_give_the_same(tmp_path: Path) -> None:
    rows = [{"problem": f'{i}, "two"\nlines?', "answer": str(i)} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    write_jsonl(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.json").write_text(json.dumps(rows))
    cells = [f'"{r["problem"]}",{r["answer"]}'.replace('"two"', '""two""') for r in rows]
    (tmp_path / "in.csv").write_text("problem,answer\n" + "\n".join(cells) + "\n")
    digests = set()
    for suffix in ("parquet", "jsonl", "json", "csv"):
        run("deepscaler", local=tmp_path / f"in.{suffix}", out=tmp_path / suffix)
        digests.add((tmp_path / suffix / "deepscaler.parquet").read_bytes())
    assert len(digests) == 1
    assert [brief(row)[0] for row in rows_of(tmp_path / "csv" / "deepscaler.parquet")] == [
        user(row["problem"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "no rows in {}"),
        ("a.json", "[]", "no rows in {}"),
        ("a.csv", "", "no rows in {}"),
        (
            "a.jsonl",
            '{"cut\nx\n[]\n{}\n',
            "no row can be read in {}; of the first: 2 not JSON, 1 not a JSON object, "
            "1 without columns",
        ),
        ("a.json", "[1]", "no row can be read in {}; of the first: 1 not a JSON object"),
    ],
)
def test_a_file_without_a_readable_row(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        run("math500", local=tmp_path / name, out=tmp_path / "data")
    assert caught.value.problems == (f"--from: math500: {expected.format(tmp_path / name)}",)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [MATH500, {**MATH500, "problem": "2+2?"}])
    for folder in ("one", "two"):
        run("math500", local=file, out=tmp_path / folder)
    for name in ("math500.parquet", "math500.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "in.jsonl",
        [
            {**THOUGHTS, "conversations": said("q1", r"\boxed{1}")},
            {**THOUGHTS, "conversations": said("q1", r"no: \boxed{2}")},
            {**THOUGHTS, "conversations": said("q1", r"again \boxed{1}")},
            {**THOUGHTS, "conversations": said("q2", "one")},
            {**THOUGHTS, "conversations": said("q3", r"\boxed{ }")},
            {**THOUGHTS, "conversations": said(" ", r"\boxed{1}")},
            {**THOUGHTS, "conversations": said("q4", "")},
            {**THOUGHTS, "conversations": None},
            {**THOUGHTS, "conversations": 5},
            {**THOUGHTS, "conversations": [{"from": "human"}]},
            {**THOUGHTS, "domain": "code", "conversations": said("q5", r"\boxed{1}")},
            {**THOUGHTS, "conversations": said("q6 \ud800", r"\boxed{1}")},
            {**THOUGHTS, "source": "\udfff"},
            [],
        ],
    )
    with file.open("ab") as lines:
        lines.write(b'{"cut off\n\xff\xfe\n')
    report = run("openthoughts_math", local=file, out=tmp_path / "data")
    dropped = report["splits"]["train"]["dropped"]
    assert dropped == {
        "a turn without role or text": 1,
        "domain is not math": 1,
        "no answer": 1,
        "no boxed answer": 2,
        "no prompt": 1,
        "not JSON": 2,
        "not Unicode": 2,
        "not a JSON object": 1,
        "the prompt again": 2,
        "the prompt is empty": 1,
        "the prompt is neither text nor turns": 1,
    }
    assert report["splits"]["train"]["rows_read"] == 16 == sum(dropped.values()) + 1
    assert report["splits"]["train"]["duplicates"] == 2
    assert report["splits"]["train"]["duplicates_with_another_answer"] == 1
    assert report["splits"]["train"]["columns_left_out"] == ["difficulty", "source"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no answer"),
        ("  ", "no answer"),
        (float("nan"), "no answer"),
        ([], "no answer"),
        (True, "the answer is neither text nor a number"),
        ({"a": 1}, "no answer"),
        ([[1]], "the answer is neither text nor a number"),
    ],
)
def test_an_answer_that_is_none_is_counted(answer: Any, reason: str, tmp_path: Path) -> None:
    rows = [{"problem": question, "answer": answer} for question in "ab"]
    kind = pa.string() if answer is None else pa.array([answer]).type
    schema = pa.schema({"problem": pa.string(), "answer": kind})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "in.parquet")
    message = rf"deepscaler: split train: none of 2 rows is left \(2 {reason}\)"
    with pytest.raises(DataError, match=message):
        run("deepscaler", local=tmp_path / "in.parquet", out=tmp_path / "data")


@pytest.mark.parametrize("answer", ["18", "####", "####  \n5"])
def test_gsm8k_needs_its_hashes(answer: str, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": answer}, {"question": "b", "answer": "#### 3\n#### $1,8"}]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", rows)
    report = run("gsm8k", local=tmp_path / "in", out=tmp_path / "data", validation_rows=0)
    assert report["splits"]["test"]["dropped"] == {"no answer after ####": 1}
    assert brief(rows_of(tmp_path / "data" / "gsm8k_test.parquet")[0]) == (user("b"), "$18")


def test_cells_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("problem,answer\nq,1\nr\n\ns,2,3\n")
    report = run("deepscaler", local=file, out=tmp_path / "data")
    assert report["splits"]["train"]["dropped"] == {"not as many cells as the header": 2}
    assert report["splits"]["train"]["rows_read"] == 3


def test_ids_that_repeat_are_made_of_the_questions(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{**MATH500, "problem": p} for p in "ab"])
    run("math500", local=file, out=tmp_path / "data", suffix=" S")
    run("math500", local=file, out=tmp_path / "plain")
    ids = [row["id"] for row in rows_of(tmp_path / "data" / "math500.parquet")]
    assert len(set(ids)) == 2
    # They are of the question, whatever is put around it.
    assert ids == [row["id"] for row in rows_of(tmp_path / "plain" / "math500.parquet")]


def test_system_and_suffix(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [MATH500])
    report = run("math500", local=file, out=tmp_path / "data", system="Think.", suffix=SUFFIX)
    [row] = rows_of(tmp_path / "data" / "math500.parquet")
    assert brief(row)[0] == [("system", "Think."), ("user", "1+2?" + SUFFIX)]
    assert report["options"]["suffix"] == SUFFIX


def test_a_folder_may_hold_several_data_sets_and_reports(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "math500.jsonl", [MATH500])
    write_jsonl(source / "deepscaler" / "part-1.jsonl", [{"problem": "b", "answer": "2"}])
    write_jsonl(source / "deepscaler" / "part-0.jsonl", [{"problem": "a", "answer": "1"}])
    report = run("deepscaler", "math500", local=source, out=tmp_path / "data")
    assert [brief(row)[1] for row in rows_of(tmp_path / "data" / "deepscaler.parquet")] == [
        "1",
        "2",
    ]
    names = [file["name"] for file in report["splits"]["train"]["source"]["files"]]
    assert names == ["deepscaler/part-0.jsonl", "deepscaler/part-1.jsonl"]
    # What was made may be read again, with the reports beside it.
    run("deepscaler", "math500", local=tmp_path / "data", out=tmp_path / "again")
    for name in ("deepscaler", "math500"):
        first, second = (rows_of(tmp_path / d / f"{name}.parquet") for d in ("data", "again"))
        assert [brief(row) for row in first] == [brief(row) for row in second]


def test_other_splits_are_left_out_and_named(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_jsonl(source / "data" / "train-0.jsonl", [{"problem": "a", "answer": "1"}])
    write_jsonl(source / "data" / "test-0.jsonl", [{"problem": "b", "answer": "2"}])
    report = run("deepscaler", local=source, out=tmp_path / "data")
    assert report["splits"]["train"]["rows_read"] == 1
    assert report["splits"]["train"]["source"]["files_left_out"] == ["data/test-0.jsonl"]


class HubRows:
    """Rows with what tools/data_preparation/hub.py asks of a datasets.Dataset."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0])

    def select_columns(self, column_names: list[str]) -> "HubRows":
        return HubRows([{name: row[name] for name in column_names} for row in self.rows])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_rows_from_the_hub_are_those_of_a_copy(tmp_path: Path) -> None:
    asked = []

    def fetch(data_set: Any, split: str, revision: str | None) -> tuple[str, HubRows]:
        asked.append((data_set.hub, data_set.hub_config, split, revision))
        return "c0ffee", HubRows(pq.read_table(source / "main" / file_of(split)).to_pylist())

    def file_of(split: str) -> str:
        return f"{split}-00000-of-00001.parquet"

    source = gsm8k(tmp_path / "in")
    out = tmp_path / "hub"
    prepare(request("gsm8k", local=None, out=out, revision="v1"), Console(enabled=False), fetch)
    assert asked == [("openai/gsm8k", "main", split, "v1") for split in ("train", "test")]
    report = json.loads((out / "gsm8k.json").read_text())
    assert report["splits"]["train"]["source"] == {
        "hub": "openai/gsm8k", "config": "main", "revision": "c0ffee",
    }  # fmt: skip
    copy = run("gsm8k", local=source, out=tmp_path / "copy")
    assert copy["outputs"] == report["outputs"]

    def refuse(data_set: Any, split: str, revision: str | None) -> tuple[str, HubRows]:
        raise DataError(f"{data_set.hub} is away")

    with pytest.raises(ConfigError, match="openai/gsm8k is away"):
        prepare(request("gsm8k", local=None, out=tmp_path / "no"), Console(enabled=False), refuse)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "amc.json").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        prepare(
            request("math50", "zebra", "amc", local=None, out=tmp_path, validation_rows=-1),
            Console(enabled=False),
            None,
        )
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "unknown data set 'math50'",
        "unknown data set 'zebra'",
        "--validation-rows: found -1, expected at least 0",
        "the package datasets, which reads the public hub, is not installed",
        f"--out: {tmp_path / 'amc.json'} exists",
    ]
    text = str(caught.value)
    for part in ("did you mean math500?", "known: math500, amc23", "pip install -e '.[data]'"):
        assert part in text
    with pytest.raises(ConfigError) as caught:
        run("amc", local=tmp_path / "nowhere", out=tmp_path / "amc.json", revision="x")
    for part in ("no such file or folder", "--revision", "is a file, expected a folder"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="--revision: is of one data set"):
        prepare(
            request("amc", "aime", local=None, out=tmp_path / "data", revision="x"),
            Console(enabled=False),
            None,
        )


def test_sources_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "data"
    write_jsonl(source / "math500.jsonl", [{"text": "q", "answer": "1"}])
    write_jsonl(source / "openthoughts_math.jsonl", [{"conversations": said("q", "a")}])
    write_jsonl(source / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
    (source / "amc.parquet").write_text("no")
    (source / "aime.json").write_text("{}")
    (source / "minerva.csv").write_text("question,answer\n")
    (source / "minerva.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        run(
            "math500", "openthoughts_math", "gsm8k", "amc", "aime", "minerva", "tldr",
            local=source, out=out,
        )  # fmt: skip
    text = str(caught.value)
    for part in (
        "math500: split test: no column for the question (problem or question or Problem); found "
        "text, answer",
        "openthoughts_math: split train: no column for the kind of question (domain); found conv",
        "gsm8k: no file for split test; found gsm8k/train.jsonl",
        "amc.parquet cannot be read",
        "aime.json cannot be read: it holds a dict, expected a list of rows",
        "minerva: " + str(source) + " has minerva.json and minerva.csv; name one of them",
        "has neither a folder tldr nor a file tldr.*",
    ):
        assert part in text
    assert not out.exists()
    for file, message in (
        (source / "x.txt", "expected a file .parquet, .jsonl, .json, .csv or a folder"),
        (tmp_path / "empty", "has no file .parquet, .jsonl, .json, .csv"),
    ):
        file.mkdir() if file.suffix == "" else file.write_text("")
        with pytest.raises(ConfigError, match=message):
            run("math500", local=file, out=out)
    with pytest.raises(ConfigError, match="is one file, for 2 data sets"):
        run("math500", "amc", local=source / "amc.parquet", out=out)


def test_lists_of_accepted_answers_stay_lists(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": question}], "data_source": "amc",
         "reward_model": {"ground_truth": golds}}
        for question, golds in (("q", ["1", "one"]), ("r", ["2"]), ("s", "3"))
    ]  # fmt: skip
    write_jsonl(tmp_path / "amc.jsonl", rows)
    run("amc", local=tmp_path / "amc.jsonl", out=tmp_path / "data")
    prompts = load(tmp_path / "data" / "amc.parquet", tokenizer)
    assert [prompt.ground_truth for prompt in prompts] == [("1", "one"), "2", "3"]


def test_nothing_left_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "data"
    write_jsonl(source / "math500.jsonl", [MATH500])
    foreign = {"prompt": [{"role": "user", "content": "q"}], "data_source": "aime",
               "reward_model": {"ground_truth": "1"}}  # fmt: skip
    write_jsonl(source / "amc.jsonl", [foreign])
    with pytest.raises(DataError, match=r"amc: .*none of 1 rows .*\(1 data_source is not amc\)"):
        run("math500", "amc", local=source, out=out)
    with pytest.raises(DataError, match="--validation-rows: 6 of 6 rows would leave nothing"):
        run("gsm8k", local=gsm8k(tmp_path / "gsm8k"), out=out, validation_rows=6)
    assert not out.exists()


def test_what_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "in.jsonl", [MATH500]), tmp_path / "data"
    out.mkdir()
    (out / "math500.parquet").write_text("mine")
    with pytest.raises(ConfigError, match=r"math500.parquet exists; .*--force"):
        run("math500", local=file, out=out)
    assert [path.name for path in out.iterdir()] == ["math500.parquet"]
    assert (out / "math500.parquet").read_text() == "mine"
    run("math500", local=file, out=out, force=True)
    assert len(rows_of(out / "math500.parquet")) == 1


def test_the_tool_prints_the_counts(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [MATH500, MATH500, {**MATH500, "problem": ""}])
    command = [sys.executable, str(TOOL), "math500", "--from", str(file)]
    command += ["--out", str(tmp_path / "data")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = {
        cells[1].strip(): cells[2].strip()
        for line in ran.stdout.splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert counts == {
        "test: rows read": "3", "dropped: no prompt": "1", "dropped: the prompt again": "1",
        "in math500.parquet": "1",
    }  # fmt: skip
    assert "test: 3 rows; as published it has 500" in ran.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("prepare_data: --out: ")


def test_the_missing_package_is_named(tmp_path: Path) -> None:
    hidden = (
        "import runpy, sys; sys.modules['datasets'] = None; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", hidden, str(TOOL), "math500", "--out", str(tmp_path / "data")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "pip install -e '.[data]', or name a local copy (--from)" in ran.stderr


@pytest.mark.skipif(not (LOCAL / "benchmarks").is_dir(), reason="needs the benchmark files")
@pytest.mark.parametrize("variant", ["benchmarks", "benchmarks_reasoning_suffix"])
def test_the_benchmarks_come_out_as_they_are(
    variant: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """The files with the suffix are those without, prepared with it."""
    suffix = "" if variant == "benchmarks" else SUFFIX
    names = [name for name in BENCHMARKS if (LOCAL / variant / f"{name}.parquet").is_file()]
    run(*names, local=LOCAL / "benchmarks", out=tmp_path, suffix=suffix)
    assert len(names) >= 6
    for name in names:
        prepared = rows_of(tmp_path / f"{name}.parquet")
        given = rows_of(LOCAL / variant / f"{name}.parquet")
        assert [brief(row) for row in prepared] == [brief(row) for row in given]
        loaded, expected = (
            load(folder / f"{name}.parquet", tokenizer) for folder in (tmp_path, LOCAL / variant)
        )
        assert [(p.text, p.ground_truth, p.data_source) for p in loaded] == [
            (p.text, p.ground_truth, p.data_source) for p in expected
        ]
        if "id" in given[0]:
            assert [row["id"] for row in prepared] == [row["id"] for row in given]
