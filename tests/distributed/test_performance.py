"""Operations and rates of a step, held against what torch counts and against figures by hand."""

from pathlib import Path

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import ModelConfig
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.flops import training_flops
from osft_mcore.train.performance import peak_memory, peak_tflops, rates

SECONDS = {"time/rollout_s": 4.0, "time/train_s": 2.0, "time/sync_s": 1.0}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_operations_are_those_that_torch_counts(tmp_path: Path, kind: str) -> None:
    folder = save_random_model(tmp_path / kind, kind)
    shape, length = read_model_shape(folder), 24
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    # Backward takes twice what forward takes. Eager attention computes both halves of a square.
    other_half = 2 * shape.num_layers * shape.num_heads * shape.head_dim * length**2
    assert training_flops(shape, [length]) == 3 * (counter.get_total_flops() - other_half)
    assert training_flops(shape, [length] * 3) == 3 * training_flops(shape, [length])


def test_rates_by_hand() -> None:
    found = rates(
        [30, 70], num_sampled=80, num_ranks=4, flops=6e12, seconds=SECONDS, peak_tflops=10.0
    )
    assert found == pytest.approx(
        {
            "perf/rollout_tokens_per_s": 20.0,
            "perf/rollout_tokens_per_s_per_rank": 5.0,
            "perf/train_tokens_per_s": 50.0,
            "perf/train_tokens_per_s_per_rank": 12.5,
            "perf/train_tflops_per_rank": 3.0,
            "perf/mfu": 0.3,
        }
    )


def test_without_a_known_peak_or_a_rollout_these_rates_are_missing() -> None:
    seconds = {"time/train_s": 2.0}
    found = rates([30], num_sampled=0, num_ranks=1, flops=1.0, seconds=seconds, peak_tflops=None)
    assert found.keys() == {
        "perf/train_tokens_per_s",
        "perf/train_tokens_per_s_per_rank",
        "perf/train_tflops_per_rank",
    }
    cpu = torch.device("cpu")
    assert peak_tflops(ModelConfig(dtype="bf16"), cpu) is None


def hold(rank: int) -> tuple[float, float]:
    """The peak before and after rank 1 has held half a GiB more than it had."""
    context = join_groups(Topology(tp=1, pp=1, dp=2), device=torch.device("cpu"))
    before = peak_memory(context)["perf/peak_host_memory_gib"]
    if rank == 1:
        torch.ones(int((before + 0.5) * 2**28), dtype=torch.float32)
    return before, peak_memory(context)["perf/peak_host_memory_gib"]


def test_the_peak_of_memory_is_that_of_the_neediest_rank() -> None:
    first, second = run_ranks(hold, 2)
    assert first == second
    before, after = first
    assert after >= before + 0.5
