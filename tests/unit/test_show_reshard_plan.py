"""The plan as the tool prints it, for the shapes of public models."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

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


def show(
    folder: Path, *arguments: str, layers: int = 28, **changes: int
) -> subprocess.CompletedProcess[str]:
    config = {**QWEN25_7B, "num_hidden_layers": layers, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, str(TOOL), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_json_states_bytes_bound_and_imbalance(tmp_path: Path) -> None:
    shown = show(tmp_path, "--tp", "2", "--pp", "2", "--rollout-tp", "4", "--json")
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


def test_chunks_move_as_many_bytes_and_each_needs_a_layer(tmp_path: Path) -> None:
    """Chunks deal other layers to the stages, but as many, and the layers are all alike."""
    layout = ("--pp", "4", "--rollout-tp", "4", "--json")
    plain, chunked = (show(tmp_path, *layout, "--vpp", vpp).stdout for vpp in ("1", "5"))
    assert json.loads(plain)["ranks"] == json.loads(chunked)["ranks"]
    refused = show(tmp_path, *layout, "--vpp", "8")
    assert refused.returncode != 0
    assert "4 * 8 = 32 model chunks, but the model has 28 layers" in refused.stderr


def test_the_table_ends_with_the_ratio(tmp_path: Path) -> None:
    shown = show(tmp_path, "--tp", "4", "--rollout-tp", "4")
    assert shown.returncode == 0, shown.stderr
    *ranks, head, total = shown.stdout.splitlines()
    assert len(ranks) == 5
    assert dict(zip(head.split(), total.split(), strict=True))["ratio"] == "1.00"


def test_all_pairs_are_one_line_each(tmp_path: Path) -> None:
    shown = show(tmp_path, "--pairs", layers=4)
    assert shown.returncode == 0, shown.stderr
    head, *lines = shown.stdout.splitlines()
    rows = [dict(zip(head.split(), line.split(), strict=True)) for line in lines]
    # tp and rollout tp in 1, 2, 4; pp 1 to 4, and 2 chunks on 2 stages.
    assert len(rows) == 3 * 5 * 3
    assert {row["ratio"] for row in rows} == {"1.00"}
    assert all(row["received"] == row["least"] for row in rows)


def test_pairs_leave_out_what_the_heads_do_not_allow(tmp_path: Path) -> None:
    """3 and 6 divide the 24 heads, but not the 26 heads' rows of query, key and value."""
    heads = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 1}
    shown = show(tmp_path, "--pairs", "--json", layers=1, **heads, intermediate_size=9216)
    assert shown.returncode == 0, shown.stderr
    pairs = {(row["tp"], row["rollout_tp"]) for row in json.loads(shown.stdout)}
    assert pairs == set(product((1, 2, 4, 8), repeat=2))


def test_a_rollout_that_does_not_fit_is_one_clear_error(tmp_path: Path) -> None:
    shown = show(tmp_path, "--tp", "3", "--rollout-tp", "2")
    assert shown.returncode != 0
    assert "rollout tp 2 must divide the world of tp * cp * pp * dp = 3 ranks" in shown.stderr
    assert "Traceback" not in shown.stderr
