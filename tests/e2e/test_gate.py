"""The agreement gate stops a run whose engine does not hold the actor's weights."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines_vllm import bare_loop, join, random_prompts, run_config, start_engine
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.result import Agreement
from osft_mcore.config.check import check
from osft_mcore.config.schema import AlgorithmConfig, SyncConfig, TrainConfig
from osft_mcore.errors import AgreementError, DataError
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.train.gate import check_agreement, check_logprobs, check_versions
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.weights.sync import WeightSync

VOCAB = 67
NUM_STEPS = 4
TWO_REPLICAS = Topology(tp=2, pp=1, dp=1, rollout_tp=1)
Fault = Callable[[WeightSync, VllmEngine], None]
"""Replaces sync.push from step 2 on."""


def no_fault(_sync: WeightSync, _engine: VllmEngine) -> None:
    """The healthy run."""


def pushes_nothing(sync: WeightSync, engine: VllmEngine) -> None:
    """Every version number moves on, no weight does: only the log-probabilities can tell."""
    real, reports = sync.push, []

    def push() -> Any:
        if sync.version < 2:
            reports.append(real())
            return reports[-1]
        engine.begin_update()
        sync.version += 1
        engine.finish_update(sync.version)
        return reports[-1]

    sync.push = push  # type: ignore[method-assign]


def forgets_replica_1(sync: WeightSync, engine: VllmEngine) -> None:
    """The push arrives everywhere but in replica 1, which keeps what it had."""
    real = sync.push

    def push() -> Any:
        params = engine.begin_update()
        before = {name: param.clone() for name, param in params.items()}
        report = real()
        if sync.version > 2 and engine.context.coordinates.replica == 1:
            for name, param in engine.begin_update().items():
                param.copy_(before[name])
            engine.finish_update(sync.version)
        return report

    sync.push = push  # type: ignore[method-assign]


def counts_without_pushing(sync: WeightSync, engine: VllmEngine) -> None:
    real, reports = sync.push, []

    def push() -> Any:
        if sync.version < 2:
            reports.append(real())
            return reports[-1]
        engine.finish_update(sync.version)
        sync.version += 1
        return reports[-1]

    sync.push = push  # type: ignore[method-assign]


def breaks_replica_1(sync: WeightSync, engine: VllmEngine) -> None:
    """The push leaves NaN in one parameter of replica 1."""
    real = sync.push

    def push() -> Any:
        report = real()
        if sync.version > 2 and engine.context.coordinates.replica == 1:
            engine.begin_update()["model.norm.weight"].fill_(math.nan)
            engine.finish_update(sync.version)
        return report

    sync.push = push  # type: ignore[method-assign]


def fit(_rank: int, folder: Path, out: Path, fault: Fault, **rollout: Any) -> str:
    """The real loop without evaluation; returns the gate's message, or nothing."""
    topology, context = TWO_REPLICAS, join(TWO_REPLICAS)
    train = TrainConfig(
        steps=NUM_STEPS, prompts_per_step=8, prompts_per_update=4, micro_batch_size=4,
        lr=0.01, lr_warmup_steps=0,
    )  # fmt: skip
    # A fault in memory that the actor reads as well would be a fault of both.
    config = run_config(folder, topology, train=train, sync=SyncConfig(mode="copy"))
    algorithm = AlgorithmConfig(train_on_truncated=rollout.pop("train_on_truncated", True))
    config = replace(config, rollout=replace(config.rollout, **rollout), algorithm=algorithm)
    check(config, world_size=topology.world_size, phase="train", device="cpu", need_files=False)
    actor = build_actor(config, context)
    engine = start_engine(config, context)
    sync = build_sync(config, actor, engine)
    prompts = random_prompts(16, vocab=VOCAB)
    loop = bare_loop(config, actor, engine, sync, prompts=prompts, num_steps=NUM_STEPS, out=out)
    fault(sync, engine)
    sync.push()
    try:
        loop.fit()
    except (AgreementError, DataError) as error:
        return str(error)
    return ""


def run(tmp_path: Path, fault: Fault, **rollout: Any) -> tuple[str, list[dict[str, float]]]:
    """The gate's message and the metrics of the completed steps."""
    folder = save_random_model(tmp_path / "model", vocab=VOCAB, hidden=128)
    out = tmp_path / "run"
    messages = run_ranks(
        fit, TWO_REPLICAS.world_size, folder=folder, out=out, fault=fault, **rollout
    )
    assert len(set(messages)) == 1, messages
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return messages[0], [json.loads(line) for line in lines]


@pytest.mark.parametrize("rollout", [{}, {"top_p": 0.8}, {"top_k": 5, "tau_sample": 1.0}], ids=str)
def test_healthy_run_agrees_on_every_step(tmp_path: Path, rollout: dict[str, Any]) -> None:
    message, metrics = run(tmp_path, no_fault, **rollout)
    assert message == ""
    assert [record["step"] for record in metrics] == list(range(1, NUM_STEPS + 1))
    assert max(record["sync/logprob_diff_max"] for record in metrics) <= 1e-3
    # The weights move: without a push every one of these steps would be far off.
    assert len({record["loss/nll"] for record in metrics}) == NUM_STEPS


@pytest.mark.parametrize(("fault", "replica"), [(pushes_nothing, "[01]"), (forgets_replica_1, "1")])
def test_stale_weights_stop_the_run(tmp_path: Path, fault: Fault, replica: str) -> None:
    message, metrics = run(tmp_path, fault)
    # Step 2 still samples from the last real push.
    assert [record["step"] for record in metrics] == [1, 2]
    pattern = rf"step 3: rollout replica {replica} and the actor disagree by (\S+) nats"
    with pytest.raises(AgreementError, match=pattern):
        raise AgreementError(message)
    assert float(message.split("disagree by ")[1].split()[0]) > 0.1
    assert "sync.max_logprob_diff" in message


def test_a_version_that_did_not_arrive_stops_the_run(tmp_path: Path) -> None:
    message, metrics = run(tmp_path, counts_without_pushing)
    assert [record["step"] for record in metrics] == [1, 2]
    assert "step 3: rollout replicas [0, 1] sampled with weight version [2]" in message
    assert "the actor is at version 3" in message


def test_broken_weights_stop_the_run(tmp_path: Path) -> None:
    message, metrics = run(tmp_path, breaks_replica_1)
    assert [record["step"] for record in metrics] == [1, 2]
    assert message.startswith("step 3: rollout replicas [1] gave NaN")


def test_a_batch_with_nothing_to_train_on_stops_the_run(tmp_path: Path) -> None:
    options = {"max_response_tokens": 2, "train_on_truncated": False}
    message, metrics = run(tmp_path, no_fault, **options)
    assert metrics == []
    assert message.startswith("step 1: every answer of an update was cut off")
    assert "rollout.max_response_tokens = 2" in message


def response(*, logprobs: tuple[float, ...] = (-1.0,), version: int = 1, replica: int) -> Response:
    prompt = Prompt(row=0, prompt_id="a", data_source="b", text="", token_ids=(3,), ground_truth="")
    return Response(
        prompt=prompt,
        sample_index=0,
        token_ids=(4,) * len(logprobs),
        token_logprobs=logprobs,
        truncated=False,
        weight_version=version,
        replica=replica,
    )


def judge(agreement: Agreement, dtype: str = "fp32", **options: float) -> None:
    check_agreement(agreement, sync=SyncConfig(**options), dtype=dtype, step=9, tau_sample=0.6)


@pytest.mark.parametrize(("dtype", "largest", "mean"), [("fp32", 1e-3, 1e-4), ("bf16", 2.0, 0.05)])
def test_thresholds_are_the_dtypes_own(dtype: str, largest: float, mean: float) -> None:
    judge(Agreement(mean=mean, max_by_replica=(0.0, largest)), dtype)
    with pytest.raises(AgreementError, match=r"step 9: rollout replica 1 .*max_logprob_diff"):
        judge(Agreement(mean=mean, max_by_replica=(0.0, 1.01 * largest)), dtype)
    with pytest.raises(AgreementError, match=r"step 9: .*replica 1 .*mean_logprob_diff"):
        judge(Agreement(mean=1.01 * mean, max_by_replica=(0.0, largest)), dtype)


def test_options_replace_the_thresholds() -> None:
    agreement = Agreement(mean=0.3, max_by_replica=(0.4,))
    judge(agreement, max_logprob_diff=0.5, mean_logprob_diff=0.35)
    with pytest.raises(AgreementError, match=r"limit 0\.35, option sync\.max_logprob_diff"):
        judge(agreement, max_logprob_diff=0.35, mean_logprob_diff=0.35)
    with pytest.raises(AgreementError, match=r"limit 0\.25, option sync\.mean_logprob_diff"):
        judge(agreement, max_logprob_diff=0.5, mean_logprob_diff=0.25)
    # 0 is a threshold, not "unset".
    with pytest.raises(AgreementError, match="limit 0, option"):
        judge(agreement, max_logprob_diff=0.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("replica", [0, 1, 2])
def test_nan_and_infinity_never_pass(broken: float, replica: int) -> None:
    by_replica = [0.0, 0.0, 0.0]
    by_replica[replica] = broken
    with pytest.raises(AgreementError, match=rf"replica {replica} and the actor disagree by inf"):
        judge(Agreement(mean=0.0, max_by_replica=tuple(by_replica)), max_logprob_diff=1e9)
    with pytest.raises(AgreementError, match=r"sync\.mean_logprob_diff"):
        judge(Agreement(mean=broken, max_by_replica=(0.0,)), mean_logprob_diff=1e9)


def test_nan_from_the_engine_is_named() -> None:
    good, bad = response(replica=0), response(logprobs=(-1.0, math.nan), replica=3)
    check_logprobs([good], step=2)
    with pytest.raises(AgreementError, match=r"step 2: rollout replicas \[3\] gave NaN"):
        check_logprobs([good, bad], step=2)


def test_every_stale_replica_is_named() -> None:
    old, new = response(version=1, replica=2), response(version=2, replica=0)
    check_versions([new], version=2, step=5)
    with pytest.raises(
        AgreementError, match=r"step 5: .*replicas \[2\] .*version \[1\].* at version 2"
    ):
        check_versions([new, old], version=2, step=5)
