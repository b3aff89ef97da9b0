"""The law of the project: results do not depend on the parallel layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from safetensors.torch import load_file
from token_examples import token_examples

from osft_mcore.actor.export import export_hf
from osft_mcore.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import topology_of
from osft_mcore.train.start import build_actor

Layout = tuple[int, int, int, int, int]
"""tp, pp, vpp, dp, micro-batch size"""

LAYOUTS: list[Layout] = [
    (1, 1, 1, 1, 4),
    (2, 1, 1, 1, 2),
    (1, 2, 1, 1, 1),
    (1, 1, 1, 2, 1),
    (2, 2, 1, 1, 2),
    (2, 1, 1, 2, 1),
    (1, 2, 2, 1, 2),
    # As few micro-batches as the interleaved schedule takes: one for each stage.
    (1, 2, 2, 2, 4),
]
NUM_STEPS = 3
# Adam's first steps are lr * sign(gradient): an element whose gradient is all rounding noise moves
# by up to lr in either direction, so the bound on weights (1e-5) needs an lr near it.
LR = 1e-4
ENTROPY = AlgorithmConfig(objective="entropy", entropy_coef=2.0, tau_train=0.8)


def train(
    rank: int,
    folder: Path,
    out: Path,
    layout: Layout,
    algorithm: AlgorithmConfig,
    options: dict[str, Any],
    **parallel: Any,
) -> list[tuple[float, float, float, float]]:
    tp, pp, vpp, dp, micro_batch_size = layout
    sizes = ParallelConfig(tp=tp, pp=pp, dp=dp, vpp=vpp, **parallel)
    context = join_groups(topology_of(sizes, rollout_tp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=sizes,
        train=TrainConfig(
            lr=LR,
            micro_batch_size=micro_batch_size,
            clip_grad=0.5,
            **options,
        ),
        algorithm=algorithm,
    )
    actor = build_actor(config, context)
    batch = token_examples(16, actor.shape.vocab, untrained_every=5)
    results = []
    for _ in range(NUM_STEPS):
        results.append(actor.update(batch, tau_sample=0.6, lr=LR))
        actor.rest()
    export_hf(actor, out, max_shard_bytes=2**30, bucket_bytes=2**12)
    return [(r.loss, r.grad_norm, r.nll, r.entropy) for r in results]


def run(
    folder: Path,
    out: Path,
    layout: Layout,
    algorithm: AlgorithmConfig | None = None,
    options: dict[str, Any] | None = None,
    **parallel: Any,
) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    tp, pp, _, dp, _ = layout
    by_rank = run_ranks(
        train,
        tp * pp * dp * parallel.get("cp", 1),
        folder=folder,
        out=out,
        layout=layout,
        algorithm=algorithm or AlgorithmConfig(),
        options=options or {},
        **parallel,
    )
    assert all(part == by_rank[0] for part in by_rank), "every rank reports the same figures"
    return by_rank[0], load_file(out / "model.safetensors")


def assert_same(
    found: tuple[list[tuple[float, ...]], dict[str, torch.Tensor]],
    expected: tuple[list[tuple[float, ...]], dict[str, torch.Tensor]],
) -> None:
    for step, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True)):
        for name, a, b, tolerance in zip(
            ("loss", "grad_norm", "nll", "entropy"), ours, theirs, (1e-6, 1e-5, 1e-6, 1e-6),
            strict=True,
        ):  # fmt: skip
            assert a == pytest.approx(b, rel=tolerance), f"step {step}: {name}"
    assert found[1].keys() == expected[1].keys()
    for name, tensor in found[1].items():
        difference = float((tensor - expected[1][name]).abs().max())
        assert difference <= 1e-5, f"{name}: {difference}"


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen3_untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, tied = request.param.split("_")
    folder = tmp_path_factory.mktemp(request.param)
    # Five layers on two stages, or on four chunks: uneven.
    layers = 4 if tied == "tied" else 5
    return save_random_model(folder, kind, tied=tied == "tied", vocab=67, layers=layers)


@pytest.fixture(scope="module")
def reference(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    return run(model, tmp_path_factory.mktemp("reference") / "hf", LAYOUTS[0])


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_training_is_the_same_in_every_layout(
    model: Path, reference: Any, tmp_path: Path, layout: Layout
) -> None:
    assert_same(run(model, tmp_path / "hf", layout), reference)


# Each switch on one of the two models: the layouts above are run on both.


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [("qwen2_tied", (2, 1, 1, 1, 2), {"sequence_parallel": True}),
     ("qwen3_untied", (2, 2, 1, 1, 1), {"sequence_parallel": True}),
     ("qwen3_untied", (2, 2, 2, 1, 1), {"sequence_parallel": True}),
     ("qwen2_tied", (1, 1, 1, 2, 2), {"distributed_optimizer": False})],
    ids=["tp2_sp", "tp2_pp2_sp", "tp2_pp2_vpp2_sp", "dp2_plain_optimizer"],
    indirect=["model"],
)  # fmt: skip
def test_switches_change_nothing(
    model: Path,
    reference: Any,
    tmp_path: Path,
    layout: Layout,
    options: dict[str, bool],
) -> None:
    assert_same(run(model, tmp_path / "hf", layout, **options), reference)


@pytest.mark.parametrize(
    ("model", "layout", "sequence_parallel", "options"),
    [("qwen2_tied", (1, 1, 1, 1, 4), False, {}),
     ("qwen3_untied", (1, 1, 1, 1, 4), False, {"recompute": "selective", "offload": "optimizer"}),
     ("qwen2_tied", (2, 1, 1, 2, 4), True, {"recompute": "full"}),
     ("qwen3_untied", (1, 2, 1, 2, 4), False,
      {"recompute": "full", "recompute_loss": True, "offload": "all"}),
     ("qwen2_tied", (1, 2, 2, 2, 4), False, {"recompute": "selective"}),
     # Everything that saves memory, over stages and chunks that are uneven where layers are.
     ("qwen3_untied", (2, 2, 2, 1, 4), True, {"recompute": "full", "offload": "all"})],
    ids=["one", "one_selective", "tp2_sp_dp2_full", "pp2_dp2_full", "pp2_vpp2_dp2_selective",
         "tp2_sp_pp2_vpp2_full"],
    indirect=["model"],
)  # fmt: skip
def test_micro_batches_by_tokens_change_nothing(
    model: Path,
    reference: Any,
    tmp_path: Path,
    layout: Layout,
    sequence_parallel: bool,
    options: dict[str, Any],
) -> None:
    """Packed sequences against padded ones."""
    # Little more than the longest has: several micro-batches, of different sizes, on each rank.
    options = {"max_tokens_per_micro_batch": 24, **options}
    found = run(
        model, tmp_path / "hf", layout, options=options, sequence_parallel=sequence_parallel
    )
    assert_same(found, reference)


@pytest.mark.parametrize(
    ("model", "layout", "cp", "parallel", "options"),
    [("qwen2_tied", (1, 1, 1, 1, 4), 2, {}, {}),
     ("qwen3_untied", (1, 1, 1, 1, 4), 3, {}, {}),
     ("qwen2_tied", (1, 1, 1, 1, 4), 4, {}, {"recompute_loss": True}),
     ("qwen3_untied", (2, 1, 1, 1, 2), 2, {"sequence_parallel": True}, {"recompute": "full"}),
     ("qwen2_tied", (1, 1, 1, 2, 2), 2, {"distributed_optimizer": False}, {}),
     ("qwen3_untied", (1, 2, 2, 1, 4), 2, {},
      {"max_tokens_per_micro_batch": 30, "recompute": "selective"}),
     ("qwen2_tied", (1, 1, 1, 2, 4), 2, {},
      {"max_tokens_per_micro_batch": 30, "offload": "all"})],
    ids=["two", "three", "four", "tp2_sp_full", "dp2_plain_optimizer", "pp2_vpp2_budget_selective",
         "dp2_budget_offload"],
    indirect=["model"],
)  # fmt: skip
def test_cut_sequences_change_nothing(
    model: Path,
    reference: Any,
    tmp_path: Path,
    layout: Layout,
    cp: int,
    parallel: dict[str, bool],
    options: dict[str, Any],
) -> None:
    """Context parallelism: most ranks have runs of padding alone, or no response token."""
    found = run(model, tmp_path / "hf", layout, options=options, cp=cp, **parallel)
    assert_same(found, reference)


def first_norm_in_bf16(rank: int, folder: Path, cp: int) -> float:
    parallel = ParallelConfig(cp=cp)
    context = join_groups(topology_of(parallel, rollout_tp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="bf16"),
        parallel=parallel,
        train=TrainConfig(micro_batch_size=4),
    )
    actor = build_actor(config, context)
    batch = token_examples(16, actor.shape.vocab, untrained_every=5)
    return actor.update(batch, tau_sample=0.6, lr=LR).grad_norm


@pytest.mark.parametrize("model", ["qwen3_untied"], indirect=True)
def test_cut_sequences_in_bf16(model: Path) -> None:
    """Later updates differ more: by then Adam has made a step of every gradient's last bit."""
    [one] = run_ranks(first_norm_in_bf16, 1, folder=model, cp=1)
    for cut in run_ranks(first_norm_in_bf16, 2, folder=model, cp=2):
        assert cut == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "aggregation"),
    [("qwen2_tied", "seq-mean-token-mean"), ("qwen3_untied", "seq-mean-token-sum-norm")],
    indirect=["model"],
)
def test_aggregations_are_layout_independent(model: Path, tmp_path: Path, aggregation: Any) -> None:
    algorithm = AlgorithmConfig(aggregation=aggregation, tau_train=0.8)
    one = run(model, tmp_path / "one", (1, 1, 1, 1, 8), algorithm)
    assert_same(run(model, tmp_path / "two", (2, 1, 1, 2, 2), algorithm), one)


@pytest.fixture(scope="module")
def entropy_reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(model, tmp_path_factory.mktemp("entropy") / "hf", LAYOUTS[0], ENTROPY)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("qwen2_tied", (2, 1, 1, 1, 2)), ("qwen3_untied", (1, 2, 1, 1, 1))],
    indirect=["model"],
)
def test_the_entropy_is_layout_independent(
    model: Path, reference: Any, entropy_reference: Any, tmp_path: Path, layout: Layout
) -> None:
    assert_same(run(model, tmp_path / "hf", layout, ENTROPY), entropy_reference)
    assert entropy_reference[0][0] != pytest.approx(reference[0][0], rel=1e-2)


@pytest.mark.parametrize("model", ["qwen2_tied"], indirect=True)
def test_per_microbatch_averaging_depends_on_the_split(model: Path, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig(normalization="per_microbatch")
    small, _ = run(model, tmp_path / "small", (1, 1, 1, 1, 2), algorithm)
    large, _ = run(model, tmp_path / "large", (1, 1, 1, 1, 16), algorithm)
    over_ranks, _ = run(model, tmp_path / "ranks", (1, 1, 1, 2, 2), algorithm)
    assert small[0][0] != pytest.approx(large[0][0], rel=1e-4)
    assert small[0][0] == pytest.approx(over_ranks[0][0], rel=1e-6)
