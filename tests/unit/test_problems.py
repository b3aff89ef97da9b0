from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.parquet import data_sha256
from osft_mcore.data.problems import Problems, load_problems
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import DataError

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
NUM_ROWS = {
    "aime": 30,
    "aime25": 30,
    "amc": 83,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 675,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, TinyModel())
    return load_tokenizer(folder, None)


def problem(text: Any = "1+2=?", truth: Any = "3", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return {
        "prompt": messages,
        "data_source": "sums",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        **columns,
    }


Load = Callable[..., Problems]


@pytest.fixture
def load(tokenizer: ChatTokenizer, tmp_path: Path) -> Load:
    def load_rows(rows: list[dict[str, Any]], **options: Any) -> Problems:
        file = tmp_path / "problems.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        return load_file(file, tokenizer, **options)

    return load_rows


def load_file(file: Path, tokenizer: ChatTokenizer, **options: Any) -> Problems:
    defaults = {
        "prompt_key": "prompt",
        "system_prompt": "",
        "prompt_suffix": "",
        "max_prompt_tokens": 10_000,
        "option": "data.train",
    }
    return load_problems(file, tokenizer, **(defaults | options))


@pytest.mark.parametrize("name", NUM_ROWS)
def test_benchmark_files_load_whole(name: str, tokenizer: ChatTokenizer) -> None:
    file = BENCHMARKS / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"no benchmark file {name}.parquet beside the repository")
    problems = load_file(file, tokenizer, option="evaluation.files")
    raw = pq.read_table(file, columns=["prompt", "reward_model"]).to_pylist()
    assert len(problems.prompts) == len(raw) == NUM_ROWS[name]
    assert problems.num_dropped_overlong == 0
    assert len({prompt.prompt_id for prompt in problems.prompts}) == NUM_ROWS[name]
    for prompt, row in zip(problems.prompts, raw, strict=True):
        assert prompt.text == f"<bos>{row['prompt'][0]['content']}\n"
        assert prompt.ground_truth == row["reward_model"]["ground_truth"]
        assert prompt.data_source == name
        assert tokenizer.decode(prompt.token_ids) == prompt.text.removeprefix("<bos>")


def test_overlong_prompts_are_dropped_counted_and_rows_keep_their_number(load: Load) -> None:
    problems = load(
        [problem("1+2=?", id=None), problem("1" * 50), problem("3+4=?", id="third")],
        max_prompt_tokens=7,
    )
    assert problems.num_dropped_overlong == 1
    assert [(p.row, p.prompt_id) for p in problems.prompts] == [(0, "sums/0"), (2, "third")]
    assert len(problems.prompts[0].token_ids) == 7


def test_system_prompt_and_suffix(load: Load) -> None:
    given = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [problem(given), problem("1+2=?")]
    texts = [p.text for p in load(rows, system_prompt="new", prompt_suffix=" go").prompts]
    assert texts == ["<bos>new\na\nb\nc go\n", "<bos>new\n1+2=? go\n"]
    assert load(rows).prompts[0].text == "<bos>old\na\nb\nc\n"


def test_a_plain_text_column_under_another_name(load: Load) -> None:
    rows = [problem() | {"question": "5+5=?"}]
    assert load(rows, prompt_key="question").prompts[0].text == "<bos>5+5=?\n"


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (7, "7"),
        (0, "0"),
        (2.5, "2.5"),
        ("x", "x"),
        (["1", "x"], ("1", "x")),
        ([7, 8], ("7", "8")),
        ([2.5], "2.5"),
    ],
)
def test_ground_truth_becomes_text(load: Load, truth: Any, expected: str) -> None:
    assert load([problem(truth=truth)]).prompts[0].ground_truth == expected


def test_ids_that_repeat_are_replaced_by_rows(load: Load) -> None:
    prompts = load([problem(id="a"), problem(id="a"), problem(id="b")]).prompts
    assert [p.prompt_id for p in prompts] == ["sums/0", "sums/1", "sums/2"]


def test_limit_reads_the_first_rows(load: Load) -> None:
    rows = [problem(f"{i}+1=?") for i in range(5)] + [problem(truth=None)]
    assert [p.row for p in load(rows, limit=3).prompts] == [0, 1, 2]


def test_bad_rows_are_reported_together(load: Load) -> None:
    user = {"role": "user", "content": "x"}
    rows = [
        problem(),
        problem("  "),
        problem([]),
        problem(truth=None),
        problem(truth=" "),
        problem([user, {"role": "assistant", "content": "y"}]),
        problem([{"role": "user", "content": None}]),
        problem() | {"data_source": None},
        problem() | {"reward_model": None},
    ]
    with pytest.raises(DataError) as caught:
        load(rows)
    message = str(caught.value)
    assert message.startswith("data.train: ")
    assert "problems.parquet: 8 of 9 rows cannot be used: " in message
    for part in (
        "row 1: the prompt is empty",
        "row 2: no prompt",
        "row 3: no reward_model.ground_truth",
        "row 4: no reward_model.ground_truth",
        "row 5: the last prompt message has role 'assistant'",
        "and 3 more",
    ):
        assert part in message
    assert "row 6" not in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x", "answer": "y"}], r"no column 'prompt', 'data_source', 'reward_model'"),
        ([{"question": "x", "answer": "y"}], r"the file has question, answer"),
        ([problem() | {"prompt": 3}], r"column 'prompt' has type int64.*data\.prompt_key"),
        (
            [problem() | {"prompt": [{"text": "x"}]}],
            r"expected text or a list of \{role, content\}",
        ),
        ([problem() | {"reward_model": "3"}], r"'reward_model' has type string.*ground_truth"),
        ([problem() | {"reward_model": {"gt": "3"}}], r"expected a struct with ground_truth"),
        ([problem() | {"data_source": 3}], r"column 'data_source' has type int64"),
        ([problem(truth=[["1"], ["2"]])], r"row 0: reward_model\.ground_truth is a list"),
        ([problem(truth=["1", " "])], r"row 0: no reward_model\.ground_truth"),
        ([problem(truth=["1", None])], r"row 0: no reward_model\.ground_truth"),
        ([problem(truth=["1"]), problem(truth=[])], r"row 1: no reward_model\.ground_truth"),
        ([problem(truth=True)], r"row 0: reward_model\.ground_truth is a bool"),
        ([problem(truth=float("nan"))], r"row 0: no reward_model\.ground_truth"),
    ],
)
def test_files_without_the_needed_columns(
    load: Load, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=r"^evaluation\.files: .*problems\.parquet: ") as caught:
        load(rows, option="evaluation.files")
    assert caught.match(message)


def test_a_file_without_rows(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist([problem()]).slice(0, 0), file)
    with pytest.raises(DataError, match=r"data\.train: .*empty\.parquet: the file has no rows"):
        load_file(file, tokenizer)


def test_all_prompts_over_the_limit(load: Load) -> None:
    with pytest.raises(DataError, match=r"all 2 .*rollout\.max_prompt_tokens = 3.* has 5 tokens"):
        load([problem("123"), problem("1234")], max_prompt_tokens=3)


def test_files_that_are_not_parquet(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("prompt,answer\n1,2\n")
    with pytest.raises(DataError, match=r"data\.train: .*not a readable parquet file"):
        load_file(tmp_path / "text.parquet", tokenizer)
    with pytest.raises(DataError, match=r"data\.train: .*absent\.parquet: no such file"):
        load_file(tmp_path / "absent.parquet", tokenizer)
    with pytest.raises(DataError, match=r"data\.train: .*not a readable parquet file"):
        load_file(tmp_path, tokenizer)


def test_texts_that_are_not_utf8(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    damaged = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.Table.from_pylist([problem()])
    for name in ("prompt", "data_source"):
        place = table.schema.get_field_index(name)
        pq.write_table(table.set_column(place, name, damaged), tmp_path / "damaged.parquet")
        with pytest.raises(DataError, match=r"damaged\.parquet: its values are damaged.*UTF-?8"):
            load_file(tmp_path / "damaged.parquet", tokenizer)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert data_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")
