"""Digests tell every change of what they look at, wherever it is."""

import pytest
import torch
from bridge import CPU, actor_side, engine_side
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import materialise, model, random_checkpoint

from osft_mcore.errors import WeightError
from osft_mcore.weights import verify as verify_module
from osft_mcore.weights.execute import execute
from osft_mcore.weights.plan import Copy, make_plan
from osft_mcore.weights.schedule import make_schedule
from osft_mcore.weights.sides import check_sides
from osft_mcore.weights.verify import BATCH_ELEMENTS, check_delivered, digests, grid_of, make_audit

SHAPE = model("qwen3", kv_heads=2, tied=True)


def digest(table: torch.Tensor) -> int:
    return int(digests([(0, table)]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    across=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_one_changed_element_or_two_swapped_ones_change_the_digest(
    rows: int, across: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + across)
    values = torch.randn((rows, across), generator=generator).to(dtype)
    before = digest(values)
    assert before == digest(values.t().contiguous().t())
    at = data.draw(st.integers(0, values.numel() - 1))
    other = data.draw(st.integers(0, values.numel() - 1))
    changed = values.clone()
    changed.view(-1)[at] += 1
    assert digest(changed) != before
    swapped = values.clone()
    swapped.view(-1)[[at, other]] = swapped.view(-1)[[other, at]]
    assert (digest(swapped) == before) == torch.equal(swapped, values)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 4))
def test_parts_of_a_table_add_up(lengths: list[int], across: int) -> None:
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randn((length, across), generator=generator) for length in lengths]
    starts = [sum(lengths[:i]) * across for i in range(len(lengths))]
    numbers = digests(list(zip(starts, parts, strict=True)))
    assert numbers.shape == (len(parts),)
    assert int(numbers.sum()) == digest(torch.cat(parts))


def test_a_full_digest_reads_tables_larger_than_a_batch() -> None:
    audit, held, filled = delivered(4096)
    assert max(param.numel() for param in filled.values()) < BATCH_ELEMENTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "BATCH_ELEMENTS", 100)
        assert check(audit, held, filled, "full", 0) == ""
        filled["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
        assert "model.layers.2.mlp.down_proj.weight" in check(audit, held, filled, "full", 0)


def delivered(bucket_bytes: int) -> tuple:
    """One rank, tp 1 -> tp 1, after a transfer: audit, sources, targets."""
    sources, targets = actor_side(SHAPE, tp=1, world=1), engine_side(SHAPE, tp=1, world=1)
    checkpoint = random_checkpoint(SHAPE)
    plan = make_plan(sources, targets)
    schedule = make_schedule(plan, 0, dtype=torch.float32, bucket_bytes=bucket_bytes)
    held = {name: materialise(at, checkpoint) for name, at in sources[0].items()}
    filled = {name: torch.full(at.shape, torch.nan) for name, at in targets[0].items()}
    execute(schedule, held, filled, group=None)
    return make_audit(plan, schedule), held, filled


def check(audit: object, held: dict, filled: dict, verify: str, turn: int) -> str:
    try:
        check_delivered(
            audit,
            held,
            filled,
            verify=verify,
            turn=turn,
            group=None,
            device=CPU,  # type: ignore[arg-type]
        )
    except WeightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_every_parameter_that_differs_is_named(verify: str) -> None:
    audit, held, filled = delivered(4096)
    assert check(audit, held, filled, verify, 1) == ""
    for name, param in filled.items():
        before = param.clone()
        param += 1
        assert f"of {name!r} are not what rank 0 holds as" in check(audit, held, filled, verify, 1)
        param.copy_(before)
    assert check(audit, held, filled, "off", 1) == ""


@pytest.mark.parametrize(("num_rows", "across"), [(64, 512), (100, 40), (7, 4096), (96, 96)])
def test_samples_see_every_element_in_as_few_turns_as_possible(num_rows: int, across: int) -> None:
    copy = Copy(
        src_rank=0, src_param="p", src_start=0, dst_rank=1, dst_param="q", dst_start=0,
        length=num_rows, dim=0, row_elements=across,
    )  # fmt: skip
    seen = torch.zeros(num_rows, across, dtype=torch.int)
    first = grid_of(copy, "sample", 0, 10**9)
    for turn in range(first.row_step * first.column_step):
        grid = grid_of(copy, "sample", turn, 10**9)
        seen[grid.first_row :: grid.row_step, grid.first_column :: grid.column_step] += 1
    assert seen.min() == seen.max() == 1


def test_a_sample_looks_at_every_piece() -> None:
    copy = Copy(
        src_rank=0, src_param="p", src_start=0, dst_rank=1, dst_param="q", dst_start=0,
        length=4096, dim=0, row_elements=10,
    )  # fmt: skip
    assert grid_of(copy, "sample", 5, 10 * 7).row_step == 7


def test_padding_that_is_not_zero_is_named() -> None:
    audit, held, filled = delivered(4096)
    filled["model.embed_tokens.weight"][SHAPE.vocab + 2, 3] = 1e-30
    message = "rank 0: padding rows 101:128 of 'model.embed_tokens.weight' are not zero"
    assert check(audit, held, filled, "sample", 0).startswith(message)


def test_sides_that_fit_pass() -> None:
    for tp, pp, engine_tp in ((1, 1, 2), (2, 2, 4), (4, 1, 1), (1, 3, 2)):
        world = tp * pp * engine_tp
        check_sides(
            actor_side(SHAPE, tp=tp, pp=pp, world=world),
            engine_side(SHAPE, tp=engine_tp, world=world),
        )
