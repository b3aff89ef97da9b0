"""The agreement gate: the engine must have sampled from the weights that are being trained."""

import math
from collections.abc import Sequence

from osft_mcore.actor.result import Agreement
from osft_mcore.config.schema import MAX_LOGPROB_DIFF, MEAN_LOGPROB_DIFF, SyncConfig
from osft_mcore.errors import AgreementError
from osft_mcore.records import Response


def check_versions(responses: Sequence[Response], *, version: int, step: int) -> None:
    """Raise AgreementError if an answer was sampled under other weights than the last push."""
    stale = sorted({r.replica for r in responses if r.weight_version != version})
    if stale:
        found = sorted({r.weight_version for r in responses if r.weight_version != version})
        raise AgreementError(
            f"step {step}: rollout replicas {stale} sampled with weight version {found}, the "
            f"actor is at version {version}; a weight push did not reach them"
        )


def check_logprobs(responses: Sequence[Response], *, step: int) -> None:
    """Raise AgreementError if the engine could not tell how likely its own tokens were.

    A NaN on its side means broken weights; the comparison takes it for "not told" and skips it.
    """
    broken = sorted({r.replica for r in responses if any(map(math.isnan, r.token_logprobs))})
    if broken:
        raise AgreementError(
            f"step {step}: rollout replicas {broken} gave NaN as the log-probability of a token "
            "that they sampled: the engine's weights are broken"
        )


def check_agreement(
    agreement: Agreement | None, *, sync: SyncConfig, dtype: str, step: int, tau_sample: float
) -> None:
    """Raise AgreementError if engine and actor give the same tokens different probabilities."""
    assert agreement is not None, "rollout responses always carry log-probabilities"
    limit = MAX_LOGPROB_DIFF[dtype] if sync.max_logprob_diff is None else sync.max_logprob_diff
    mean_limit = (
        MEAN_LOGPROB_DIFF[dtype] if sync.mean_logprob_diff is None else sync.mean_logprob_diff
    )
    # max() would pass over a NaN.
    by_replica = [math.inf if math.isnan(diff) else diff for diff in agreement.max_by_replica]
    worst = max(by_replica)
    replica = by_replica.index(worst)
    if worst > limit:
        raise AgreementError(
            f"step {step}: rollout replica {replica} and the actor disagree by {worst:.3g} nats on "
            f"a token's log-probability at tau_sample {tau_sample:g} (limit {limit:g}, option "
            "sync.max_logprob_diff): the engine does not hold the actor's weights, or computes "
            "something else with them"
        )
    # `not <=` instead of `>`: a NaN must not pass.
    if not agreement.mean <= mean_limit:
        raise AgreementError(
            f"step {step}: rollout and actor disagree by {agreement.mean:.3g} nats on average at "
            f"tau_sample {tau_sample:g}, worst in replica {replica} (limit {mean_limit:g}, option "
            "sync.mean_logprob_diff): the engine does not hold the actor's weights"
        )
