from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osft_mcore.config.schema import DataConfig, ModelConfig, RunConfig
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.sft import SftData, load_examples
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.train.inputs import load_sft_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, TinyModel())
    return load_tokenizer(folder, None)


Load = Callable[..., SftData]


@pytest.fixture
def load(tokenizer: ChatTokenizer, tmp_path: Path) -> Load:
    def load_rows(rows: list[dict[str, Any]], **options: Any) -> SftData:
        file = tmp_path / "sft.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        defaults = {
            "prompt_key": "prompt",
            "response_key": "response",
            "system_prompt": "",
            "prompt_suffix": "",
            "chat_template": None,
            "max_tokens": 1000,
            "vocab": 67,
        }
        return load_examples(file, tokenizer, **(defaults | options))

    return load_rows


def test_text_and_message_prompts_give_the_same_example(
    load: Load, tokenizer: ChatTokenizer
) -> None:
    text = load([{"prompt": "1+2=?", "response": "3"}], prompt_suffix=" go")
    turns = [{"role": "user", "content": "1+2=?"}]
    messages = load([{"prompt": turns, "response": "3"}], prompt_suffix=" go")
    assert text.examples == messages.examples
    (example,) = text.examples
    assert tokenizer.decode(example.prompt_token_ids) == "1+2=? go\n"
    assert tokenizer.decode(example.response_token_ids) == "3"
    assert example.response_token_ids[-1] in tokenizer.eos_token_ids
    assert example.rollout_logprobs is None


def test_the_limit_is_on_prompt_and_response_together(load: Load) -> None:
    rows = [{"prompt": "12", "response": "345"}, {"prompt": "12", "response": "3456"}]
    data = load(rows, max_tokens=8)
    assert [example.num_tokens for example in data.examples] == [8]
    assert data.num_dropped_overlong == 1
    with pytest.raises(DataError, match=r"all 2 .*max_response_tokens = 7; the shortest has 8"):
        load(rows, max_tokens=7)


def test_an_example_knows_its_row_in_the_file(load: Load) -> None:
    rows = [{"prompt": "12", "response": answer} for answer in ("3456", "345", "3456", "34")]
    assert [example.row for example in load(rows, max_tokens=8).examples] == [1, 3]


def test_bad_rows_are_reported_together(load: Load) -> None:
    rows = [
        {"prompt": "1", "response": "2"},
        {"prompt": "1", "response": None},
        {"prompt": "", "response": "2"},
        {"prompt": "1", "response": "2<eos>3"},
    ]
    with pytest.raises(DataError, match=r"data\.train: .*3 of 4 rows cannot be used") as caught:
        load(rows)
    for part in ("row 1: no response", "row 2: no prompt", "row 3: an end-of-answer token"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "answer": "2"}], "no column 'response'; the file has prompt, answer"),
        ([{"prompt": "1", "response": 2}], "'response' has type int64; expected text"),
        ([{"prompt": 1, "response": "2"}], "'prompt' has type int64; expected text or a list"),
    ],
)
def test_files_without_the_needed_columns(
    load: Load, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(rows)


def test_columns_under_other_names(load: Load) -> None:
    data = load([{"q": "1", "a": "2"}], prompt_key="q", response_key="a")
    assert len(data.examples) == 1


IDS = {"prompt_key": "p", "response_key": "r", "vocab": 20}


def test_token_ids_are_taken_as_they_are(load: Load, tokenizer: ChatTokenizer) -> None:
    end = tokenizer.response_eos_id
    rows = [{"p": [5, 6], "r": [7, 8]}, {"p": [5], "r": [7, end]}]
    examples = load(rows, **IDS).examples
    found = [(example.prompt_token_ids, example.response_token_ids) for example in examples]
    assert found == [((5, 6), (7, 8)), ((5,), (7, end))]
    # A text prompt may stand beside them.
    (example,) = load([{"p": "1+2=?", "r": [7, 8]}], prompt_suffix=" go", **IDS).examples
    assert tokenizer.decode(example.prompt_token_ids) == "1+2=? go\n"
    assert example.response_token_ids == (7, 8)


def test_token_ids_that_the_model_does_not_have(load: Load, tokenizer: ChatTokenizer) -> None:
    end = tokenizer.response_eos_id
    rows = [
        {"p": [5], "r": [19]},
        {"p": [5], "r": [20]},
        {"p": [-1], "r": [5]},
        {"p": [5], "r": []},
        {"p": [], "r": [5]},
        {"p": [5], "r": [end, 5]},
        {"p": [5], "r": [None]},
    ]
    with pytest.raises(DataError, match=r"6 of 7 rows cannot be used") as caught:
        load(rows, **IDS)
    for part in (
        "row 1: token id 20, which the model does not have (vocab_size 20)", "row 2: token id -1",
        "row 3: no response", "row 4: no prompt", "row 5: an end-of-answer token", "and 1 more",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(DataError, match="row 1: token id None"):
        load([{"p": [5], "r": [5]}, {"p": [5], "r": [5, None]}], **IDS)


@pytest.mark.parametrize("option", ["system_prompt", "prompt_suffix", "chat_template"])
def test_what_prompts_are_rendered_with_is_refused_for_token_ids(option: str, load: Load) -> None:
    with pytest.raises(DataError, match=rf"'p' holds token ids, .* without data\.{option}; leave"):
        load([{"p": [5], "r": [5]}], **IDS, **{option: "x"})
    load([{"p": "1+2=?", "r": [5]}], **IDS, **{option: "x"})


def test_all_that_token_ids_are_not_rendered_with_is_named(load: Load) -> None:
    with pytest.raises(DataError, match=r"without data\.prompt_suffix and data\.chat_template; "):
        load([{"p": [5], "r": [5]}], **IDS, prompt_suffix=" go", chat_template="x.jinja")


def test_a_tokenizer_without_a_template_will_do_for_token_ids(tmp_path: Path) -> None:
    """Else the option that it does not use would be asked for, and then refused."""
    write_model_folder(tmp_path / "model", TinyModel())
    (tmp_path / "model" / "chat_template.jinja").unlink()
    file = tmp_path / "sft.parquet"
    pq.write_table(pa.Table.from_pylist([{"p": [5], "t": "1+2=?", "r": [5]}]), file)

    def tokenizer_for(prompt_key: str) -> ChatTokenizer:
        data = DataConfig(train=str(file), prompt_key=prompt_key, response_key="r")
        model = ModelConfig(path=str(tmp_path / "model"))
        return load_sft_tokenizer(RunConfig(model=model, data=data))

    assert tokenizer_for("p").decode([5]) != ""
    for prompt_key in ("t", "absent"):
        with pytest.raises(ConfigError, match=r"data\.chat_template: .* has no chat template"):
            tokenizer_for(prompt_key)
