"""The actor's look at a few answers of every evaluation: which ones, and what is told of them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.probe import Probe
from osft_mcore.evaluation.results import METRICS
from osft_mcore.records import Example, Response
from osft_mcore.train.step_metrics import perplexity

GREEDY_TAU: Final = 1.0
"""Greedy decoding has no temperature to look at; the plain model has."""


def first_answers(responses: Iterable[Response], num_problems: int) -> dict[str, list[Response]]:
    """By data source, the first sample of each of its first `num_problems` problems."""
    chosen: dict[str, list[Response]] = {}
    for response in responses:
        of_source = chosen.setdefault(response.prompt.data_source, [])
        if response.sample_index == 0 and len(of_source) < num_problems:
            of_source.append(response)
    return {source: found for source, found in chosen.items() if found}


def probe_answers(
    actor: Actor, answers: Mapping[str, list[Response]], temperature: float
) -> dict[str, Probe]:
    """What the actor says of them, by data source. Every rank must call, alike.

    At the temperature that they were sampled at, top_p left aside; of greedy ones at GREEDY_TAU.
    """
    return {
        source: actor.probe(
            [
                Example(
                    prompt_token_ids=response.prompt.token_ids,
                    response_token_ids=response.token_ids,
                )
                for response in responses
            ],
            tau=temperature or GREEDY_TAU,
        )
        for source, responses in answers.items()
    }


def probe_metrics(probes: Mapping[str, Probe]) -> dict[str, float]:
    """What they add to an evaluation's metrics."""
    return {
        f"eval/{source}/probe_{name}": value
        for source, probe in probes.items()
        for name, value in _figures(probe).items()
    }


def with_probes(report: dict[str, Any], probes: Mapping[str, Probe]) -> dict[str, Any]:
    """An evaluation's report, with what was found added to its benchmarks."""
    benchmarks = {
        source: found
        | ({"probe": {"num_tokens": probe.num_tokens} | _figures(probe)} if probe else {})
        for source, found in report["benchmarks"].items()
        for probe in [probes.get(source)]
    }
    return report | {
        "benchmarks": benchmarks,
        METRICS: report[METRICS] | probe_metrics(probes),
    }


def _figures(probe: Probe) -> dict[str, float]:
    spreads = {"logprob": probe.logprob, "entropy": probe.entropy}
    return {
        f"{name}_{figure}": value
        for name, spread in spreads.items()
        for figure, value in asdict(spread).items()
    } | {"perplexity": perplexity(-probe.logprob.mean)}
