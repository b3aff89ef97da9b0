"""The benchmark compares like with like: both ways deliver the same, and its figures are right."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines_vllm import join, run_config
from models import save_random_model
from ranks import run_ranks
from sync_benchmark.cases import Case, Model
from sync_benchmark.measure import Bench, built, check_delivery
from sync_benchmark.memory import peak_extra_bytes
from sync_benchmark.ranks import run_case
from sync_benchmark.rows import Way, as_json, make_row, table_head, table_line
from sync_benchmark.usual import vllm_model

from osft_mcore.config.schema import SyncConfig
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import Topology

COPY = SyncConfig(mode="copy")


def leave_out_one(bench: Bench) -> int:
    """The usual way, but one parameter keeps what it had."""
    left_out = vllm_model(bench.engine).model.norm.weight
    before = left_out.data.clone()
    received = bench.usual()
    left_out.data.copy_(before)
    return received


def both_ways(_rank: int, folder: Path, topology: Topology) -> list[str]:
    """Parameters that differ between the ways; on the way, that the check sees a lazy one."""
    with built(run_config(folder, topology, sync=COPY), join(topology)) as bench:
        delivered = []
        for push in (bench.ours, bench.usual):
            for param in vllm_model(bench.engine).parameters():
                param.data.fill_(torch.nan)
            push()
            delivered.append(bench.engine_weights())
        ours, usual = delivered
        check_delivery(bench)
        with pytest.raises(WeightError, match="pushed by ours, these differ"):
            check_delivery(dataclasses.replace(bench, ours=lambda: 0))
        lazy = dataclasses.replace(bench, usual=lambda: leave_out_one(bench))
        with pytest.raises(WeightError, match=r"by the usual way, .* \[\['model\.norm\.weight'\]"):
            check_delivery(lazy)
        return [name for name in ours | usual if not ours[name].equal(usual[name])]


@pytest.mark.parametrize(
    ("kind", "tied", "kv_heads", "topology"),
    [
        ("qwen3", True, 2, Topology(tp=2, pp=2, dp=1, rollout_tp=4)),
        ("qwen2", False, 1, Topology(tp=2, pp=1, dp=1, rollout_tp=1)),
    ],
    ids=["tp2pp2-tp4", "tp2-tp1x2"],
)
def test_the_usual_way_delivers_what_ours_delivers(
    kind: str, tied: bool, kv_heads: int, topology: Topology, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_random_model(folder, kind, tied=tied, kv_heads=kv_heads, hidden=128)
    different = run_ranks(both_ways, topology.world_size, folder=folder, topology=topology)
    assert different == [[]] * topology.world_size


def test_a_case_becomes_a_row() -> None:
    tiny = Model(
        layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=1000, bucket_mib=1, rounds=2
    )
    topology = Topology(tp=2, pp=1, dp=1, rollout_tp=1)
    row = run_case(
        Case(model=tiny, layout="tp2-tp1x2", topology=topology, dtype="bf16", sync=COPY, rounds=2)
    )
    assert (row.num_ranks, row.actor, row.rollout, row.rounds) == (2, "tp2", "tp1x2", 2)
    assert row.bytes_ratio == 1.0
    # Both ranks have a whole engine and half of the actor, so that each misses half of two bytes
    # a parameter; norms and a few rows aside.
    assert row.bytes_least == pytest.approx(2 * row.num_parameters, rel=0.03)
    # Padding to 1024 rows of vocabulary travels as well.
    assert 1.0 < row.bytes_ratio_usual < 1.05
    assert 0 < row.peak_extra_bytes <= row.bucket_bytes
    # Embedding and output layer arrive whole.
    assert row.peak_extra_bytes_usual >= 1000 * 64 * 2


ROW = make_row(
    num_parameters=200_000_000,
    num_ranks=4,
    actor="tp4",
    rollout="tp2x2",
    mode="copy",
    verify="sample",
    dtype="bf16",
    ours=Way(seconds=(0.5, 0.1, 0.2), bytes_received=150, peak_extra_bytes=2**20),
    usual=Way(seconds=(0.8, 9.0, 0.7), bytes_received=400, peak_extra_bytes=3 * 2**20),
    bytes_least=100,
    bucket_bytes=2**21,
)


def test_a_row_compares_medians_and_bytes() -> None:
    assert (ROW.seconds, ROW.seconds_usual, ROW.rounds) == (0.2, 0.8, 3)
    assert ROW.speedup == pytest.approx(4.0)
    assert (ROW.bytes_ratio, ROW.bytes_ratio_usual) == (1.5, 4.0)
    wanted = "num_parameters actor rollout speedup bytes_ratio peak_extra_bytes bucket_bytes"
    assert set(wanted.split()) <= as_json(ROW).keys()


def test_where_nothing_must_move_the_ratio_tells_whether_something_did() -> None:
    still = Way(seconds=(1.0,), bytes_received=0, peak_extra_bytes=0)
    busy = dataclasses.replace(still, bytes_received=7)
    row = make_row(
        num_parameters=1, num_ranks=1, actor="tp1", rollout="tp1", mode="copy", verify="off",
        dtype="bf16", ours=still, usual=busy, bytes_least=0, bucket_bytes=1,
    )  # fmt: skip
    assert (row.bytes_ratio, row.bytes_ratio_usual) == (1.0, 8.0)


def test_columns_stand_under_their_names() -> None:
    line, head = table_line(ROW), table_head().splitlines()
    assert len(line) == len(head[1])
    assert " ".join(line.split()) == "200.0M 4 tp4 tp2x2 0.2000 0.8000 4.0x 1.50 4.0 1.0 3.0 2"


HELD = torch.zeros(1000)


def reuse() -> None:
    for _ in range(3):
        HELD.copy_(torch.ones(1000))
        HELD[10:].view(-1).mul_(2)


def hoard() -> None:
    parts = [torch.ones(250) for _ in range(4)]
    torch.cat(parts)


@pytest.mark.parametrize(("push", "expected"), [(reuse, 4000), (hoard, 8000)])
def test_peak_counts_new_tensors_while_they_live(push: Callable[[], None], expected: int) -> None:
    assert peak_extra_bytes(push, torch.device("cpu")) == expected
