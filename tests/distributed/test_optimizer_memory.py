"""An optimizer update writes the weights where they lie: engines may read the same memory."""

from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import pytest
import torch
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.start import build_actor

Dtype = Literal["bf16", "fp32"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp32")
VOCAB, MULTIPLE = 67, 64
"""61 rows of padding."""
# Rates so high that no bf16 value is the same after a step: Adam moves what has a gradient by about
# lr, and decay takes 5% off the embedding of a token that no example contains.
TRAIN = TrainConfig(lr=0.1, weight_decay=0.5, micro_batch_size=2)
EXAMPLES = [
    Example(prompt_token_ids=(i, 5), response_token_ids=(9 + i, 3, 1 + i)) for i in range(4)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What two updates did to one parameter's memory as it was before them."""

    stayed: bool
    """The actor still has it at that address."""
    changed: tuple[float, ...]
    """By update, the share of its values, padding aside, that are others than before."""
    padding_rows: int
    padding_is_zero: bool


def build(folder: Path, context: ParallelContext, dtype: Dtype, distributed: bool) -> Actor:
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype=dtype, vocab_multiple=MULTIPLE),
        parallel=ParallelConfig(dp=context.topology.dp, distributed_optimizer=distributed),
        train=TRAIN,
    )
    return build_actor(config, context)


def update_twice(actor: Actor) -> dict[str, Weight]:
    memory = actor.parameters()
    values = [{name: tensor.clone() for name, tensor in memory.items()}]
    for _ in range(2):
        actor.update(EXAMPLES, tau_sample=1.0, lr=TRAIN.lr)
        values.append({name: tensor.clone() for name, tensor in memory.items()})
    found = {}
    for name, tensor in actor.parameters().items():
        real = VOCAB if name.startswith(("embedding.", "output_layer.")) else len(tensor)
        changed = (b[name][:real].ne(a[name][:real]) for a, b in pairwise(values))
        found[name] = Weight(
            stayed=tensor.data_ptr() == memory[name].data_ptr(),
            changed=tuple(float(part.float().mean()) for part in changed),
            padding_rows=len(tensor) - real,
            padding_is_zero=not memory[name][real:].any(),
        )
    return found


def update_all(
    _rank: int, folder: Path, topology: Topology
) -> dict[tuple[Dtype, bool], dict[str, Weight]]:
    context = join_groups(topology, device=torch.device("cpu"))
    return {
        case: update_twice(build(folder, context, *case)) for case in product(DTYPES, (True, False))
    }


@pytest.mark.parametrize("dp", [1, 2])
def test_an_update_writes_the_weights_in_place(tmp_path: Path, dp: int) -> None:
    folder = save_random_model(tmp_path, vocab=VOCAB, layers=1)
    by_rank = run_ranks(update_all, dp, folder=folder, topology=Topology(tp=1, pp=1, dp=dp))
    for rank, found in enumerate(by_rank):
        for (dtype, distributed), weights in found.items():
            at = f"rank {rank}, {dtype}, distributed_optimizer={distributed}"
            padded = [name for name, weight in weights.items() if weight.padding_rows]
            assert len(padded) == 2, at
            for name, weight in weights.items():
                assert weight.stayed, f"{at}: {name} has moved"
                first, second = weight.changed
                assert first == 1, f"{at}: {name}"
                # A gradient that turns round can leave a value where it is.
                assert second > 0.9, f"{at}: {name}"
                assert weight.padding_is_zero, f"{at}: {name}"
