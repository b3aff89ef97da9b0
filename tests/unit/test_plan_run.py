"""Plans of the presets: they fit where they should, and their figures are what one works out."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from osft_mcore.config.dimensions import known_shape
from osft_mcore.config.load import default_config_dir, load_config
from osft_mcore.config.schema import ParallelConfig, RolloutConfig, RunConfig, TrainConfig
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.errors import ConfigError
from osft_mcore.parallel.topology import Topology
from osft_mcore.plan.activations import Layers, MicroBatch, activations, passes_under_way
from osft_mcore.plan.actor_memory import largest_micro_batch
from osft_mcore.plan.assumptions import GIB, GPUS, HBM_SHARE, LAUNCH_S_PER_LAYER, MFU, NODE_GB_S
from osft_mcore.plan.command import add_arguments, run_command
from osft_mcore.plan.moments import PARTS
from osft_mcore.plan.run import plan_run
from osft_mcore.plan.smallest import smallest_layout
from osft_mcore.plan.stages import stages

PRESETS = sorted(path.stem for path in (default_config_dir() / "experiment").glob("*.yaml"))
SFT = ("offline_qwen2.5_math_7b", "arithmetic_sft", "arithmetic_offline")
MATH_7B = "experiment=sept_qwen2.5_math_7b"
LLAMA_70B = "experiment=sept_llama3_70b_instruct"


def run(*given: str) -> str:
    parser = ArgumentParser()
    add_arguments(parser)
    return run_command(parser.parse_intermixed_args(given))


def plan(*given: str) -> dict[str, Any]:
    return json.loads(run("--json", *given))


def moment(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(at for at in found["moments"] if at["name"] == name)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plan_that_fits(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    option = f"experiment={preset}"
    if preset.startswith("arithmetic"):
        # make demo writes it; nobody publishes it.
        write_model_folder(Path(load_config([option]).model.path), TinyModel())
    phase = "sft" if preset in SFT else "train"
    found = plan("--phase", phase, option)
    assert found["fits"], found["problems"]
    assert found["totals"] == [sum(at[part] for part in PARTS) for at in found["moments"]]
    assert max(found["totals"]) < found["gpu"]["gib"] * GIB
    assert (found["engine"] is None) == (found["push"] is None) == (phase == "sft")
    assert found["seconds_total"] > 0


def test_the_state_of_7b_on_8_gpus_is_what_one_works_out() -> None:
    """7.6157e9 parameters: 2 + 4 + 12 bytes over tp 4, the last over dp 2 too; engines of tp 2."""
    found = plan(MATH_7B)
    step = moment(found, "optimizer's step")
    shard = 7_615_616_512 / 4
    assert step["weights"] == pytest.approx(2 * shard, rel=1e-3)
    assert step["gradients"] == pytest.approx(4 * shard, rel=1e-3)
    assert step["optimizer"] == pytest.approx(12 * shard / 2, rel=1e-3)
    assert step["engine_weights"] == pytest.approx(2 * 7_615_616_512 / 2, rel=1e-3)
    assert found["disk"]["checkpoint"] == pytest.approx(14 * 7_615_616_512, rel=1e-3)
    assert found["disk"]["checkpoints"] == 3 * found["disk"]["checkpoint"]
    # 128 answers a step of 1536 tokens to 256, 4 bytes each and 7 for an answer's; 32 a problem.
    assert found["rollouts"] == 1000 * 128 * (1792 * 4 + 1536 * 7)
    assert found["evaluation"] == 1000 * 32 * 1536 * 4
    without = plan(MATH_7B, "logging.rollouts=false", "evaluation.files=[]", "evaluation.every=0")
    assert (without["rollouts"], without["evaluation"]) == (0, 0)
    # Half of the GPU is the engine's, whatever of it are keys and values.
    start = moment(found, "engine starts")
    share = start["engine_weights"] + start["engine_activations"] + start["kv_cache"] + GIB
    assert share == int(0.5 * 79 * GIB)
    # 28 layers, 2 of 4 key-value heads of 128, keys and values in bf16; 4096 tokens a sequence.
    assert found["engine"]["kv_bytes_per_token"] == 28 * 2 * 128 * 2 * 2
    assert found["engine"]["full_sequences"] == start["kv_cache"] // (28672 * 4096)
    assert found["batches"]["micro_batches"] == 64 // 2 // 4


def test_the_layers_of_70b_keep_their_inputs_alone() -> None:
    """Recomputed: an input of 4096 tokens a layer, cut over tp 8, 20 layers, bf16."""
    found = plan(LLAMA_70B)
    assert found["topology"]["tp"] * found["topology"]["pp"] * found["topology"]["dp"] == 64
    shape = known_shape("Meta-Llama-3-70B-Instruct")
    assert shape is not None
    topology = Topology(tp=8, pp=4, dp=2)
    first, *_, last = stages(shape, topology, vocab_multiple=64)
    layers = Layers(
        itemsize=2, tp=8, sequence_parallel=True, recompute="full", transformer_engine=True
    )
    batch = MicroBatch(rows=1, positions=4096, responses=3072)
    one_input = 4096 * 8192 * 2 // 8
    inside = activations(shape, first, layers, batch, num_micro_batches=32)
    # Four micro-batches wait on the first of four stages, one on the last.
    assert inside.kept == pytest.approx(4 * 20 * one_input, rel=0.1)
    inside = activations(shape, last, layers, batch, num_micro_batches=32)
    assert inside.kept == pytest.approx(20 * one_input, rel=0.15)
    # Two fp32 copies of the output weight's gradient, and logits in two buffers of 128 MiB.
    weight = 128256 // 8 * 8192 * 4
    assert inside.loss == pytest.approx(2 * weight + 2**28, rel=0.3)


def test_passes_wait_as_the_schedules_say() -> None:
    shape = known_shape("Meta-Llama-3-70B-Instruct")
    assert shape is not None
    plain = stages(shape, Topology(tp=8, pp=4, dp=1), vocab_multiple=64)
    assert [passes_under_way(stage, 32)[0] for stage in plain] == [4, 3, 2, 1]
    assert [passes_under_way(stage, 2)[0] for stage in plain] == [2, 2, 2, 1]
    chunked = stages(shape, Topology(tp=8, pp=4, dp=1, vpp=2), vocab_multiple=64)
    # Megatron-Core's warm-up, (4 - s - 1) * 2 + (2 - 1) * 4, and one more; 10 layers a chunk.
    assert [passes_under_way(stage, 32) for stage in chunked] == [
        (11, 110), (9, 90), (7, 70), (5, 50),
    ]  # fmt: skip


def test_the_largest_micro_batch_is_what_options_allow() -> None:
    rollout = RolloutConfig(max_prompt_tokens=10, max_response_tokens=21)
    rows = largest_micro_batch(ParallelConfig(), TrainConfig(micro_batch_size=4), rollout)
    assert rows == MicroBatch(rows=4, positions=31, responses=84)
    packed = TrainConfig(max_tokens_per_micro_batch=100)
    budget = largest_micro_batch(ParallelConfig(), packed, rollout)
    assert budget == MicroBatch(rows=1, positions=100, responses=100)
    alone = TrainConfig(max_tokens_per_micro_batch=20)
    assert largest_micro_batch(ParallelConfig(), alone, rollout).positions == 31
    cut = ParallelConfig(tp=2, cp=2, sequence_parallel=True)
    # 2 sequences of 31 in one row of a multiple of 8, of which a rank has half.
    shared = largest_micro_batch(cut, TrainConfig(micro_batch_size=2), rollout)
    assert shared == MicroBatch(rows=1, positions=32, responses=32)


def test_options_move_the_memory_that_they_are_for() -> None:
    before = plan(MATH_7B)
    away = plan(MATH_7B, "train.offload=optimizer")
    assert moment(away, "backward")["optimizer"] == 0
    assert (
        moment(away, "optimizer's step")["optimizer"]
        == (moment(before, "optimizer's step")["optimizer"])
    )
    assert moment(away, "sampling")["gradients"] == 0
    kept = plan(MATH_7B, "train.recompute=none")
    least = plan(MATH_7B, "train.recompute_loss=true")
    at = [moment(found, "loss") for found in (kept, before, least)]
    assert at[0]["activations"] > 10 * at[1]["activations"]
    # One fp32 gradient of the output weight less.
    assert at[1]["loss"] - at[2]["loss"] == 152064 // 4 * 3584 * 4
    penalised = plan(MATH_7B, "algorithm.kl_coef=0.1")
    weights = moment(penalised, "reference")["weights"]
    assert moment(penalised, "reference")["reference"] == weights
    assert penalised["host"] == before["host"] + weights


def test_shared_weights_are_there_once_after_the_engine_has_started() -> None:
    alike = plan(MATH_7B, "parallel.tp=2", "parallel.dp=4")
    start, sampling = moment(alike, "engine starts"), moment(alike, "sampling")
    shared = start["engine_weights"] - sampling["engine_weights"]
    # All but fused attention, whose rows vLLM has in another order.
    assert shared == alike["push"]["shared"][0] > 0.9 * start["engine_weights"]
    assert alike["push"]["received"] == 0
    copied = plan(MATH_7B, "parallel.tp=2", "parallel.dp=4", "sync.mode=copy")
    assert copied["push"]["shared"] == [0]


def test_what_does_not_fit_is_told_with_options() -> None:
    text = run("--gpu-gib", "24", MATH_7B)
    told = next(line for line in text.splitlines() if line.startswith("does not fit: "))
    # All that is not so already: the preset recomputes everything.
    options = ("rollout.gpu_memory_utilization", "train.micro_batch_size", "train.offload")
    assert [option in told for option in options] == [True] * 3
    assert "train.recompute" not in told
    at_its_best = [
        "train.recompute=none", "train.offload=optimizer", "train.max_tokens_per_micro_batch=4096",
    ]  # fmt: skip
    told = "".join(plan("--gpu-gib", "24", MATH_7B, *at_its_best)["problems"])
    assert [option in told for option in options] == [True, False, False]
    assert "train.recompute=full" in told
    text = run(MATH_7B, "rollout.gpu_memory_utilization=0.1")
    assert "not enough for one sequence of the greatest length" in text


def layout_of(tp: int, pp: int, rollout_tp: int, world: int) -> list[str]:
    return [
        f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.dp={world // (tp * pp)}",
        f"parallel.sequence_parallel={'true' if tp > 1 else 'false'}", f"rollout.tp={rollout_tp}",
    ]  # fmt: skip


def layouts_of(world: int) -> Iterator[list[str]]:
    """All of so many GPUs, a power of two."""
    sizes = [2**n for n in range(world.bit_length())]
    for tp, pp, rollout_tp in product(sizes, sizes, sizes):
        if tp * pp <= world:
            yield layout_of(tp, pp, rollout_tp, world)


def fits(*given: str) -> bool:
    """False where the model does not have such a layout, too."""
    with suppress(ConfigError):
        return bool(plan(*given)["fits"])
    return False


def test_the_smallest_layout_fits_and_half_as_many_gpus_do_not() -> None:
    found = plan("--smallest", MATH_7B)
    options = found["options"]["parallel"]
    world = options["tp"] * options["pp"] * options["dp"]
    assert found["fits"]
    assert 1 < world <= 8
    assert 28 % options["tp"] == 0
    assert not [layout for layout in layouts_of(world // 2) if fits(MATH_7B, *layout)]
    # What is told of so many is true.
    rollout_tp = found["options"]["rollout"]["tp"]
    assert fits(MATH_7B, *layout_of(options["tp"], options["pp"], rollout_tp, world))
    larger = plan("--smallest", "--gpu", "h200", MATH_7B)["options"]["parallel"]
    assert larger["tp"] * larger["pp"] * larger["dp"] < world
    text = run("--smallest", MATH_7B)
    line = text.splitlines()[1]
    again = plan(MATH_7B, *line.split())
    assert again["totals"] == found["totals"]
    with pytest.raises(ConfigError, match="no layout of 1 to"):
        run("--smallest", "--gpu-gib", "4", MATH_7B)


def test_of_layouts_that_are_nearly_as_quick_the_smallest_has_the_fewest_stages() -> None:
    """The shipped layout of 70B on 64 GPUs: eight stages would be quicker by less than 1%."""
    shape = known_shape("Meta-Llama-3-70B-Instruct")
    assert shape is not None

    def check(config: RunConfig) -> None:
        # The others take long, and do not fit.
        if config.parallel.world_size != 64 or config.parallel.tp != 8 or config.rollout.tp != 4:
            raise ConfigError("not looked at")

    of_run = partial(plan_run, shape=shape, gpu=GPUS["h100"], phase="train")
    config, four = smallest_layout(
        load_config([LLAMA_70B]), phase="train", check=check, plan=of_run
    )
    parallel = config.parallel
    assert (parallel.tp, parallel.pp, parallel.dp) == (8, 4, 2)
    eight = of_run(replace(config, parallel=replace(parallel, pp=8, dp=1)))
    assert eight.fits
    assert 0.99 < eight.seconds.total / four.seconds.total < 1


def test_what_ranks_tell_each_other_takes_time() -> None:
    """Six sums of hidden states a layer over tp 4, recomputed; messages; gradients and weights."""
    base = plan(MATH_7B, "train.micro_batch_size=1")
    hidden = 128 * 1792 / 2 * 3584 * 2
    summed = 6 * 28 * 2 * hidden * 3 / 4 / (NODE_GB_S * 1e9)
    assert base["seconds"]["layers"] == pytest.approx(summed)
    kept = plan(MATH_7B, "train.micro_batch_size=1", "train.recompute=none")
    assert kept["seconds"]["layers"] == pytest.approx(summed * 4 / 6)
    alone = ["parallel.tp=1", "parallel.sequence_parallel=false", "train.micro_batch_size=1"]
    stages_of_one = plan(MATH_7B, *alone, "parallel.pp=4")
    # Hidden states once forward, gradients once back; 3 of 32 micro-batches' time is waiting.
    sent = 2 * hidden / (NODE_GB_S * 1e9)
    assert stages_of_one["seconds"]["layers"] == pytest.approx(sent * (1 + 3 / 32))
    # bf16 weights and fp32 gradients of a quarter, half of each from the other copy, twice a step.
    copies = 2 * 6 * 7_615_616_512 / 4 / 2 / (NODE_GB_S * 1e9)
    assert base["seconds"]["copies"] == pytest.approx(copies, rel=1e-3)
    whole = plan(MATH_7B, "parallel.distributed_optimizer=false")
    assert whole["seconds"]["copies"] == pytest.approx(copies * 8 / 6, rel=1e-3)
    parts = base["seconds"]
    assert base["seconds_total"] == pytest.approx(sum(parts.values()))


def test_longer_answers_take_longer_and_no_more_memory() -> None:
    short, long = (plan("--response-tokens", tokens, MATH_7B) for tokens in ("500", "2500"))
    assert short["totals"] == long["totals"]
    assert short["seconds"]["forward_backward"] < long["seconds"]["forward_backward"]
    assert short["seconds"]["rollout"] <= long["seconds"]["rollout"]
    with pytest.raises(ConfigError, match=r"found 9999, expected at most .* = 3072"):
        run("--response-tokens", "9999", MATH_7B)


MICRO_BATCHES = ("train.micro_batch_size=1", "train.micro_batch_size=4")


def test_a_step_takes_its_operations_at_the_assumed_rates() -> None:
    found = plan(MATH_7B, "train.micro_batch_size=1", "train.recompute=none")
    tokens = 128 * (256 + 1536)
    # 6 operations a parameter and token, the embedding aside; attention adds below 10%.
    least = 6 * (7_615_616_512 - 152064 * 3584) * tokens / 8 / (989e12 * MFU)
    assert 1 < found["seconds"]["forward_backward"] / least < 1.1
    # With cp rows are packed: there is no padding to compute.
    one, packed = (plan(MATH_7B, "parallel.cp=2", "parallel.tp=2", size) for size in MICRO_BATCHES)
    assert packed["seconds"]["forward_backward"] == one["seconds"]["forward_backward"]
    again = plan(MATH_7B, "train.micro_batch_size=1")
    ratio = again["seconds"]["forward_backward"] / found["seconds"]["forward_backward"]
    assert ratio == pytest.approx(8 / 6)
    # The longest answer, a token at a time, kernel by kernel.
    assert found["seconds"]["rollout"] > 3072 * 28 * LAUNCH_S_PER_LAYER
    graphs = plan(MATH_7B, "rollout.enforce_eager=false")
    # Reading half of the weights for every token.
    assert graphs["seconds"]["rollout"] > 3072 * 7_615_616_512 / (3350e9 * HBM_SHARE)
    assert graphs["seconds"]["rollout"] < found["seconds"]["rollout"]
    # As many steps over four GPUs: what is read halves, what is summed grows.
    four = plan(MATH_7B, "rollout.enforce_eager=false", "rollout.tp=4")
    quicker = graphs["seconds"]["rollout"] - four["seconds"]["rollout"]
    assert 0 < quicker < 3072 * 7_615_616_512 / 2 / (3350e9 * HBM_SHARE)
    push = found["push"]["busiest"] / (NODE_GB_S * 1e9)
    assert found["seconds"]["push"] == pytest.approx(push)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        run(MATH_7B, "parallel.tp=3", "train.prompts_per_update=7")
    told = "\n".join(caught.value.problems)
    assert "parallel.tp: 3 does not divide the model's 28 attention heads" in told
    assert "train.prompts_per_update: 7 does not divide" in told
    with pytest.raises(ConfigError, match="conf/model/dimensions has no model of that name"):
        run(MATH_7B, "model.path=models/Nobodys")


def test_the_tool_prints_the_plan_and_says_that_it_is_an_estimate() -> None:
    tool = Path(__file__).parents[2] / "tools" / "plan_run.py"
    shown = subprocess.run(
        [sys.executable, str(tool), MATH_7B, "--gpu-gib", "80"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "nothing of this plan was run on a GPU" in shown.stdout
    assert "of 80 GiB are left" in shown.stdout
    assert shown.stderr == ""
