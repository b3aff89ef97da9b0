"""The plan as the tool prints it, for the shapes of public models."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import show_reshard_plan

TOOL = Path(__file__).parents[2] / "tools" / "show_reshard_plan.py"
QWEN25_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}


@dataclass(frozen=True)
class Shown:
    returncode: int
    stdout: str
    stderr: str


Show = Callable[..., Shown]


def write_config(folder: Path, layers: int = 28, **changes: int) -> None:
    config = {**QWEN25_7B, "num_hidden_layers": layers, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Show:
    """In this process: importing torch takes the tool longer than its work."""

    def show(*arguments: str, **changes: int) -> Shown:
        write_config(tmp_path, **changes)
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path), *arguments])
        code = show_reshard_plan.main()
        return Shown(code, *capsys.readouterr())

    return show


def test_json_states_bytes_bound_and_imbalance(show: Show) -> None:
    shown = show("--tp", "2", "--pp", "2", "--rollout-tp", "4", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert [at["rank"] for at in found["ranks"]] == [0, 1, 2, 3]
    assert found["ratio"] == 1.0
    assert found["received"] == found["least"] == sum(at["received"] for at in found["ranks"])
    # The four targets are the 7.6e9 bf16 parameters, norms and the rest of the padding aside.
    filled = found["received"] + sum(at["local"] for at in found["ranks"])
    assert filled == pytest.approx(2 * 7.6156e9, rel=1e-3)
    sent = [at["sent"] for at in found["ranks"]]
    assert found["imbalance"] == pytest.approx(max(sent) / (sum(sent) / 4))


def test_chunks_move_as_many_bytes_and_each_needs_a_layer(show: Show) -> None:
    """Chunks deal other layers to the stages, but as many, and the layers are all alike."""
    layout = ("--pp", "4", "--rollout-tp", "4", "--json")
    plain, chunked = (show(*layout, "--vpp", vpp).stdout for vpp in ("1", "5"))
    assert json.loads(plain)["ranks"] == json.loads(chunked)["ranks"]
    refused = show(*layout, "--vpp", "8")
    assert refused.returncode != 0
    assert "4 * 8 = 32 model chunks, but the model has 28 layers" in refused.stderr


def test_the_table_ends_with_the_ratio(tmp_path: Path) -> None:
    write_config(tmp_path)
    command = [sys.executable, str(TOOL), str(tmp_path), "--tp", "4", "--rollout-tp", "4"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert shown.returncode == 0, shown.stderr
    *ranks, head, total = shown.stdout.splitlines()
    assert len(ranks) == 5
    assert dict(zip(head.split(), total.split(), strict=True))["ratio"] == "1.00"


def test_all_pairs_are_one_line_each(show: Show) -> None:
    shown = show("--pairs", layers=4)
    assert shown.returncode == 0, shown.stderr
    head, *lines = shown.stdout.splitlines()
    rows = [dict(zip(head.split(), line.split(), strict=True)) for line in lines]
    # tp and rollout tp in 1, 2, 4; pp 1 to 4, and 2 chunks on 2 stages.
    assert len(rows) == 3 * 5 * 3
    assert {row["ratio"] for row in rows} == {"1.00"}
    assert all(row["received"] == row["least"] for row in rows)


def test_pairs_leave_out_what_the_heads_do_not_allow(show: Show) -> None:
    """3 and 6 divide the 24 heads, but not the 26 heads' rows of query, key and value."""
    heads = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 1}
    shown = show("--pairs", "--json", layers=1, **heads, intermediate_size=9216)
    assert shown.returncode == 0, shown.stderr
    pairs = {(row["tp"], row["rollout_tp"]) for row in json.loads(shown.stdout)}
    assert pairs == set(product((1, 2, 4, 8), repeat=2))


def test_a_rollout_that_does_not_fit_is_one_clear_error(show: Show) -> None:
    shown = show("--tp", "3", "--rollout-tp", "2")
    assert shown.returncode != 0
    assert "rollout tp 2 must divide the world of tp * cp * pp * dp = 3 ranks" in shown.stderr
    assert "Traceback" not in shown.stderr
