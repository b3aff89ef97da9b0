"""How long a phase may take, and which option says so."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from osft_mcore.config.duration import LONGEST_MINUTES
from osft_mcore.config.schema import DeadlinesConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.parallel.deadlines import (
    BETWEEN,
    FOR_EVER_S,
    IDLE,
    LEAST_S,
    STEADY,
    Deadlines,
    deadlines_of,
)

LONG_S = 7200.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"


def deadlines(slack: float = 10.0) -> Deadlines:
    phases = ("rollout", "train", "sync", "evaluate", "save")
    return Deadlines(dict.fromkeys(phases, LONG_S), otherwise_s=LONG_S, slack=slack)


@pytest.mark.parametrize("phase", ["rollout", "train", "sync"])
def test_what_is_alike_in_every_step_is_held_to_how_long_it_took(phase: str) -> None:
    found = deadlines()
    assert found.limit(phase).seconds == LONG_S, "the first may take long"
    found.note(phase, 60.0)
    assert found.limit(phase).seconds == 600
    found.note(phase, 90.0)
    found.note(phase, 50.0)
    assert found.limit(phase).seconds == 900, "by the longest"
    assert found.limit(phase).option == (
        "deadlines.slack: 10 times the longest so far, 90.0 s, but at least 5 minutes"
    )
    found.note(phase, 3600.0)
    assert found.limit(phase).seconds == LONG_S, "never more than the option"
    assert found.limit(phase).option == f"deadlines.{phase}"


def test_short_phases_keep_minutes() -> None:
    found = deadlines()
    found.note("sync", 0.2)
    assert found.limit("sync").seconds == LEAST_S
    assert found.limit("sync").minutes == "5 minutes"


def test_an_option_that_is_shorter_stays() -> None:
    found = Deadlines({"train": 20.0}, otherwise_s=LONG_S, slack=10.0)
    found.note("train", 1.0)
    assert found.limit("train").seconds == 20


@pytest.mark.parametrize("phase", ["evaluate", "save", "start", "load", "wait"])
def test_what_differs_from_time_to_time_is_not(phase: str) -> None:
    found = deadlines()
    found.note("train", 1.0)
    found.note(phase, 1.0)
    assert found.limit(phase).seconds == LONG_S


def test_without_slack_nothing_gets_shorter() -> None:
    found = deadlines(slack=0.0)
    for phase in ("train", BETWEEN):
        found.note(phase, 1.0)
        assert found.limit(phase).seconds == LONG_S


def test_between_phases_the_start_counts_until_the_first_update() -> None:
    found = deadlines()
    found.note(BETWEEN, 3.0)
    assert found.limit(BETWEEN).seconds == LONG_S
    found.note("train", 1.0)
    assert found.limit(BETWEEN).seconds == LONG_S
    found.note(BETWEEN, 3.0)
    assert found.limit(BETWEEN).seconds == LEAST_S


def test_the_options_are_in_minutes_and_messages_name_options_that_exist() -> None:
    config = DeadlinesConfig()
    found = deadlines_of(config, wait_minutes=15.0)
    for phase, minutes in asdict(config).items():
        if phase != "slack":
            assert found.limit(phase).seconds == 60 * minutes
            assert found.limit(phase).option == f"deadlines.{phase}"
    assert found.limit("wait").seconds == 60 * (15 + config.start), "it ends by itself before"
    assert found.limit("wait").option == "evaluation.wait_minutes"
    for phase in (BETWEEN, "load"):
        assert found.limit(phase).seconds == 60 * config.start
        assert found.limit(phase).option == "deadlines.start"


def test_no_limit_is_beyond_what_timers_take() -> None:
    found = deadlines_of(DeadlinesConfig(start=LONGEST_MINUTES), wait_minutes=1e12)
    assert found.limit("wait").seconds == found.limit(IDLE).seconds == FOR_EVER_S == 2_592_000


def test_the_document_has_the_defaults() -> None:
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| ([0-9.]+) \| .* \| (.*) ?\|$", DOCUMENT.read_text(), re.M
    )
    stated = {option: float(minutes) for option, minutes, _ in rows}
    assert stated == {
        **{f"deadlines.{name}": value for name, value in asdict(DeadlinesConfig()).items()},
        "evaluation.wait_minutes": EvaluationConfig().wait_minutes,
    }
    shorter = [option for option, _, answer in rows if answer.strip() == "yes"]
    assert shorter == [f"deadlines.{phase}" for phase in STEADY if phase != BETWEEN]
