"""Micro-batches as tensors: what predicts what, with which weight, on which rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.actor.batching import MicroBatch, collate, micro_batches
from osft_mcore.actor.splitting import Rows, fixed_split, rows_of
from osft_mcore.config.schema import AlgorithmConfig, ParallelConfig
from osft_mcore.records import Example

TWO = [
    Example(
        prompt_token_ids=(11, 12, 13),
        response_token_ids=(21, 22),
        rollout_logprobs=(-0.5, -1.5),
        replica=1,
    ),
    Example(prompt_token_ids=(14,), response_token_ids=(23, 24, 25), trained=False),
]


def test_collate_by_hand() -> None:
    batch = collate(TWO, [0.5, 0.0], Rows(packed=False))
    assert batch.tokens_BS.tolist() == [[11, 12, 13, 21, 22], [14, 23, 24, 25, 0]]
    assert batch.packed_lengths == ()
    # Flat indices of the tokens 13, 21 and 14, 23, 24: each predicts the one after it.
    assert batch.predictor_T.tolist() == [2, 3, 5, 6, 7]
    assert batch.targets_T.tolist() == [21, 22, 23, 24, 25]
    assert batch.weights_T.tolist() == [0.5, 0.5, 0, 0, 0]
    assert batch.replicas_T.tolist() == [1, 1, 0, 0, 0]
    assert batch.rollout_logprobs_T[:2].tolist() == [-0.5, -1.5]
    assert batch.rollout_logprobs_T[2:].isnan().all(), "given answers have no log-probability"


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (4, 8), (5, 5), (8, 8)])
def test_the_width_is_the_smallest_multiple_that_fits(multiple: int, width: int) -> None:
    batch = collate(TWO, [0.5, 0.25], Rows(packed=False, row_multiple=multiple))
    assert batch.tokens_BS.shape == (2, width)
    assert (batch.tokens_BS[0, 5:] == 0).all()
    tokens, following = batch.tokens_BS.flatten(), batch.predictor_T + 1
    assert tokens[batch.predictor_T].tolist() == [13, 21, 14, 23, 24]
    assert torch.equal(tokens[following], batch.targets_T)


@pytest.mark.parametrize(
    ("multiple", "lengths"), [(1, (5, 4)), (2, (5, 4, 1)), (3, (5, 4)), (4, (5, 4, 3))]
)
def test_packed_by_hand(multiple: int, lengths: tuple[int, ...]) -> None:
    """The padding at the end is the last sequence, so that attention and rope cover it."""
    batch = collate(TWO, [0.5, 0.0], Rows(packed=True, row_multiple=multiple))
    padding = sum(lengths) - 9
    assert batch.tokens_BS.tolist() == [[11, 12, 13, 21, 22, 14, 23, 24, 25, *[0] * padding]]
    assert batch.packed_lengths == lengths
    assert batch.predictor_T.tolist() == [2, 3, 5, 6, 7]
    padded = collate(TWO, [0.5, 0.0], Rows(packed=False))
    assert torch.equal(batch.targets_T, padded.targets_T)
    assert torch.equal(batch.weights_T, padded.weights_T)


def test_shares_by_hand() -> None:
    """Two ranks: of four runs the first has the outer ones, the second the inner ones."""
    rows = rows_of(ParallelConfig(cp=2), packed=False)
    batch = collate(TWO, [0.5, 0.25], rows)
    assert batch.tokens_BS.tolist() == [[11, 12, 13, 21, 22, 0, 0, 0, 14, 23, 24, 25]]
    assert batch.packed_lengths == (8, 4)
    assert batch.share(cp=1, cp_rank=0) is batch
    outer, inner = (batch.share(cp=2, cp_rank=rank) for rank in range(2))
    assert outer.tokens_BS.tolist() == [[11, 12, 0, 0, 14, 25]]
    assert inner.tokens_BS.tolist() == [[13, 21, 22, 0, 23, 24]]
    assert outer.packed_lengths == inner.packed_lengths == (8, 4)
    # 13 predicts 21, 21 predicts 22; 14 predicts 23, and so on.
    assert (outer.predictor_T.tolist(), outer.targets_T.tolist()) == ([4], [23])
    assert (inner.predictor_T.tolist(), inner.targets_T.tolist()) == (
        [0, 1, 4, 5],
        [21, 22, 24, 25],
    )
    assert (outer.weights_T.tolist(), outer.replicas_T.tolist()) == ([0.25], [0])
    assert inner.weights_T.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert inner.rollout_logprobs_T[:2].tolist() == [-0.5, -1.5]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    cp=st.integers(2, 4),
    tp=st.integers(1, 3),
)
def test_shares_are_equal_and_together_the_whole(
    lengths: list[tuple[int, int]], cp: int, tp: int
) -> None:
    ids = iter(range(1, 1000))
    examples = [
        Example(
            prompt_token_ids=tuple(next(ids) for _ in range(prompt)),
            response_token_ids=tuple(next(ids) for _ in range(response)),
        )
        for prompt, response in lengths
    ]
    rows = rows_of(ParallelConfig(cp=cp, tp=tp, sequence_parallel=True), packed=True)
    whole = collate(examples, [1.0] * len(examples), rows)
    shares = [whole.share(cp=cp, cp_rank=cp_rank) for cp_rank in range(cp)]
    size = whole.tokens_BS.shape[1] // cp
    assert size % tp == 0
    assert [tuple(share.tokens_BS.shape) for share in shares] == [(1, size)] * cp
    together = torch.cat([share.tokens_BS for share in shares], dim=1)
    assert torch.equal(together.sort().values, whole.tokens_BS.sort().values)
    predicted = sorted(
        (int(share.tokens_BS[0, place]), int(target))
        for share in shares
        for place, target in zip(share.predictor_T, share.targets_T, strict=True)
    )
    tokens = whole.tokens_BS[0, whole.predictor_T].tolist()
    assert predicted == list(zip(tokens, whole.targets_T.tolist(), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_to_moves_every_tensor(packed: bool) -> None:
    batch = collate(TWO, [0.5, 0.25], Rows(packed=packed))
    moved = batch.to(torch.device("meta"))
    assert moved.packed_lengths == batch.packed_lengths
    tensors = set(MicroBatch.__slots__) - {"packed_lengths"}
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)


def numbered_examples(num: int) -> list[Example]:
    """Example i: prompt (i,) and 1 + i % 4 tokens of 1000 + i; every third is not trained on."""
    return [
        Example(
            prompt_token_ids=(i,), response_token_ids=(1000 + i,) * (1 + i % 4), trained=i % 3 != 2
        )
        for i in range(num)
    ]


def all_ranks(
    examples: list[Example], *, dp: int, micro_batch_size: int, algorithm: AlgorithmConfig
) -> list[list[MicroBatch]]:
    split = fixed_split(len(examples), dp=dp, micro_batch_size=micro_batch_size)
    return [
        micro_batches(
            examples,
            split,
            dp_rank=dp_rank,
            rows=Rows(packed=False, row_multiple=2),
            algorithm=algorithm,
            max_response_tokens=16,
        )
        for dp_rank in range(dp)
    ]


@given(dp=st.integers(1, 4), micro_batch_size=st.integers(1, 4), rounds=st.integers(1, 4))
def test_ranks_partition_the_batch(dp: int, micro_batch_size: int, rounds: int) -> None:
    """Every example on exactly one rank, in as many micro-batches of the same size on each."""
    num = dp * micro_batch_size * rounds
    by_rank = all_ranks(
        numbered_examples(num),
        dp=dp,
        micro_batch_size=micro_batch_size,
        algorithm=AlgorithmConfig(),
    )
    assert [len(batches) for batches in by_rank] == [rounds] * dp
    rows = [batch.tokens_BS[:, 0].tolist() for batches in by_rank for batch in batches]
    assert all(len(row) == micro_batch_size for row in rows)
    assert sorted(i for row in rows for i in row) == list(range(num))


@given(dp=st.integers(1, 3), micro_batch_size=st.integers(1, 3), rounds=st.integers(1, 3))
def test_global_weights_reach_their_tokens(dp: int, micro_batch_size: int, rounds: int) -> None:
    """1/N on each token of a trained response, 0 on the others, wherever they ended up."""
    examples = numbered_examples(dp * micro_batch_size * rounds)
    num_trained = sum(len(e.response_token_ids) for e in examples if e.trained)
    seen: dict[int, list[float]] = {}
    for batches in all_ranks(
        examples, dp=dp, micro_batch_size=micro_batch_size, algorithm=AlgorithmConfig()
    ):
        for batch in batches:
            for target, weight in zip(batch.targets_T, batch.weights_T, strict=True):
                seen.setdefault(int(target) - 1000, []).append(float(weight))
    for i, example in enumerate(examples):
        expected = 1 / num_trained if example.trained else 0.0
        assert seen[i] == pytest.approx([expected] * len(example.response_token_ids), rel=1e-6)


def test_per_microbatch_weights_follow_the_micro_batches() -> None:
    """Trained lengths (1, 2), (none, 4), (1, none), (3, 4): 1/4 of each micro-batch's mean."""
    algorithm = AlgorithmConfig(normalization="per_microbatch")
    first, second = all_ranks(numbered_examples(8), dp=2, micro_batch_size=2, algorithm=algorithm)
    totals = [[float(batch.weights_T.sum()) for batch in rank] for rank in (first, second)]
    assert totals == [pytest.approx([0.25, 0.25], rel=1e-6)] * 2
    largest = [float(batch.weights_T.max()) for batch in (first[0], second[0], first[1], second[1])]
    assert largest == pytest.approx([1 / 12, 1 / 16, 1 / 4, 1 / 28], rel=1e-6)
