"""sync.mode=reload: whole tensors through vLLM's own loader into vLLM as it comes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from engines_vllm import (
    join,
    largest,
    largest_difference,
    random_prompts,
    run_config,
    sampling,
    start_engine,
    stock_answers,
)
from models import save_random_model
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor

from osft_mcore.config.schema import SyncConfig
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Response
from osft_mcore.rollout import vllm_reload
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.weights.safetensors_io import read_hf_index

VOCAB = 67
TOLERANCE = 1e-4
PROMPTS = random_prompts(6, vocab=VOCAB)
GREEDY, TAU_1 = sampling(0.0), sampling(1.0)
ASKED = (GREEDY, TAU_1)
TP1 = Topology(tp=1, pp=1, dp=1, rollout_tp=1)
TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
EMBEDDING = "model.embed_tokens.weight"
VALUE = "model.layers.1.self_attn.v_proj.weight"
"""The last one of its layer, so that the others wait in vLLM while it is missing."""

Tensors = Iterator[tuple[str, Tensor]]
Answers = list[list[tuple[list[int], list[float]]]]


def tensors_of(folder: Path) -> Tensors:
    """Every Hugging Face tensor, in fresh memory."""
    for name, path in read_hf_index(folder).items():
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


def open_reload_engine(folder: Path, topology: Topology) -> VllmEngine:
    config = run_config(folder, topology, sync=SyncConfig(mode="reload"))
    return start_engine(config, join(topology))


def take(engine: VllmEngine, tensors: Tensors, version: int = 1) -> None:
    engine.begin_update()
    engine.reload(tensors)
    engine.finish_update(version)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape with different weights."""
    # Qwen2 has biases, which vLLM reloads in another way than weights.
    kind = "qwen2" if request.param else "qwen3"
    parent = tmp_path_factory.mktemp("reload")
    return [
        save_random_model(
            parent / str(seed), kind, vocab=VOCAB, hidden=128, tied=request.param, seed=seed
        )
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def stock(folders: list[Path]) -> list[Answers]:
    """What vLLM answers that never knew other weights, by folder."""
    return [
        run_ranks(stock_answers, 1, folder=folder, prompts=PROMPTS, asked=ASKED)[0]
        for folder in folders
    ]


def reload_each(_rank: int, folders: list[Path], topology: Topology) -> list[list[list[Response]]]:
    """Answers after each reload, by ASKED."""
    engine = open_reload_engine(folders[0], topology)
    answers = []
    for version, folder in enumerate(folders):
        take(engine, tensors_of(folder), version)
        answers.append([engine.generate(PROMPTS, how) for how in ASKED])
    return answers


@pytest.mark.parametrize("topology", [TP1, TP2], ids=["tp1", "tp2"])
def test_reloaded_weights_answer_as_loaded_ones(
    topology: Topology, folders: list[Path], stock: list[Answers]
) -> None:
    ranks = run_ranks(reload_each, topology.world_size, folders=folders, topology=topology)
    assert all(told == ranks[0] for told in ranks), "ranks saw different answers"
    assert {r.weight_version for answers in ranks[0][1] for r in answers} == {1}
    for folder, answers, expected in zip(folders, ranks[0], stock, strict=True):
        differences = [difference_from_stock(*pair) for pair in zip(answers, expected, strict=True)]
        # Greedy answers carry the model's own distribution, not certainty.
        differences += [largest_difference(folder, responses, TAU_1) for responses in answers]
        assert all(difference <= TOLERANCE for difference in differences), differences


def difference_from_stock(
    responses: Sequence[Response], expected: Sequence[tuple[list[int], list[float]]]
) -> float:
    assert [list(r.token_ids) for r in responses] == [ids for ids, _ in expected]
    return largest(
        abs(mine - theirs)
        for response, (_, logprobs) in zip(responses, expected, strict=True)
        for mine, theirs in zip(response.token_logprobs, logprobs, strict=True)
    )


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: ((n, t) for n, t in tensors if n != name)


def unknown(tensors: Tensors) -> Tensors:
    yield from tensors
    yield "model.extra.weight", torch.zeros(3)


def twice(tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        yield name, tensor
        if name == VALUE:
            yield name, tensor


def cut_short(tensors: Tensors) -> Tensors:
    return ((name, tensor[:5] if name == VALUE else tensor) for name, tensor in tensors)


def broken_off(tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        if name == VALUE:
            raise WeightError("the stream broke off")
        yield name, tensor


SPOILT = {
    f"tensor '{VALUE}' is missing": without(VALUE),
    f"tensor '{EMBEDDING}' is missing": without(EMBEDDING),
    "tensor 'model.extra.weight' is not one of this model's": unknown,
    f"tensor '{VALUE}' came twice": twice,
    f"tensor '{VALUE}' has shape (5, 128), expected (64, 128)": cut_short,
}


def spoilt_reloads(_rank: int, folder: Path) -> tuple[dict[str, str], list[list[Response]]]:
    """What each spoilt stream raises, and the answers after a good one that follows them all."""
    engine = open_reload_engine(folder, TP2)
    raised = {}
    for problem, spoil in SPOILT.items():
        with pytest.raises(WeightError) as caught:
            take(engine, spoil(tensors_of(folder)))
        raised[problem] = str(caught.value)
        with pytest.raises(WeightError, match="a push must finish first"):
            engine.generate(PROMPTS, TAU_1)
    with pytest.raises(WeightError, match="the stream broke off"):
        take(engine, broken_off(tensors_of(folder)))
    take(engine, tensors_of(folder))
    return raised, [engine.generate(PROMPTS, how) for how in ASKED]


def test_what_a_stream_lacks_is_named_and_the_next_one_is_good(
    folders: list[Path], stock: list[Answers]
) -> None:
    for raised, answers in run_ranks(spoilt_reloads, 2, folder=folders[0]):
        for problem, message in raised.items():
            assert problem in message.splitlines()
        for responses, expected in zip(answers, stock[0], strict=True):
            assert difference_from_stock(responses, expected) <= TOLERANCE


def one_bit_up(tensors: Tensors) -> Tensors:
    """The embedding with every element at the next number."""
    for name, tensor in tensors:
        up = torch.full_like(tensor, torch.inf)
        yield name, tensor.nextafter(up) if name == EMBEDDING else tensor


def reload_without_repacking(_rank: int, folder: Path) -> str:
    engine = open_reload_engine(folder, TP2)
    take(engine, tensors_of(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_reload, "repack_tied_head", lambda head: None)
        take(engine, tensors_of(folder))
        with pytest.raises(WeightError) as caught:
            take(engine, one_bit_up(tensors_of(folder)))
    take(engine, one_bit_up(tensors_of(folder)))
    return str(caught.value)


def test_a_tied_head_that_stays_behind_is_caught(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, vocab=VOCAB, hidden=128, tied=True)
    for message in run_ranks(reload_without_repacking, 2, folder=folder):
        assert message.startswith("lm_head.weight is stale")


def push_without_repacking(_rank: int, folder: Path) -> tuple[str, str]:
    """A push whose tied head stays behind: what it says, and what the engine then says."""
    config = run_config(folder, TP2, sync=SyncConfig(mode="reload"))
    context = join(TP2)
    actor, engine = build_actor(config, context), start_engine(config, context)
    sync = build_sync(config, actor, engine)
    sync.push()
    for parameter in actor.parameters().values():
        parameter *= 1.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_reload, "repack_tied_head", lambda head: None)
        with pytest.raises(WeightError) as pushed:
            sync.push()
    with pytest.raises(WeightError) as asked:
        engine.generate(PROMPTS, TAU_1)
    sync.push()
    assert engine.generate(PROMPTS, TAU_1)[0].weight_version == 2
    return str(pushed.value), str(asked.value)


def test_a_push_with_a_stale_tied_head_fails_on_all_ranks_by_name(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, vocab=VOCAB, hidden=128, tied=True)
    for pushed, asked in run_ranks(push_without_repacking, 2, folder=folder):
        assert [line.split(":")[:2] for line in pushed.splitlines()] == [
            [f"rank {rank}", " lm_head.weight is stale"] for rank in range(2)
        ]
        assert asked.startswith(f"rollout: weight version 2 was not delivered: {pushed}")


def share_with_packed(_rank: int, folder: Path) -> None:
    engine = open_reload_engine(folder, TP1)
    with pytest.raises(WeightError, match=r"sync\.mode=reload lets vLLM pack"):
        engine.share({"model.norm.weight": torch.ones(128)})


def test_packed_weights_cannot_be_shared(tmp_path: Path) -> None:
    run_ranks(share_with_packed, 1, folder=save_random_model(tmp_path, vocab=VOCAB, hidden=128))
