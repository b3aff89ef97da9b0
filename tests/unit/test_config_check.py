"""Combinations that cannot work, and the advice that comes with them."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from osft_mcore.config.check import CPU_HEAD_DIMS, absent_files, check
from osft_mcore.config.divide import VOCAB_PADDING, divisors, nearest, tensor_parallel_problems
from osft_mcore.config.load import load_config
from osft_mcore.config.model_shape import ModelShape, model_shape
from osft_mcore.config.schema import ParallelConfig, Phase, RolloutConfig, RunConfig, TrainConfig
from osft_mcore.errors import ConfigError
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.weight_plan import push_bytes

HF_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def shape_with(**changes: object) -> ModelShape:
    return model_shape(HF_CONFIG | changes, source="test")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Overrides of a run that works on one process."""
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG), encoding="utf-8")
    for name in ("train.parquet", "eval.parquet"):
        (tmp_path / name).touch()
    return [
        f"model.path='{tmp_path}'",
        f"data.train='{tmp_path / 'train.parquet'}'",
        f"evaluation.files=['{tmp_path / 'eval.parquet'}']",
    ]


def problems_of(
    options: list[str],
    *more: str,
    world_size: int | None = None,
    phase: Phase = "train",
    shape: ModelShape | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[str]:
    try:
        check(
            load_config([*options, *more]),
            world_size=world_size,
            phase=phase,
            device=device,
            shape=shape,
        )
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("more", "world_size"),
    [
        ((), 1),
        ((), None),
        (("parallel=tp2", "rollout=tp2"), 2),
        (("parallel.pp=2", "parallel.dp=2", "rollout.tp=4"), 4),
        (("parallel.tp=8", "rollout.tp=8"), 8),
        (("parallel.pp=2", "parallel.vpp=3", "rollout.tp=2"), 2),
        (("logging=wandb",), 1),
        (("checkpoint.resume=never", "checkpoint.stop_after=3h50m"), 1),
        (("checkpoint.resume=.", "checkpoint.keep_every=5", "checkpoint.keep_last=1"), 1),
        (("train.lr=0", "train.clip_grad=0", "evaluation.temperature=0", "rollout.top_k=0"), 1),
        (("train.prompts_per_update=8", "rollout.num_samples=3", "train.micro_batch_size=6"), 1),
        (("train.max_tokens_per_micro_batch=4096", "train.micro_batch_size=7"), 1),
    ],
)
@pytest.mark.parametrize("phase", ["train", "sft"])
def test_what_works_passes(
    options: list[str], more: tuple[str, ...], world_size: int | None, phase: Phase
) -> None:
    if phase == "sft":
        more = (*more, "evaluation.files=[]", "evaluation.every=0")
    if phase == "sft" and "train.micro_batch_size=6" in more:
        more = (*more, "train.micro_batch_size=4")
    if "logging=wandb" in more and importlib.util.find_spec("wandb") is None:
        more = ()
    assert problems_of(options, *more, world_size=world_size, phase=phase) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.path=''", "model.path: not set"),
        ("model.path=gone", "model.path: no config.json in 'gone'"),
        ("data.train=''", "data.train: not set"),
        ("data.train=gone.parquet", "data.train: 'gone.parquet' is not a file"),
        ("data.chat_template=gone.jinja", "data.chat_template: 'gone.jinja' is not a file"),
        ("evaluation.files=[gone.parquet]", "evaluation.files: 'gone.parquet' is not a file"),
        ("output_dir=''", "output_dir: not set"),
        ("seed=-1", "seed: found -1, expected 0 or more"),
        ("seed=4294967296", "seed: found 4294967296, expected 0 or more and below 2**32"),
        ("parallel.pp=7", "parallel.pp: 7 stages, but the model has only 6 layers"),
        ("parallel.vpp=0", "parallel.vpp: found 0, expected at least 1"),
        ("parallel.vpp=2", "parallel.vpp: found 2, which needs parallel.pp > 1, found 1"),
        ("parallel.dp=0", "parallel.dp: found 0, expected at least 1"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel: needs parallel.tp > 1"),
        ("deadlines.sync=0", "deadlines.sync: found 0, expected more than 0 and at most 43200"),
        ("deadlines.train=1e12", "deadlines.train: found 1e+12, expected more than 0 and at most"),
        ("deadlines.slack=1", "deadlines.slack: found 1, expected at least 2, or 0"),
        ("rollout.tp=0", "rollout.tp: found 0, expected at least 1"),
        ("rollout.tp=2", "rollout.tp: 2 does not divide the world of 1 processes; choose one of 1"),
        ("rollout.tau_sample=0", "rollout.tau_sample: found 0, expected more than 0"),
        ("rollout.annealing.end_tau=0", "rollout.annealing.end_tau: found 0, expected more than 0"),
        ("rollout.annealing.steps=0", "rollout.annealing.steps: found 0, expected at least 1"),
        ("rollout.top_p=1.5", "rollout.top_p: found 1.5, expected more than 0 and at most 1"),
        ("rollout.top_k=-1", "rollout.top_k: found -1, expected 0 or more"),
        ("rollout.max_response_tokens=4096", "1024 + 4096 = 5120, but the model has 4096 pos"),
        ("algorithm.tau_train=0", "algorithm.tau_train: found 0, expected more than 0"),
        ("train.steps=0", "train.steps: found 0, expected at least 1"),
        ("train.epochs=0", "train.epochs: found 0, expected at least 1"),
        ("train.lr=-1", "train.lr: found -1, expected 0 or more"),
        ("train.lr_warmup_steps=-1", "train.lr_warmup_steps: found -1, expected 0 or more"),
        ("train.lr_min_ratio=2", "train.lr_min_ratio: found 2, expected at most 1"),
        ("train.beta1=1", "train.beta1: found 1, expected at least 0 and below 1"),
        ("train.beta2=-0.1", "train.beta2: found -0.1, expected at least 0 and below 1"),
        ("train.eps=0", "train.eps: found 0, expected more than 0"),
        ("train.clip_grad=-1", "train.clip_grad: found -1, expected 0 or more"),
        ("train.micro_batch_size=0", "train.micro_batch_size: found 0, expected at least 1"),
        (
            "train.max_tokens_per_micro_batch=4095",
            "train.max_tokens_per_micro_batch: found 4095, but a sequence may have "
            "rollout.max_prompt_tokens + max_response_tokens = 1024 + 3072 = 4096 tokens; set it "
            "to 4096 or more",
        ),
        (
            "train.max_tokens_per_micro_batch=0",
            "train.max_tokens_per_micro_batch: found 0, expected at least 1",
        ),
        ("train.prompts_per_update=0", "train.prompts_per_update: found 0, expected at least 1"),
        ("train.prompts_per_step=0", "train.prompts_per_step: found 0, expected at least 1"),
        ("evaluation.temperature=-1", "evaluation.temperature: found -1, expected 0 or more"),
        (
            "evaluation.baseline_temperatures=[0.5,-1]",
            "evaluation.baseline_temperatures: found -1, expected 0 or more",
        ),
        ("evaluation.max_problems=0", "evaluation.max_problems: found 0, expected at least 1"),
        ("evaluation.scorer=boxed", "evaluation.scorer: found 'boxed', expected boxed_math"),
        ("evaluation.scorer='a:f'", "evaluation.scorer: found 'a:f', expected boxed_math"),
        ("evaluation.scorer='gone.py:score'", "evaluation.scorer: 'gone.py' is not a file"),
        ("evaluation.grader_memory_gib=0", "evaluation.grader_memory_gib: found 0"),
        ("evaluation.max_ungraded_share=1", "evaluation.max_ungraded_share: found 1"),
        (
            "evaluation.overlong_buffer_tokens=1",
            "evaluation.overlong_buffer_tokens: found 1, but only answer_line",
        ),
    ],
)
def test_one_wrong_option_is_one_problem_that_names_it(
    options: list[str], override: str, problem: str
) -> None:
    problems = problems_of(options, override)
    assert len(problems) == 1
    assert problem in problems[0]


def test_the_buffer_of_overlong_responses_fits_a_response(options: list[str]) -> None:
    scorer = "evaluation.scorer=answer_line"
    limit = load_config(options).rollout.max_response_tokens
    assert problems_of(options, scorer, f"evaluation.overlong_buffer_tokens={limit}") == []
    [problem] = problems_of(options, scorer, f"evaluation.overlong_buffer_tokens={limit + 1}")
    assert problem.endswith(f"at most rollout.max_response_tokens = {limit}")


def test_a_budget_of_tokens_counts_what_sequence_parallelism_pads(options: list[str]) -> None:
    budget = ("parallel.tp=2", "parallel.sequence_parallel=true", "rollout.max_prompt_tokens=1023",
              "train.max_tokens_per_micro_batch=4095")  # fmt: skip
    (problem,) = problems_of(options, *budget, world_size=2)
    assert "1023 + 3072 = 4095, padded to 4096 (a multiple of parallel.tp = 2) tokens" in problem


def test_a_budget_of_tokens_counts_the_padding_of_cut_sequences(options: list[str]) -> None:
    layout = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=3")
    lengths = "rollout.max_prompt_tokens=1023"
    (problem,) = problems_of(
        options, *layout, lengths, "train.max_tokens_per_micro_batch=4103", world_size=6
    )
    padded = "4095, padded to 4104 (a multiple of 2 * parallel.cp * parallel.tp = 12) tokens"
    assert padded in problem
    enough = "train.max_tokens_per_micro_batch=4104"
    assert problems_of(options, *layout, lengths, enough, world_size=6) == []


def test_a_budget_of_tokens_needs_global_normalization_and_equal_ranks(options: list[str]) -> None:
    problems = problems_of(
        options,
        "train.max_tokens_per_micro_batch=4096",
        "algorithm.normalization=per_microbatch",
        "parallel.dp=3",
        "train.micro_batch_size=0",
        world_size=3,
    )
    assert "train.micro_batch_size: found 0, expected at least 1" in problems
    problems.remove("train.micro_batch_size: found 0, expected at least 1")
    assert len(problems) == 2
    assert "64 * 1 = 64 sequences, not a multiple of parallel.dp = 3; " in problems[0]
    assert "train.micro_batch_size that works" not in problems[0]
    assert problems[1].startswith("algorithm.normalization: per_microbatch depends on which seq")


def test_packing_in_fp32_is_a_question_of_the_kernels_in_use(options: list[str]) -> None:
    """Which options do not tell: `test_preflight.py`."""
    packed = ("train.max_tokens_per_micro_batch=4096", "model.dtype=fp32")
    assert problems_of(options, *packed, device="cuda") == []


def test_a_dry_run_reports_a_checkpoint_that_is_not_here(options: list[str]) -> None:
    config = load_config([*options, "checkpoint.resume=gone"])
    assert [line.split(" is ")[0] for line in absent_files(config, "train")] == [
        "checkpoint.resume: 'gone'"
    ]
    check(config, world_size=1, phase="train", device="cpu", need_files=False)


def test_problems_of_all_kinds_come_back_together(options: list[str]) -> None:
    problems = problems_of(
        options,
        "model.path=gone",
        "data.train=gone.parquet",
        "parallel.tp=2",
        "rollout.tp=3",
        "train.prompts_per_update=6",
        "train.lr=-1",
        "evaluation.files=[]",
        "evaluation.every=5",
        world_size=5,
    )
    named = [problem.split(":")[0] for problem in problems]
    assert sorted(named) == [
        "data.train",
        "evaluation.every",
        "model.path",
        "parallel",
        "rollout.tp",
        "train.lr",
        "train.prompts_per_update",
        "train.prompts_per_update",
    ]


@pytest.mark.parametrize(
    ("world_size", "advice"),
    [
        (8, "tp * cp * pp * dp = 2 * 1 * 2 * 1 = 4, but the world has 8 processes; start 4 "),
        (8, "change parallel.dp to 2"),
        (6, "change parallel.tp, cp and pp (tp * cp * pp = 4 does not divide it)"),
    ],
)
def test_a_world_of_the_wrong_size_shows_the_arithmetic(
    options: list[str], world_size: int, advice: str
) -> None:
    layout = ("parallel.tp=2", "parallel.pp=2")
    (problem,) = problems_of(options, *layout, world_size=world_size)
    assert advice in problem


def test_a_model_chunk_without_a_layer_is_refused(options: list[str]) -> None:
    (problem,) = problems_of(options, "parallel.pp=2", "parallel.vpp=4")
    assert problem == (
        "parallel.vpp: pp * vpp = 2 * 4 = 8 model chunks, but the model has only 6 layers; "
        "at most 3 works"
    )


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "ffn", "named"),
    [
        (2, 8, 4, 688, []),
        (8, 8, 4, 688, []),
        (3, 9, 9, 688, ["feed-forward units"]),
        (4, 6, 2, 688, ["attention heads"]),
        (4, 12, 6, 688, ["key-value heads"]),
        (4, 6, 6, 690, ["attention heads", "key-value heads", "feed-forward units"]),
    ],
)
def test_heads_and_feed_forward_must_split(
    options: list[str], tp: int, heads: int, kv_heads: int, ffn: int, named: list[str]
) -> None:
    shape = shape_with(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        head_dim=32,
        vocab_size=3 * 64,
    )
    both = (f"parallel.tp={tp}", f"rollout.tp={tp}")
    problems = problems_of(options, *both, shape=shape)
    assert len(problems) == 2 * len(named)
    for noun in named:
        assert sorted(p.split(":")[0] for p in problems if noun in p) == [
            "parallel.tp",
            "rollout.tp",
        ]


def test_key_value_heads_that_the_actor_cannot_cut_are_its_problem_alone(
    options: list[str],
) -> None:
    """Megatron-Core cuts the fused rows evenly; vLLM gives each rank a key-value head."""
    shape = shape_with(
        num_attention_heads=24,
        num_key_value_heads=1,
        head_dim=128,
        intermediate_size=96,
        vocab_size=3 * 64,
    )
    (problem,) = problems_of(options, "parallel.tp=3", "rollout.tp=3", shape=shape)
    assert problem == (
        "parallel.tp: 3 does not divide the model's 3328 rows of query, key and value "
        "(24 + 2 * 1 heads of 128), which Megatron-Core cuts evenly; nearest that work: 2, 4"
    )


def test_a_vocabulary_that_vllm_cannot_cut_is_the_rollouts_problem_alone(
    options: list[str],
) -> None:
    """The actor pads to a multiple of its own size, vLLM to a multiple of 64."""
    shape = shape_with(
        num_attention_heads=12, num_key_value_heads=6, head_dim=32, intermediate_size=96
    )
    (problem,) = problems_of(options, "parallel.tp=3", "rollout.tp=3", shape=shape)
    assert problem == (
        "rollout.tp: 3 does not divide the 1024 rows to which vLLM pads the vocabulary of 1000; "
        "nearest that work: 2"
    ), "and not 4, which the 6 key-value heads do not allow"


@pytest.mark.parametrize("vocab", [100, 150])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
def test_what_passes_can_be_laid_out(kv_heads: int, vocab: int) -> None:
    shape = shape_with(
        num_attention_heads=12,
        num_key_value_heads=kv_heads,
        head_dim=8,
        intermediate_size=24,
        vocab_size=vocab,
        num_hidden_layers=1,
    )
    for tp in divisors(12):
        if not any(tensor_parallel_problems("parallel.tp", tp, shape)):
            push_bytes(shape, Topology(tp=tp, pp=1, dp=1), vocab_multiple=64, itemsize=2)
        if not any(tensor_parallel_problems("rollout.tp", tp, shape)):
            topology = Topology(tp=1, pp=1, dp=tp, rollout_tp=tp)
            push_bytes(shape, topology, vocab_multiple=64, itemsize=2)


def test_head_dim_of_the_cpu_build_matters_only_where_it_samples(options: list[str]) -> None:
    config = load_config(options)
    unscored = load_config([*options, "evaluation.files=[]"])
    small = shape_with(head_dim=16)
    with pytest.raises(ConfigError, match=r"model\.path: the model's head_dim is 16; vLLM's CPU"):
        check(config, world_size=1, phase="train", device="cpu", shape=small)
    check(config, world_size=1, phase="train", device="cuda", shape=small)
    check(unscored, world_size=1, phase="sft", device="cpu", shape=small)


def test_sft_without_evaluation_ignores_the_rollout(options: list[str]) -> None:
    unscored = [*options, "evaluation.files=[]"]
    more = ("rollout.tp=3", "rollout.num_samples=5")
    assert problems_of(unscored, *more, phase="sft") == []


def test_an_evaluation_that_would_not_take_place(options: list[str]) -> None:
    (problem,) = problems_of(options, phase="sft")
    assert problem.startswith("evaluation.files: osft sft does not sample")
    unscored = ("evaluation.before=false", "evaluation.baseline_temperatures=[0]")
    (problem,) = problems_of(options, *unscored)
    assert problem.startswith("evaluation.baseline_temperatures: ")
    assert "evaluation.before=false" in problem
    # That option is of a run that trains.
    assert problems_of(options, *unscored, phase="evaluate") == []


@pytest.mark.parametrize("phase", ["train", "sft"])
def test_the_longest_sequence_must_fit_the_models_positions(
    options: list[str], phase: Phase
) -> None:
    unscored = [*options, "evaluation.files=[]"]
    assert problems_of(unscored, "rollout.max_response_tokens=3072", phase=phase) == []
    (problem,) = problems_of(unscored, "rollout.max_response_tokens=3073", phase=phase)
    assert "1024 + 3073 = 4097, but the model has 4096 positions" in problem


def test_the_paper_preset_fits_its_model_and_eight_ranks() -> None:
    qwen = shape_with(
        num_hidden_layers=28,
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    )
    with pytest.raises(ConfigError) as caught:
        check(
            load_config(["experiment=osft_qwen2.5_math_7b"]),
            world_size=8,
            phase="train",
            device="cuda",
            shape=qwen,
        )
    assert all("is not a file" in problem for problem in caught.value.problems)


def vllm_source(name: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0]) / name
    return ast.parse(source.read_text(encoding="utf-8"))


def test_head_dims_are_those_of_the_installed_vllm() -> None:
    (function,) = (
        node
        for node in ast.walk(vllm_source("v1/attention/backends/cpu_attn.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes"
    )
    (returned,) = (node for node in function.body if isinstance(node, ast.Return))
    assert returned.value is not None
    assert tuple(ast.literal_eval(returned.value)) == CPU_HEAD_DIMS


def test_vocabulary_padding_is_that_of_the_installed_vllm() -> None:
    source = vllm_source("model_executor/layers/vocab_parallel_embedding.py")
    lines = [ast.unparse(node) for node in source.body]
    assert f"DEFAULT_VOCAB_PADDING_SIZE = {VOCAB_PADDING}" in lines


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    step=st.integers(1, 64),
    update=st.integers(1, 64),
    samples=st.integers(1, 6),
    dp=st.integers(1, 4),
    micro=st.integers(1, 8),
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
)
def test_batches_pass_exactly_when_every_rank_gets_full_micro_batches(
    step: int, update: int, samples: int, dp: int, micro: int, pp: int, vpp: int
) -> None:
    config = batch_config(step, update, samples, dp, micro, pp=pp, vpp=vpp)
    works = step % update == 0 and update * samples % (dp * micro) == 0
    if works and vpp > 1:
        # What Megatron-Core's interleaved schedule asks for.
        works = update * samples // (dp * micro) % pp == 0
    assert (batch_problems(config) == []) == works


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    step=st.integers(1, 64),
    samples=st.integers(1, 6),
    dp=st.integers(1, 4),
    micro=st.integers(1, 8),
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
    data=st.data(),
)
def test_following_the_advice_on_batches_works(
    step: int, samples: int, dp: int, micro: int, pp: int, vpp: int, data: st.DataObject
) -> None:
    update = data.draw(st.sampled_from(divisors(step)))
    config = batch_config(step, update, samples, dp, micro, pp=pp, vpp=vpp)
    problems = batch_problems(config)
    assume(problems)
    for option, values in advised(problems[0]):
        for value in values:
            changed = dataclasses.replace(config.train, **{option: value})
            assert batch_problems(dataclasses.replace(config, train=changed)) == []


def test_a_replica_that_the_gate_would_never_see_is_refused(options: list[str]) -> None:
    layout = ["parallel.dp=4", "train.prompts_per_step=2", "rollout.num_samples=8"]
    [problem] = problems_of([*options, *layout], "train.prompts_per_update=2")
    assert problem.startswith("train.prompts_per_update: 2, but there are 4 rollout replicas")
    assert problems_of([*options, *layout], "train.prompts_per_update=2", "rollout.tp=2") == []


def batch_config(
    step: int, update: int, samples: int, dp: int, micro: int, *, pp: int = 1, vpp: int = 1
) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(dp=dp, pp=pp, vpp=vpp),
        rollout=RolloutConfig(num_samples=samples, tp=dp * pp),
        train=TrainConfig(prompts_per_step=step, prompts_per_update=update, micro_batch_size=micro),
    )


def batch_problems(config: RunConfig) -> list[str]:
    """Problems of the batch arithmetic alone (no model, no data are named here)."""
    with pytest.raises(ConfigError) as caught:
        check(config, world_size=None, phase="train", device="cpu")
    return [problem for problem in caught.value.problems if problem.startswith("train.")]


def advised(problem: str) -> list[tuple[str, list[int]]]:
    """(option, values) of each `nearest train.<option> that works: a, b` in a message."""
    parts = [part for part in problem.split("; ") if part.startswith("nearest train.")]
    return [
        (
            part.split(" ")[1].removeprefix("train."),
            [int(value) for value in part.split(": ")[1].split(", ")],
        )
        for part in parts
    ]


def test_the_message_shows_the_arithmetic() -> None:
    problems = batch_problems(batch_config(step=24, update=6, samples=1, dp=1, micro=4))
    assert problems == [
        "train.prompts_per_update: an update has prompts_per_update * rollout.num_samples = "
        "6 * 1 = 6 sequences, not a multiple of parallel.dp * train.micro_batch_size = 1 * 4 = 4; "
        "nearest train.prompts_per_update that works: 4, 8; "
        "nearest train.micro_batch_size that works: 3, 6"
    ]


def test_the_message_says_where_the_stages_come_in() -> None:
    config = batch_config(step=24, update=6, samples=1, dp=1, micro=3, pp=4, vpp=2)
    (problem,) = batch_problems(config)
    assert problem.startswith(
        "train.prompts_per_update: an update has prompts_per_update * rollout.num_samples = "
        "6 * 1 = 6 sequences, not a multiple of parallel.dp * train.micro_batch_size * parallel.pp "
        "(as parallel.vpp > 1) = 1 * 3 * 4 = 12; "
    )
    assert dict(advised(problem)) == {"prompts_per_update": [12]}


@given(number=st.integers(-3, 2000))
def test_divisors_are_all_divisors(number: int) -> None:
    assert list(divisors(number)) == [n for n in range(1, number + 1) if number % n == 0]


def test_nearest_gives_the_neighbours() -> None:
    assert nearest(6, (1, 4, 8, 16)) == (4, 8)
    assert nearest(8, (1, 4, 8, 16)) == (8, 16)
    assert nearest(0, (1, 4)) == (1,)
    assert nearest(99, (1, 4)) == (4,)
    assert nearest(3, ()) == ()


def test_weights_that_leave_are_not_read_where_they_are(options: list[str]) -> None:
    for passes in (("train.offload=all",), ("train.offload=optimizer", "sync.mode=alias")):
        assert problems_of(options, *passes) == []
    # Where nothing is trained no actor has weights.
    assert problems_of(options, "train.offload=all", "sync.mode=alias", phase="generate") == []
    (problem,) = problems_of(options, "train.offload=all", "sync.mode=alias")
    assert problem.startswith("train.offload: all puts the actor's weights away while the engine")
    assert "choose optimizer, or sync.mode=auto" in problem
    sft = (*options, "evaluation.files=[]")
    assert problems_of(list(sft), "train.offload=optimizer", phase="sft") == []
    (problem,) = problems_of(list(sft), "train.offload=all", "sync.mode=alias", phase="sft")
    assert problem.startswith("train.offload: all puts the weights away while answers are sampled")


def test_wandb_must_be_installed(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Installed or not is a fact of the machine; the test must not depend on it.
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name)
    )
    (problem,) = problems_of(options, "logging=wandb")
    assert problem.startswith("logging.wandb: the package wandb is not installed")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        (
            '{"model_type": "mamba"}',
            "has model_type 'mamba'; supported are llama, mistral, qwen2, qwen3",
        ),
        (json.dumps(HF_CONFIG | {"num_attention_heads": 0}), "num_attention_heads is 0, expected"),
        (json.dumps(HF_CONFIG | {"vocab_size": "9"}), "vocab_size is '9', expected a positive"),
    ],
)
def test_a_bad_model_folder_is_reported_with_the_rest(
    options: list[str], tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    problems = problems_of(options, "train.lr=-1")
    assert len(problems) == 2
    assert problems[0].startswith("train.lr")
    assert problems[1].startswith("model.path")
    assert problem in problems[1]


def test_a_head_dim_that_vllm_would_ignore(options: list[str]) -> None:
    odd = shape_with(model_type="qwen2", head_dim=64)
    (problem,) = problems_of(options, shape=odd)
    assert "head_dim is 64" in problem
    assert "model.path" in problem
    assert problems_of(options, shape=shape_with(model_type="llama", head_dim=64)) == []


@pytest.mark.parametrize("phase", ["generate", "evaluate"])
def test_what_only_training_needs_does_not_stop_a_run_that_only_samples(
    phase: Phase, options: list[str]
) -> None:
    more = [
        "train.prompts_per_update=7", "algorithm.entropy_coef=2", "evaluation.every=3",
        "evaluation.files=[]" if phase == "generate" else "data.train=gone",
        "algorithm.kl_coef=0.1", "algorithm.reference=gone",
    ]  # fmt: skip
    assert problems_of(options, *more, phase=phase) == []
    # They are what a training run is stopped by.
    assert len(problems_of(options, *more, phase="train")) >= 4


def test_what_a_run_that_only_samples_needs(options: list[str]) -> None:
    [problem] = problems_of(options, "evaluation.files=[]", phase="evaluate")
    assert problem.startswith("evaluation.files: not set")
    [problem] = problems_of(options, "data.train=gone", phase="generate")
    assert problem.startswith("data.train: 'gone' is not a file")
    [problem] = problems_of(options, "rollout.annealing.mode=linear", phase="generate")
    assert problem.startswith("rollout.annealing.mode: found 'linear', but osft generate")
    assert problems_of(options, "rollout.annealing.mode=linear", phase="evaluate") == []
    folder = options[0].split("=")[1]
    for phase in ("generate", "evaluate"):
        [problem] = problems_of(options, f"checkpoint.resume={folder}", phase=phase)
        assert problem.startswith("checkpoint.resume: found")
        problem = problems_of(options, "rollout.tp=3", phase=phase)[0]
        assert problem.startswith("rollout.tp: 3 does not divide the world")
