"""Values that are no numbers are converted like others, and told."""

from pathlib import Path

import pytest
import torch
from models import save_random_model
from safetensors.torch import load_file
from test_convert import SINGLE, read_weights, rewrite, to_hf, to_mcore

from osft_mcore.log.console import Console

WARNING = "WARNING: written with values that are NaN or infinite: "
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
LOUD = Console(enabled=True)


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("WARNING")]


@pytest.mark.parametrize("target", ["safetensors", "torch_dist"])
def test_values_that_are_no_numbers_go_along_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen3")
    mcore = to_mcore(folder, tmp_path / "whole", tp=2, target=target, console=LOUD)
    to_hf(mcore, tmp_path / "whole_back", console=LOUD)
    assert warnings_of(capsys.readouterr().out) == []
    tensors = load_file(folder / SINGLE)
    tensors[NORM][-1] = float("nan")
    tensors[DOWN].view(-1)[-1] = float("-inf")
    rewrite(folder, **tensors)
    mcore = to_mcore(folder, tmp_path / "mcore", tp=2, target=target, console=LOUD)
    (line,) = warnings_of(capsys.readouterr().out)
    assert set(line.removeprefix(WARNING).split(", ")) == {NORM, DOWN}
    back = to_hf(mcore, tmp_path / "back", console=LOUD)
    assert warnings_of(capsys.readouterr().out) == [f"{WARNING}{DOWN}, {NORM}"]
    found = read_weights(back)
    assert all(torch.equal(found[name].isfinite(), tensors[name].isfinite()) for name in tensors)


def test_values_that_a_dtype_cannot_hold_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen3")
    # The largest of bf16 is 3.39e38.
    rewrite(folder, **{NORM: torch.full((64,), 3.4e38)})
    to_mcore(folder, tmp_path / "wide", console=LOUD)
    assert warnings_of(capsys.readouterr().out) == []
    narrow = to_mcore(folder, tmp_path / "narrow", dtype=torch.bfloat16, console=LOUD)
    assert warnings_of(capsys.readouterr().out) == [WARNING + NORM]
    assert read_weights(to_hf(narrow, tmp_path / "back"))[NORM].isinf().all()


def test_a_model_of_nothing_but_nan_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random_model(tmp_path / "hf", "llama")
    tensors = load_file(folder / SINGLE)
    rewrite(folder, **{name: tensor * torch.nan for name, tensor in tensors.items()})
    to_mcore(folder, tmp_path / "out", pp=2, console=Console(enabled=True))
    (line,) = warnings_of(capsys.readouterr().out)
    assert line.count("model.") == 8
    assert line.endswith(f" and {len(tensors) - 8} more")


def test_what_was_complete_before_was_not_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random_model(tmp_path / "hf", "llama")
    rewrite(folder, **{NORM: torch.full((64,), torch.nan)})
    to_mcore(folder, tmp_path / "out", console=LOUD)
    assert "not looked at" not in capsys.readouterr().out
    # As if it had ended just before its last step.
    (tmp_path / "out").rename(tmp_path / "out.tmp")
    to_mcore(folder, tmp_path / "out", console=LOUD)
    output = capsys.readouterr().out
    assert "not looked at for NaN and infinity: the files that were complete before" in output
    assert warnings_of(output) == []
