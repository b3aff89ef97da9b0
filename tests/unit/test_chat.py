import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.errors import ConfigError
from osft_mcore.records import Message

QUESTION = [Message(role="user", content="12+7=?")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", TinyModel())
    return tmp_path / "model"


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_prompt_is_rendered_without_extra_special_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, None)
    text, token_ids = tokenizer.render(QUESTION)
    assert text == "<bos>12+7=?\n"
    hf = tokenizer.hf_tokenizer
    assert hf.convert_ids_to_tokens(list(token_ids)) == ["<bos>", *"12+7=?", "Ċ"]


def test_an_answer_is_closed_with_eos_once(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, None)
    closed = tokenizer.encode_response("19")
    assert closed[-1] in tokenizer.eos_token_ids
    assert len(closed) == 3
    assert tokenizer.encode_response("19<eos>") == closed
    assert tokenizer.decode(closed) == "19"
    with pytest.raises(ValueError, match="inside the answer"):
        tokenizer.encode_response("1<eos>9")


def test_eos_of_the_generation_config_wins_and_may_be_a_list(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[0, 2])
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.encode_response("1")[-1] == 2

    edit_json(folder / "generation_config.json", eos_token_id=[5, 0])
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.eos_token_ids == {0, 5}
    assert tokenizer.encode_response("1")[-1] == 5


def test_without_a_generation_config_the_tokenizer_names_eos(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder, None).eos_token_ids == {2}


def test_a_template_file_replaces_the_own_template(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text, _ = load_tokenizer(folder, str(template)).render(QUESTION)
    assert text == "user: 12+7=?\nassistant: "


def remove_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    edit_json(folder / "generation_config.json", eos_token_id=None)


def remove_eos_and_model_type(folder: Path) -> None:
    remove_eos(folder)
    edit_json(folder / "config.json", model_type="llama")


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def keep_only_config(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_only_config, r"model\.path: no tokenizer in .*tokenizer\.json"),
        (remove_eos, r"model\.path: .*end-of-text token"),
        (remove_eos_and_model_type, r"model\.path: .*end-of-text token"),
        (remove_template, r"data\.chat_template: .*has no chat template"),
        (shutil.rmtree, r"model\.path: .*is not a folder"),
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"model": '),
            r"model\.path: the tokenizer in .*cannot be loaded",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            r"model\.path: the tokenizer in .*cannot be loaded",
        ),
        (
            lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[2, 999]),
            r"model\.path: generation_config\.json .*token id 999.*vocab_size 259",
        ),
        (
            lambda folder: (folder / "generation_config.json").write_text("{"),
            r"model\.path: .*generation_config\.json is not valid JSON",
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
            r"model\.path: the chat template .*does not work",
        ),
    ],
)
def test_a_model_folder_that_cannot_work(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(folder, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "cannot be read"),
        ("{% for %}", "does not work: chat template: Expected an expression"),
        ("{{ messages[0].text.strip() }}", "does not work: chat template: 'dict object'"),
        ("{{ raise_exception('system message needed') }}", "system message needed"),
        ("{{ bos_token }}", "leaves out the user's message"),
    ],
)
def test_a_template_file_that_cannot_work(
    folder: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    file = tmp_path / "chat.jinja"
    if template is not None:
        file.write_text(template)
    with pytest.raises(ConfigError, match=r"data\.chat_template: ") as caught:
        load_tokenizer(folder, str(file))
    assert message in str(caught.value)
