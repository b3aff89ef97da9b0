"""Both ways of pushing, on the ranks of one case: checked against each other, timed, weighed."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.errors import WeightError
from osft_mcore.parallel.groups import ParallelContext, all_gather_json, wait_for_all
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.train.vllm import build_engine
from osft_mcore.weights.bound import missing_elements
from sync_benchmark.cases import Case, run_config
from sync_benchmark.memory import peak_extra_bytes
from sync_benchmark.rows import Row, Way, make_row
from sync_benchmark.usual import UsualPush, vllm_model

FACTOR = -1.03125
"""Every weight is multiplied by this before every push, so that there is always news to deliver."""

Push = Callable[[], int]
"""Delivers the actor's weights; returns the bytes that all ranks together received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An actor, its engine, and two ways from one to the other."""

    actor: Actor
    engine: VllmEngine
    ours: Push
    usual: Push

    def change_weights(self) -> None:
        """As training would, only in a way that is the same for every layout."""
        for tensor in self.actor.parameters().values():
            tensor.mul_(FACTOR)

    def engine_weights(self) -> dict[str, Tensor]:
        """A copy of what this rank's engine holds."""
        model = vllm_model(self.engine)
        return {name: param.data.clone() for name, param in model.named_parameters()}


def measure(case: Case, folder: Path, context: ParallelContext) -> Row:
    """Measure one case on the model in `folder`; returns the same row on every rank.

    Every rank must call. Raises WeightError on every rank if the two ways do not deliver the same.
    """
    with built(run_config(case, folder), context) as bench:
        check_delivery(bench)
        rounds = [
            (_seconds(bench, bench.ours), _seconds(bench, bench.usual)) for _ in range(case.rounds)
        ]
        ours, usual = zip(*rounds, strict=True)
        shape, topology = bench.actor.shape, context.topology
        missing = missing_elements(bench.actor.layouts, engine_layouts(shape, topology))
        row = make_row(
            num_parameters=shape.num_parameters,
            num_ranks=topology.world_size,
            actor=case.actor,
            rollout=case.rollout,
            mode=case.sync.mode,
            verify=case.sync.verify,
            dtype=case.dtype,
            ours=_way(bench, bench.ours, ours),
            usual=_way(bench, bench.usual, usual),
            bytes_least=sum(missing.values()) * bench.actor.dtype.itemsize,
            bucket_bytes=case.sync.bucket_bytes,
        )
        check_delivery(bench)
    return row


@contextlib.contextmanager
def built(config: RunConfig, context: ParallelContext) -> Iterator[Bench]:
    """The actor, the engine and both ways, until the end. Every rank must call."""
    actor = build_actor(config, context)
    nobody = ChatTokenizer(eos_token_ids=frozenset({1}), response_eos_id=1, hf_tokenizer=None)
    engine = build_engine(config, context, nobody)
    try:
        sync = build_sync(config, actor, engine)
        usual = UsualPush(engine, context, actor.shape, actor.parameters, dtype=actor.dtype)
        yield Bench(
            actor=actor,
            engine=engine,
            ours=lambda: sync.push().bytes_received,
            usual=lambda: usual.push(sync.version),
        )
    finally:
        engine.close()


def check_delivery(bench: Bench) -> None:
    """Push by ours, the usual way and ours, each time other weights. Every rank must call.

    Raises WeightError on every rank if the engine's weights after one way are not those after the
    other, changed as the actor's were.
    """
    bench.ours()
    for name, push in (("the usual way", bench.usual), ("ours", bench.ours)):
        expected = bench.engine_weights()
        bench.change_weights()
        push()
        found = bench.engine_weights()
        wrong = [key for key in found if not found[key].equal(expected[key].mul_(FACTOR))]
        everywhere = all_gather_json(wrong, bench.actor.context)
        if any(everywhere):
            raise WeightError(
                "the two ways do not deliver the same weights; pushed by "
                f"{name}, these differ, by rank: {everywhere}"
            )


def _seconds(bench: Bench, push: Push) -> float:
    """Seconds of one push of new weights, on the slowest rank. Every rank must call."""
    context = bench.actor.context
    bench.change_weights()
    wait_for_all(context)
    started = time.perf_counter()
    push()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    seconds = seconds.to(context.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=context.world_group)
    return float(seconds)


def _way(bench: Bench, push: Push, seconds: tuple[float, ...]) -> Way:
    """Two more pushes: one for its bytes, one for its memory. Every rank must call."""
    context = bench.actor.context
    received = push()
    peaks = all_gather_json(peak_extra_bytes(push, context.device), context)
    return Way(seconds=seconds, bytes_received=received, peak_extra_bytes=max(peaks))
