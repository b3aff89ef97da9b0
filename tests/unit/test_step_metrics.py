"""The figures of a step, from values small enough to work out by hand."""

import json
import math

import pytest

from osft_mcore.actor.result import Agreement, UpdateResult
from osft_mcore.records import Prompt, Response
from osft_mcore.train.step_metrics import (
    push_metrics,
    response_metrics,
    rollout_rows,
    shown,
    update_metrics,
)
from osft_mcore.weights.sync import PushReport

PROMPT = Prompt(
    row=3, prompt_id="sums/3", data_source="sums", text="1+1=?", token_ids=(5, 6), ground_truth="2"
)


def response(num_tokens: int, *, truncated: bool = False, sample: int = 0) -> Response:
    return Response(
        prompt=PROMPT,
        sample_index=sample,
        token_ids=tuple(range(num_tokens)),
        token_logprobs=(-1.0,) * num_tokens,
        truncated=truncated,
        weight_version=7,
        replica=1,
    )


def update(
    *,
    num_tokens: int,
    nll: float,
    entropy: float,
    kl: float | None = None,
    not_finite: str = "",
    **others: float,
) -> UpdateResult:
    diff = others.get("diff")
    agreement = None
    if diff is not None:
        agreement = Agreement(mean=diff, max_by_replica=(2 * diff, 3 * diff))
    return UpdateResult(
        loss=others.get("loss", 0.0),
        nll=nll,
        entropy=entropy,
        grad_norm=others.get("grad_norm", 0.0),
        num_tokens=num_tokens,
        padding_share=others.get("padding", 0.0),
        agreement=agreement,
        kl=kl,
        not_finite=not_finite,
    )


def test_lengths_and_cut_offs() -> None:
    found = response_metrics([response(2), response(3), response(3), response(8, truncated=True)])
    assert found == {
        "rollout/response_length_mean": 4.0,
        "rollout/response_length_median": 3.0,
        "rollout/response_length_min": 2.0,
        "rollout/response_length_max": 8.0,
        "rollout/cut_off_ratio": 0.25,
        "rollout/num_tokens": 16.0,
    }


def test_token_means_weigh_updates_by_their_tokens() -> None:
    found = update_metrics(
        [
            update(
                num_tokens=10, nll=1.0, entropy=0.5, loss=1.0, grad_norm=2.0, diff=1e-5, padding=0.5
            ),
            update(num_tokens=30, nll=2.0, entropy=0.1, loss=4.0, grad_norm=3.0, diff=9.0),
        ]
    )
    assert found == pytest.approx(
        {
            "loss/loss": 2.5,
            "train/padding_share": 0.25,
            "loss/nll": 1.75,
            "loss/perplexity": math.exp(1.75),
            "loss/entropy": 0.2,
            "loss/num_tokens": 40.0,
            "optim/grad_norm": 2.5,
            "optim/num_updates": 2.0,
            "optim/num_skipped": 0.0,
            # Of the first update: before the second one the actor has moved.
            "sync/logprob_diff_mean": 1e-5,
            "sync/logprob_diff_max": 3e-5,
        }
    )


def test_skipped_updates_are_counted_and_nothing_else() -> None:
    nan = math.nan
    skipped = update(
        num_tokens=9, nll=nan, entropy=nan, loss=nan, grad_norm=nan, diff=5.0, not_finite="loss"
    )
    taken = [
        update(
            num_tokens=10, nll=1.0, entropy=0.5, loss=1.0, grad_norm=2.0, diff=1e-5, padding=0.5
        ),
        update(num_tokens=30, nll=2.0, entropy=0.1, loss=4.0, grad_norm=3.0, diff=9.0),
    ]
    assert update_metrics([skipped, taken[0], skipped, taken[1]]) == {
        **update_metrics(taken), "optim/num_skipped": 2.0
    }  # fmt: skip
    nothing = {"optim/num_updates": 0.0, "optim/num_skipped": 2.0}
    assert update_metrics([skipped, skipped]) == nothing


def test_the_kl_is_told_where_there_is_a_reference() -> None:
    """A mean over tokens; skipped updates have none."""
    one = update(num_tokens=10, nll=1.0, entropy=0.5, kl=0.1)
    other = update(num_tokens=30, nll=2.0, entropy=0.1, kl=0.5)
    skipped = update(num_tokens=9, nll=1.0, entropy=1.0, kl=math.nan, not_finite="loss")
    assert update_metrics([one, skipped, other])["loss/kl"] == pytest.approx(0.4)
    nothing = [update(num_tokens=0, nll=0.0, entropy=0.0, kl=0.0)]
    assert update_metrics(nothing)["loss/kl"] == 0.0
    assert "loss/kl" not in update_metrics([update(num_tokens=10, nll=1.0, entropy=0.5)])


def test_a_figure_that_is_not_finite_is_left_out() -> None:
    """exp() of a large loss overflows; the update was sound all the same."""
    found = update_metrics([update(num_tokens=1, nll=800.0, entropy=math.nan, loss=800.0)])
    assert found["loss/nll"] == 800.0
    assert not {"loss/perplexity", "loss/entropy"} & found.keys()


def test_the_console_shows_the_figures_that_a_step_has() -> None:
    record = {"loss/nll": 0.5, "optim/lr": 1e-3, "optim/num_updates": 2.0}
    assert shown(record, "loss/nll", "sync/logprob_diff_max", "optim/lr") == {
        "nll": 0.5, "lr": 1e-3
    }  # fmt: skip


def test_given_answers_have_no_agreement() -> None:
    found = update_metrics([update(num_tokens=1, nll=0.0, entropy=0.0)])
    assert not [name for name in found if name.startswith("sync/")]


def test_a_step_without_trained_tokens_is_not_a_division_by_zero() -> None:
    """Every answer was cut off and algorithm.train_on_truncated is off."""
    found = update_metrics([update(num_tokens=0, nll=0.0, entropy=0.0)])
    assert found["loss/nll"] == 0.0
    assert found["loss/perplexity"] == 1.0


def test_rollout_rows_keep_what_was_trained_on() -> None:
    rows = list(
        rollout_rows(
            [response(2), response(3, truncated=True, sample=1)],
            lambda token_ids: "".join(map(str, token_ids)),
        )
    )
    assert json.loads(json.dumps(rows[1])) == {
        "prompt_id": "sums/3",
        "sample": 1,
        "prompt": "1+1=?",
        "response": "012",
        "response_token_ids": [0, 1, 2],
        "num_tokens": 3,
        "truncated": True,
        "weight_version": 7,
        "replica": 1,
    }
    assert [row["sample"] for row in rows] == [0, 1]


def test_a_push_is_logged_by_phase_and_against_the_least_bytes() -> None:
    push = PushReport(
        version=4, seconds=2.0, pack_s=0.1, transfer_s=0.2, write_s=0.3, verify_s=0.4,
        bytes_received=600, bytes_least=400, bytes_local=70, bytes_aliased=8, peak_extra_bytes=9,
    )  # fmt: skip
    assert push_metrics(push) == {
        "sync/weight_version": 4.0,
        "time/sync_push_s": 2.0,
        "time/sync_pack_s": 0.1,
        "time/sync_transfer_s": 0.2,
        "time/sync_write_s": 0.3,
        "time/sync_verify_s": 0.4,
        "sync/bytes_received": 600.0,
        "sync/bytes_least": 400.0,
        "sync/bytes_ratio": 1.5,
        "sync/bytes_local": 70.0,
        "sync/bytes_aliased": 8.0,
        "sync/peak_extra_bytes": 9.0,
    }
