"""Hugging Face -> actor -> rollout for 20 configurations that nobody chose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest
from engines_vllm import (
    BLOCK,
    examples_of,
    join,
    largest_difference,
    random_prompts,
    run_config,
    sampling,
    start_engine,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from models import MAX_POSITIONS, save_random_model
from ranks import run_ranks

from osft_mcore.config.check import check
from osft_mcore.config.divide import VOCAB_PADDING, divisors
from osft_mcore.config.model_shape import FAMILIES, LLAMA3_ROPE, padded_vocab
from osft_mcore.config.schema import RunConfig, SyncConfig, TrainConfig
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor

NUM_CASES = 20
SEED = 5
"""The 20 draws of this one cover the space; see test_the_draws_cover_the_space."""
NUM_PROMPTS, MICRO_BATCH = 8, 2
"""Two micro-batches or more on every rank: some for every stage and replica."""
ASKED = sampling(0.6)
TOLERANCE = 1e-4
SYNC_MODES = ("auto", "copy", "reload")
"""Not `alias`, which only some layouts can have; `auto` shares whatever `alias` would."""

BITS = 10
"""Of every choice; no list is longer than 2**BITS."""

T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    model: dict[str, Any]
    """What save_random_model takes."""
    topology: Topology
    sequence_parallel: bool
    vocab_multiple: int
    sync_mode: Any
    """One of SYNC_MODES."""

    @property
    def padded_vocabs(self) -> tuple[int, int]:
        """Rows of the actor's embedding and of the engine's, over all ranks."""
        vocab: int = self.model["vocab"]
        actor = padded_vocab(vocab, multiple=self.vocab_multiple, tp=self.topology.tp)
        return actor, padded_vocab(vocab, multiple=VOCAB_PADDING, tp=1)

    def __str__(self) -> str:
        m, t = self.model, self.topology
        tied = "tied" if m["tied"] else "untied"
        sizes = f"layers{m['layers']}-heads{m['heads']}:{m['kv_heads']}-vocab{m['vocab']}"
        axes = "-".join(f"{axis}{size}" for axis, size in t.actor_sizes().items())
        layout = f"{axes}-to-tp{t.rollout_tp}"
        return f"{m['kind']}-{tied}-{sizes}-{layout}-{self.sync_mode}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Anything that config/check.py lets through, small enough for four ranks on two cores."""

    def choose(options: Sequence[T]) -> T:
        # Not sampled_from, nor integers: Hypothesis takes some of those from the constants of
        # whatever modules are imported, so that the draws would change with unrelated code.
        bits = draw(st.tuples(*[st.booleans()] * BITS))
        return options[sum(bit << place for place, bit in enumerate(bits)) % len(options)]

    topology = _topology(choose)
    return Case(
        model=_model(choose, topology),
        topology=topology,
        sequence_parallel=topology.tp > 1 and choose([False, True]),
        vocab_multiple=choose([1, 8, 64, 128]),
        sync_mode=choose(SYNC_MODES),
    )


def _topology(choose: Choose) -> Topology:
    """Mostly worlds of two ranks, one for each core of a small machine."""
    ones, twos = [(1, 1, 1, 1)], [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
    fours = [(2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (2, 1, 1, 2)]
    tp, pp, dp, cp = choose(choose([ones, twos, twos, twos, twos, fours]))
    vpp = choose([1, 2]) if pp > 1 else 1
    rollout_tp = choose([n for n in (1, 2) if n <= tp * pp * dp * cp])
    return Topology(tp=tp, pp=pp, dp=dp, cp=cp, vpp=vpp, rollout_tp=rollout_tp)


def _model(choose: Choose, topology: Topology) -> dict[str, Any]:
    kind = choose(sorted(FAMILIES))
    sides = (topology.tp, topology.rollout_tp)
    heads = choose([n for n in (1, 2, 3, 4, 6) if n % max(sides) == 0])
    kv_heads = choose(
        [n for n in divisors(heads) if all(n % tp == 0 or tp % n == 0 for tp in sides)]
    )
    head_dim = choose([32, 64, 80])
    # Any size would do, but transformers' Llama wants a multiple of the heads.
    own_hidden = FAMILIES[kind].vllm_reads_head_dim
    return {
        "kind": kind,
        # The small ones leave the second rollout rank nothing but padding.
        "vocab": choose(
            choose([range(20, 1 + VOCAB_PADDING // 2), range(33, 400), range(33, 400)])
        ),
        "tied": choose([False, True]),
        "layers": choose(range(topology.pp * topology.vpp, 6)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden": heads * (choose([24, 40, 66]) if own_hidden else head_dim),
        "ffn": choose([62, 96, 172]),
        "rms_norm_eps": choose([1e-6, 1e-5, 1e-3]),
        "rope_parameters": _rope(choose, kind),
        **({"sliding_window": choose([None, MAX_POSITIONS])} if kind == "mistral" else {}),
    }


def _rope(choose: Choose, kind: str) -> dict[str, Any]:
    theta = choose([100.5, 1e4, 1e6])
    if kind == "llama" and choose([False, True]):
        factor = choose([2.0, 8.0, 32.0])
        return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}
    return {"rope_type": "default", "rope_theta": theta}


def drawn_cases() -> list[Case]:
    """The same ones every time. Drawn before any test runs, so that each is a test of its own."""
    drawn = []

    @seed(SEED)
    @settings(
        max_examples=1,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(cases(), min_size=NUM_CASES, max_size=NUM_CASES, unique_by=repr))
    def keep(found: list[Case]) -> None:
        drawn.extend(found)

    keep()
    return drawn


CASES = drawn_cases()


def config_of(case: Case, folder: Path) -> RunConfig:
    train = TrainConfig(
        prompts_per_step=NUM_PROMPTS, prompts_per_update=NUM_PROMPTS, micro_batch_size=MICRO_BATCH
    )
    sync = SyncConfig(mode=case.sync_mode)
    config = run_config(folder, case.topology, train=train, sync=sync)
    return replace(
        config,
        model=replace(config.model, vocab_multiple=case.vocab_multiple),
        parallel=replace(config.parallel, sequence_parallel=case.sequence_parallel),
    )


def push_and_sample(
    _rank: int, config: RunConfig, topology: Topology, prompts: Sequence[Prompt]
) -> tuple[list[Response], float]:
    """Answers of the pushed engine, and max |rollout - actor| log-probability of their tokens."""
    context = join(topology)
    actor, engine = build_actor(config, context), start_engine(config, context)
    build_sync(config, actor, engine).push()
    responses = engine.generate(prompts, ASKED)
    agreement = actor.score(examples_of(responses), tau_sample=ASKED.temperature).agreement
    assert agreement is not None
    return responses, agreement.max


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_engine_samples_from_the_hugging_face_model(case: Case, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, **case.model)
    config, world_size = config_of(case, folder), case.topology.world_size
    check(config, world_size=world_size, phase="train", device="cpu", need_files=False)
    prompts = random_prompts(NUM_PROMPTS, vocab=case.model["vocab"], prefix=BLOCK + 12)
    by_rank = run_ranks(
        push_and_sample, world_size, config=config, topology=case.topology, prompts=prompts
    )
    assert all(found == by_rank[0] for found in by_rank), "ranks saw different answers"
    responses, actor_difference = by_rank[0]
    assert [response.prompt for response in responses] == prompts
    differences = {
        "transformers": largest_difference(folder, responses, ASKED),
        "actor": actor_difference,
    }
    # Not max(): it passes over a NaN that does not come first.
    assert all(difference <= TOLERANCE for difference in differences.values()), differences


PARTS: dict[str, Callable[[Case], bool]] = {
    "llama3 rope": lambda c: c.model["rope_parameters"]["rope_type"] == "llama3",
    "llama without": lambda c: (
        c.model["kind"] == "llama" and c.model["rope_parameters"]["rope_type"] == "default"
    ),
    "tied, one stage": lambda c: c.model["tied"] and c.topology.pp == 1,
    "tied, two stages": lambda c: c.model["tied"] and c.topology.pp == 2,
    "untied": lambda c: not c.model["tied"],
    "a key/value head for every head": lambda c: c.model["kv_heads"] == c.model["heads"] > 1,
    "grouped heads": lambda c: 1 < c.model["kv_heads"] < c.model["heads"],
    "fewer key/value heads than actor ranks": lambda c: c.model["kv_heads"] < c.topology.tp,
    "fewer key/value heads than rollout ranks": (
        lambda c: c.model["kv_heads"] < c.topology.rollout_tp
    ),
    "hidden that is not heads * head_dim": (
        lambda c: c.model["hidden"] != c.model["heads"] * c.model["head_dim"]
    ),
    "stages of unequal length": lambda c: c.model["layers"] % c.topology.pp > 0,
    "model chunks of unequal length": (
        lambda c: c.topology.vpp > 1 and c.model["layers"] % (c.topology.pp * c.topology.vpp) > 0
    ),
    "two data-parallel ranks": lambda c: c.topology.dp == 2,
    "two context-parallel ranks": lambda c: c.topology.cp == 2,
    "sequence parallel": lambda c: c.sequence_parallel,
    "a window that hides nothing": lambda c: c.model.get("sliding_window") is not None,
    "one rank": lambda c: c.topology.world_size == 1,
    "two ranks": lambda c: c.topology.world_size == 2,
    "four ranks": lambda c: c.topology.world_size == 4,
    "more padding in the actor": lambda c: c.padded_vocabs[0] > c.padded_vocabs[1],
    "more padding in the engine": lambda c: c.padded_vocabs[0] < c.padded_vocabs[1],
    "no padding in the actor": lambda c: c.padded_vocabs[0] == c.model["vocab"],
    "an actor rank with padding only": (
        lambda c: c.model["vocab"] <= c.padded_vocabs[0] * (1 - 1 / c.topology.tp)
    ),
    "a rollout rank with padding only": (
        lambda c: c.model["vocab"] <= c.padded_vocabs[1] * (1 - 1 / c.topology.rollout_tp)
    ),
}


def test_the_draws_cover_the_space() -> None:
    """Without this, a new strategy or a new Hypothesis could quietly leave parts of it out."""
    assert len(CASES) == len(set(map(repr, CASES))) == NUM_CASES
    families = {(case.model["kind"], case.topology.rollout_tp) for case in CASES}
    assert families == set(product(FAMILIES, (1, 2))), "choose another SEED"
    modes = {(case.sync_mode, case.topology.rollout_tp) for case in CASES}
    assert modes == set(product(SYNC_MODES, (1, 2))), "choose another SEED"
    missing = [what for what, holds in PARTS.items() if not any(map(holds, CASES))]
    assert not missing, "choose another SEED"
