"""A step's metrics, from the plain records of its phases."""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from osft_mcore.actor.result import UpdateResult
from osft_mcore.records import Response
from osft_mcore.weights.sync import PushReport

MAX_EXPONENT: Final = math.log(sys.float_info.max)


def response_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """Lengths (tokens) of the sampled answers and the share cut off by the token limit."""
    lengths = [len(response.token_ids) for response in responses]
    return {
        "rollout/response_length_mean": sum(lengths) / len(lengths),
        "rollout/response_length_median": float(statistics.median(lengths)),
        "rollout/response_length_min": float(min(lengths)),
        "rollout/response_length_max": float(max(lengths)),
        "rollout/cut_off_ratio": sum(r.truncated for r in responses) / len(responses),
        "rollout/num_tokens": float(sum(lengths)),
    }


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood."""
    return math.exp(nll) if nll < MAX_EXPONENT else math.inf


def update_metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Means over the optimizer updates that a step took; the agreement is the first one's.

    A figure that has no finite value is left out: the means, if all updates were skipped.
    """
    taken = [update for update in updates if not update.skipped]
    counts = {
        "optim/num_updates": float(len(taken)),
        "optim/num_skipped": float(len(updates) - len(taken)),
    }
    if not taken:
        return counts
    num_tokens = sum(u.num_tokens for u in taken)
    nll = sum(u.nll * u.num_tokens for u in taken) / max(num_tokens, 1)
    entropy = sum(u.entropy * u.num_tokens for u in taken) / max(num_tokens, 1)
    record = {
        "loss/loss": sum(u.loss for u in taken) / len(taken),
        "loss/nll": nll,
        "loss/perplexity": perplexity(nll),
        "loss/entropy": entropy,
        "loss/num_tokens": float(num_tokens),
        "train/padding_share": sum(u.padding_share for u in taken) / len(taken),
        "optim/grad_norm": sum(u.grad_norm for u in taken) / len(taken),
        **counts,
    }
    if (kl := _mean_kl(taken)) is not None:
        record["loss/kl"] = kl
    agreement = taken[0].agreement
    if agreement is not None:
        record["sync/logprob_diff_mean"] = agreement.mean
        record["sync/logprob_diff_max"] = agreement.max
    return {name: value for name, value in record.items() if math.isfinite(value)}


def _mean_kl(updates: Sequence[UpdateResult]) -> float | None:
    """Over the tokens of all updates; None without a reference model."""
    parts = [(u.kl, u.num_tokens) for u in updates if u.kl is not None]
    if not parts:
        return None
    return sum(kl * num for kl, num in parts) / max(sum(num for _, num in parts), 1)


def shown(record: Mapping[str, float], *names: str) -> dict[str, float]:
    """Figures for the console, without their prefix: those of `names` that the step has."""
    return {name.split("/")[1]: record[name] for name in names if name in record}


def push_metrics(push: PushReport) -> dict[str, float]:
    """Where the time of a weight push went, and what it moved against the least it could."""
    return {
        "sync/weight_version": float(push.version),
        "time/sync_push_s": push.seconds,
        "time/sync_pack_s": push.pack_s,
        "time/sync_transfer_s": push.transfer_s,
        "time/sync_write_s": push.write_s,
        "time/sync_verify_s": push.verify_s,
        "sync/bytes_received": float(push.bytes_received),
        "sync/bytes_least": float(push.bytes_least),
        "sync/bytes_ratio": push.ratio,
        "sync/bytes_local": float(push.bytes_local),
        "sync/bytes_aliased": float(push.bytes_aliased),
        "sync/peak_extra_bytes": float(push.peak_extra_bytes),
    }


def rollout_rows(
    responses: Sequence[Response], decode: Callable[[Sequence[int]], str]
) -> Iterator[dict[str, Any]]:
    """One JSON-able row an answer, token ids included: the exact training data of a step."""
    for response in responses:
        yield {
            "prompt_id": response.prompt.prompt_id,
            "sample": response.sample_index,
            "prompt": response.prompt.text,
            "response": decode(response.token_ids),
            "response_token_ids": response.token_ids,
            "num_tokens": len(response.token_ids),
            "truncated": response.truncated,
            "weight_version": response.weight_version,
            "replica": response.replica,
        }
