"""What --dry-run prints."""

import dataclasses

from osft_mcore.config.describe import batch_arithmetic, describe, rank_table
from osft_mcore.config.load import load_config, to_yaml
from osft_mcore.config.schema import RunConfig, TrainConfig
from osft_mcore.parallel.topology import Topology

PAPER = load_config(["experiment=sept_qwen2.5_math_7b"])
DEEPSCALER_PROMPTS = 40315


def test_the_paper_run_has_the_steps_of_the_reference() -> None:
    batch = batch_arithmetic(PAPER, phase="train", num_prompts=DEEPSCALER_PROMPTS)
    assert (batch.steps_per_epoch, batch.steps) == (314, 942)
    assert (batch.updates_per_step, batch.sequences_per_update) == (2, 64)
    assert (batch.sequences_per_dp_rank, batch.micro_batches) == (32, 8)


def test_parts_multiply_back_to_the_whole() -> None:
    config = load_config(["rollout.num_samples=3", "parallel.dp=4", "train.micro_batch_size=6"])
    batch = batch_arithmetic(config, phase="train")
    trained = batch.updates_per_step * batch.micro_batches * 6 * 4
    assert trained == config.train.prompts_per_step * 3
    assert batch_arithmetic(config, phase="sft").sequences_per_update == 64


def test_steps_are_unknown_without_the_size_of_the_data() -> None:
    assert batch_arithmetic(RunConfig(), phase="train").steps is None
    fixed = dataclasses.replace(RunConfig(), train=TrainConfig(steps=7))
    assert batch_arithmetic(fixed, phase="train").steps == 7
    assert batch_arithmetic(fixed, phase="train", num_prompts=1000).steps == 7


def test_rank_table_has_one_aligned_line_per_rank() -> None:
    ranks = Topology(tp=2, cp=2, pp=2, dp=3, rollout_tp=4).all_coordinates()
    header, *lines = rank_table(ranks).splitlines()
    assert header.split() == ["rank", "tp", "cp", "dp", "pp", "rollout", "replica", "rollout", "tp"]
    assert len(lines) == 24
    assert len({len(line) for line in [header, *lines]}) == 1
    assert [int(number) for number in lines[19].split()] == [19, 1, 1, 1, 1, 4, 3]


def test_a_budget_of_tokens_leaves_the_number_of_micro_batches_open() -> None:
    config = load_config(["train.max_tokens_per_micro_batch=16384"])
    text = " ".join(describe(config, phase="train", ranks=[]).split())
    assert "most tokens a micro-batch 16384 train.max_tokens_per_micro_batch" in text
    assert "micro-batches a rank" not in text
    assert "parallel.cp:" not in text
    config = load_config(["train.max_tokens_per_micro_batch=16384", "parallel.cp=4"])
    text = " ".join(describe(config, phase="train", ranks=[]).split())
    assert (
        "16384 train.max_tokens_per_micro_batch, over all 4 ranks of parallel.cp: each computes "
        "1 / 4 of them"
    ) in text


def test_describe_says_how_many_chunks_a_stage_holds() -> None:
    config = load_config(["parallel.pp=2", "parallel.vpp=3"])
    ranks = Topology(tp=1, pp=2, dp=1, vpp=3).all_coordinates()
    text = describe(config, phase="sft", ranks=ranks)
    assert rank_table(ranks) + "each pp stage holds 3 model chunks (parallel.vpp)\n" in text


def test_describe_prints_config_ranks_and_batches() -> None:
    ranks = Topology(tp=4, pp=1, dp=2, rollout_tp=2).all_coordinates()
    text = describe(PAPER, phase="train", ranks=ranks, num_prompts=DEEPSCALER_PROMPTS)
    assert to_yaml(PAPER) in text
    assert rank_table(ranks) in text
    assert "model chunks" not in text
    batches = text.split("# Batches\n")[1].splitlines()
    assert [" ".join(line.split()) for line in batches] == [
        "prompts a step 128 train.prompts_per_step",
        "optimizer updates a step 2 = 128 / 64 train.prompts_per_step / train.prompts_per_update",
        "sequences an update 64 = 64 * 1 train.prompts_per_update * rollout.num_samples",
        "sequences a data-parallel rank 32 = 64 / 2 sequences an update / parallel.dp",
        "micro-batches a rank and update 8 = 32 / 4 sequences a rank / train.micro_batch_size",
        "steps an epoch 314 = 40315 / 128 prompts in data.train / train.prompts_per_step, "
        "rounded down",
        "steps 942 = 3 * 314 train.epochs * steps an epoch",
        "optimizer updates 1884 = 942 * 2 steps * updates a step",
    ]
