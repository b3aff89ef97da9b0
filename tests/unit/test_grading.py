"""Grading with the real worker processes, hostile answers included."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.errors import GradingError
from osft_mcore.evaluation.answers import last_boxed, normalize_answer, same_string
from osft_mcore.evaluation.grading import MAX_ANSWER_CHARS, Grade, Grader

CORRECT = Grade(correct=True, status="ok")
WRONG = Grade(correct=False, status="ok")

GENEROUS_S = 60.0
"""For answers that are easy: a slow machine must not turn them into timeouts."""


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(num_workers=2, timeout_s=GENEROUS_S) as grader:
        yield grader


def boxed(answer: str) -> str:
    return rf"So the answer is \boxed{{{answer}}}."


# Finding the box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{41}, no: \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed 42", None),
        (r"\boxed{42", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\fbox{42}", None),
        (r"\boxed", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@given(st.text(alphabet="a1+ ,"), st.text(alphabet="ab{}\\ "), st.integers(0, 5))
def test_last_boxed_undoes_boxing(inner: str, before: str, depth: int) -> None:
    content = "{" * depth + inner + "}" * depth
    assert last_boxed(before + r" \boxed{" + content + "}") == content


# Strings


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("42", "42", True),
        ("42", "43", False),
        ("-42", "42", False),
        ("\u22125", "-5", True),
        ("$42$", "42", True),
        (r"\$5", "5", True),
        ("42.", "42", True),
        ("3.0", "3", True),
        ("1.60", "1.6", True),
        (".5", "0.50", True),
        ("1,000", "1000", True),
        ("1{,}000{,}000", "1000000", True),
        ("007", "7", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        (r"-\tfrac{1}{2}", "-1/2", True),
        (r"\left( 1,\ 2 \right)", "(1,2)", True),
        (r"x \to \leftarrow", r"x\to\leftarrow", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"10\%", "10", True),
        ("0.1", r"10\%", True),
        ("", "1", False),
        ("$ $", "1", False),
        # Not for spelling to decide:
        ("1 1/2", "11/2", None),
        ("3.14", "3", None),
        (r"20\%", "10", None),
        (r"\frac{2}{4}", r"\frac{1}{2}", None),
        ("(2,1)", "(1,2)", None),
        ("X", "x", None),
        ("9" * 5000, "8" * 5000, None),
    ],
)
def test_same_string(answer: str, gold: str, same: bool | None) -> None:
    assert same_string(answer, gold) is same


@given(st.text(max_size=60))
def test_normalising_survives_any_text_and_keeps_it_equal_to_itself(text: str) -> None:
    assert same_string(text, text) is bool(normalize_answer(text))


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_never_need_algebra(one: int, other: int) -> None:
    assert same_string(str(one), f"{other:,}") is (one == other)


# Algebra, in workers


@pytest.mark.parametrize(
    ("answer", "gold", "grade"),
    [
        (r"\frac{2}{4}", r"\frac{1}{2}", CORRECT),
        ("0.5", r"\frac{1}{2}", CORRECT),
        (r"2\sqrt{3}", r"\sqrt{12}", CORRECT),
        ("x^2+2x+1", "(x+1)^2", CORRECT),
        (r"\{1,2\}", r"\{2,1\}", CORRECT),
        (r"5 \text{ cm}", "5", CORRECT),
        ("x=3", "3", CORRECT),
        (r"\frac{1}{3}", r"\boxed{\frac{2}{6}}", CORRECT),
        ("(2,1)", "(1,2)", WRONG),
        ("(0,1)", "[0,1)", WRONG),
        ("3.14", r"\pi", WRONG),
        ("a", "b", WRONG),
        (r"\frac{1}{}^_\sqrt", "1/2", WRONG),
    ],
)
def test_algebra(grader: Grader, answer: str, gold: str, grade: Grade) -> None:
    assert grader.grade([(boxed(answer), gold)]) == [grade]


def test_order_is_kept_across_workers_and_repeats(grader: Grader) -> None:
    pairs = [(boxed(rf"\frac{{{2 * n}}}{{14}}"), f"{n + n % 2}/7") for n in range(1, 13)]
    expected = [CORRECT if n % 2 == 0 else WRONG for n in range(1, 13)]
    assert grader.grade([*pairs, ("nothing", "1"), *pairs]) == [
        *expected,
        Grade(correct=False, status="no_answer"),
        *expected,
    ]
    assert len(grader.worker_pids) == 2


def test_no_worker_is_started_where_spelling_decides() -> None:
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([(boxed("42"), "42"), (boxed("41"), "42"), ("-", "42")]) == [
            CORRECT,
            WRONG,
            Grade(correct=False, status="no_answer"),
        ]
        assert grader.worker_pids == ()


def test_answers_over_the_cap_are_not_handed_to_algebra() -> None:
    long = "1+" * MAX_ANSWER_CHARS + "1"
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([(boxed(long), "7"), (boxed(long), long), (boxed("7"), long)]) == [
            WRONG,
            CORRECT,
            Grade(correct=False, status="error"),
        ]
        assert grader.worker_pids == ()


def test_known_pairs_are_not_asked_again() -> None:
    pair = (boxed(r"\frac{2}{4}"), r"\frac{1}{2}")
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([pair]) == [CORRECT]
        grader.close()
        assert grader.grade([pair, pair]) == [CORRECT, CORRECT]
        assert grader.worker_pids == ()


# Hostile answers

HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "huge power": "10^{10^9}",
    "3,000 nested parentheses": "(" * 3000 + "1" + ")" * 3000,
    "400 nested fractions": r"\frac{1}{" * 400 + "2" + "}" * 400,
    "expansion": "(a+b+c+d+f)^{60}",
    "5 million digits": "7" * 5_000_000,
    "digits below the cap": "7" * (MAX_ANSWER_CHARS - 1),
    "null bytes": "1\x00+\x001",
    "lone surrogates": "\ud800\udfff x+1",
    "astral characters": "\U0001f600" * (MAX_ANSWER_CHARS - 1),
    "control characters": "\r\n\x0b\x1b[2J\u2028{1}",
}


def test_hostile_answers_end_and_leave_a_working_grader() -> None:
    easy = (boxed(r"\frac{2}{4}"), r"\frac{1}{2}")
    with Grader(num_workers=2, timeout_s=3.0) as grader:
        grades = dict(
            zip(
                HOSTILE,
                grader.grade([(boxed(text), "x+17") for text in HOSTILE.values()]),
                strict=True,
            )
        )
        assert not any(grade.correct for grade in grades.values())
        # A dead worker would be an error; none of these may take one down.
        assert {grade.status for grade in grades.values()} == {"ok", "timeout"}
        assert grades["power tower"].status == "timeout"
        assert grades["5 million digits"] == WRONG
        # Known hostile answers cost nothing the second time.
        pids = grader.worker_pids
        grader.grade([(boxed(text), "x+17") for text in HOSTILE.values()])
        assert grader.worker_pids == pids
        assert grader.grade([easy]) == [CORRECT]


def test_of_20000_boxes_the_last_counts(grader: Grader) -> None:
    many = r"\boxed{1}" * 20_000
    assert grader.grade([(many + boxed("2"), "2"), (many + r"\boxed{2", "2")]) == [
        CORRECT,
        Grade(correct=False, status="no_answer"),
    ]


# Workers that go away


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([(boxed(r"\frac{2}{4}"), r"\frac{1}{2}")]) == [CORRECT]
        (victim,) = grader.worker_pids
        os.kill(victim, signal.SIGKILL)
        assert grader.grade([(boxed(r"\frac{2}{6}"), r"\frac{1}{3}")]) == [CORRECT]
        assert grader.worker_pids != (victim,)


def test_a_stopped_worker_is_a_timeout_and_is_replaced() -> None:
    with Grader(num_workers=1, timeout_s=3.0) as grader:
        assert grader.grade([(boxed(r"\frac{2}{4}"), r"\frac{1}{2}")]) == [CORRECT]
        os.kill(grader.worker_pids[0], signal.SIGSTOP)
        late = Grade(correct=False, status="timeout")
        assert grader.grade([(boxed(r"\frac{2}{6}"), r"\frac{1}{3}")]) == [late]
        assert grader.grade([(boxed(r"\frac{2}{8}"), r"\frac{1}{4}")]) == [CORRECT]


def test_workers_do_not_see_the_signals_that_tell_a_run_to_stop() -> None:
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([(boxed(r"\frac{2}{4}"), r"\frac{1}{2}")]) == [CORRECT]
        (worker,) = grader.worker_pids
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGUSR1)
        assert grader.grade([(boxed(r"\frac{2}{6}"), r"\frac{1}{3}")]) == [CORRECT]
        assert grader.worker_pids == (worker,)
    assert not _runs(worker)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGUSR1}


def test_an_answer_that_crashes_its_worker_twice_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No known answer crashes the interpreter, so this stands in for one that does.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, math_verify\n"
        "really = math_verify.verify\n"
        "def verify(gold, answer, **options):\n"
        "    return os.abort() if 'deadly' in str(answer) else really(gold, answer, **options)\n"
        "math_verify.verify = verify\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        assert grader.grade([(boxed(r"\text{deadly}"), "x+1"), (boxed("0.5"), "x-x+1/2")]) == [
            Grade(correct=False, status="error"),
            CORRECT,
        ]


def test_workers_that_cannot_start_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Grader(num_workers=1, timeout_s=GENEROUS_S) as grader,
        pytest.raises(GradingError, match="Is math-verify installed"),
    ):
        grader.grade([(boxed("0.5"), r"\frac{1}{2}")])


def test_close_ends_the_workers() -> None:
    with Grader(num_workers=2, timeout_s=GENEROUS_S) as grader:
        grader.grade([(boxed(rf"\frac{{2}}{{{2 * n}}}"), f"1/{n}") for n in (3, 5)])
        pids = grader.worker_pids
        assert pids
    assert grader.worker_pids == ()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


ABANDONING_PARENT = r"""
import sys
import time

from osft_mcore.evaluation.worker_process import Question, WorkerProcess

worker = WorkerProcess(timeout_s=1.0)
while worker.listen() != "ready":
    time.sleep(0.05)
if sys.argv[1] == "busy":
    worker.ask(Question(answer="9^{9^{9^9}}", gold="x+17"))
print(worker.pid, flush=True)
sys.stdin.read()
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_a_worker_does_not_outlive_a_killed_parent(state: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ABANDONING_PARENT, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker_pid = int(parent.stdout.readline())
    assert _runs(worker_pid)
    parent.kill()
    parent.communicate()
    if state == "busy":
        assert _runs(worker_pid)
    # The test's own time limit is the deadline.
    while _runs(worker_pid):
        time.sleep(0.1)


def test_a_worker_knows_no_secret_loads_no_torch_and_is_capped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-pass-on")
    with Grader(num_workers=1, timeout_s=GENEROUS_S) as grader:
        grader.grade([(boxed(r"\frac{2}{4}"), r"\frac{1}{2}")])
        process = Path(f"/proc/{grader.worker_pids[0]}")
        assert b"do-not-pass-on" not in (process / "environ").read_bytes()
        assert "torch" not in (process / "maps").read_text()
        (address_space,) = [
            line
            for line in (process / "limits").read_text().splitlines()
            if line.startswith("Max address space")
        ]
        assert address_space.split()[3:5] == [str(1 << 30)] * 2


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers=0"):
        Grader(num_workers=0, timeout_s=1.0)
