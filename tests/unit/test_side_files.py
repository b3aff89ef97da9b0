"""What is carried along with weights, and what is not."""

import json
from pathlib import Path

import pytest
import torch

from osft_mcore.errors import WeightError
from osft_mcore.weights.side_files import config_bytes, read_side_files, side_files

SIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.txt",
    "README.md",
    "LICENSE.txt",
)
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "training_args.bin",
    "model.gguf",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "hf"
    for name in (*SIDE, *WEIGHTS, ".gitattributes", "manifest.json"):
        root.mkdir(exist_ok=True)
        (root / name).write_text(name)
    for name in ("additional_chat_templates/tools.jinja", ".git/config", "original/params.json"):
        (root / name).parent.mkdir()
        (root / name).write_text(name)
    (root / "config.json").write_text('{"dtype": "bfloat16", "vocab_size": 7}')
    return root


def test_everything_but_weights_goes_along(folder: Path) -> None:
    with (folder / "corpus.txt").open("wb") as file:
        file.truncate((128 << 20) + 1)
    found = side_files(folder)
    assert set(found.carried) == {*SIDE, "additional_chat_templates/tools.jinja"}
    assert found.left_out == {
        ".git": "a folder",
        ".gitattributes": "a hidden file",
        "corpus.txt": "larger than 128 MiB",
        "manifest.json": "of another folder",
        "original": "a folder",
    }
    contents = read_side_files(folder)
    assert contents.pop("config.json") == (folder / "config.json").read_bytes()
    assert contents == {name: Path(name).name.encode() for name in SIDE} | {
        "additional_chat_templates/tools.jinja": b"additional_chat_templates/tools.jinja"
    }


def test_a_derived_model_does_not_pass_for_its_base(folder: Path) -> None:
    found = read_side_files(folder, derived=True)
    assert "README.md" not in found
    assert "LICENSE.txt" not in found
    assert found["BASE_MODEL_README.md"] == b"README.md"
    assert found["BASE_MODEL_LICENSE.txt"] == b"LICENSE.txt"
    assert found["vocab.txt"] == b"vocab.txt"
    (folder / "BASE_MODEL_README.md").write_text("of the base model's base model")
    assert read_side_files(folder, derived=True)["BASE_MODEL_README.md"] == b"README.md"
    (folder / "README.md").unlink()
    assert read_side_files(folder, derived=True)["BASE_MODEL_README.md"].startswith(b"of the")


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "again.txt").symlink_to("vocab.txt")
    (folder / "gone.txt").symlink_to("missing.txt")
    (folder / "tokenizer.model").symlink_to("tokenizer.model")
    (folder / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    found = side_files(folder)
    assert found.left_out["notes.txt"] == f"a link out of the folder, to {secret}"
    assert "additional_chat_templates/x.jinja" in found.left_out
    assert found.left_out["gone.txt"] == "not a file"
    assert found.left_out["tokenizer.model"] == "a link that ends nowhere"
    assert read_side_files(folder)["again.txt"] == b"vocab.txt"
    assert b"password" not in b"".join(read_side_files(folder).values())
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path, target_is_directory=True)
    assert side_files(folder).carried == {}


def test_the_blobs_of_a_hub_cache_are_read(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name, blob in (("tokenizer.json", "blobs/a"), ("evil.json", "refs/b")):
        (cache / blob).parent.mkdir()
        (cache / blob).write_text(name)
        (snapshot / name).symlink_to(f"../../{blob}")
    assert set(side_files(snapshot).carried) == {"tokenizer.json"}
    assert set(side_files(snapshot).left_out) == {"evil.json"}
    elsewhere = cache / "models" / "0123"
    elsewhere.parent.mkdir()
    snapshot.rename(elsewhere)
    assert set(side_files(elsewhere).left_out) == {"evil.json", "tokenizer.json"}


def test_the_config_says_the_dtype_that_is_asked_for(folder: Path) -> None:
    path = folder / "config.json"
    assert config_bytes(folder, dtype=torch.bfloat16) == path.read_bytes(), "as it is"
    changed = json.loads(config_bytes(folder, dtype=torch.float32))
    assert changed == {"dtype": "float32", "vocab_size": 7}
    path.write_text('{"torch_dtype": "float16", "vocab_size": 7}')
    assert json.loads(config_bytes(folder, dtype=torch.float32)) == changed
    path.write_text('{"torch_dtype": "float32"}')
    assert config_bytes(folder, dtype=torch.float32) == path.read_bytes()
    for content in ("{", "[" * 200_000, "[]"):
        path.write_text(content)
        with pytest.raises(WeightError, match=r"not valid JSON|not a JSON object"):
            config_bytes(folder, dtype=torch.float32)
