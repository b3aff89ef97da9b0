"""Grading with the real worker processes: verdicts, the pool, and workers that go away."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import GradingError
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.judges import OutOfTimeError, cpu_limit, load_judge
from osft_mcore.evaluation.limits import MAX_ANSWER_CHARS
from osft_mcore.evaluation.scorers import Grade, Sample

CORRECT, WRONG = Grade(1.0, "ok"), Grade(0.0, "ok")
NO_ANSWER, ERROR = Grade(0.0, "no_answer"), Grade(0.0, "error")
LATE = Grade(0.0, "timeout")

GENEROUS_S = 60.0
"""For answers that are easy: a slow machine must not turn them into timeouts."""


def new_grader(workers: int = 1, timeout_s: float = GENEROUS_S, **options: Any) -> Grader:
    config = EvaluationConfig(grader_workers=workers, grader_timeout_s=timeout_s, **options)
    return Grader(config, max_response_tokens=100)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with new_grader(workers=2) as grader:
        yield grader


def boxed(answer: str, gold: Any) -> Sample:
    return Sample(rf"So the answer is \boxed{{{answer}}}.", gold)


HALF = boxed(r"\frac{2}{2\sqrt{2}}", r"\frac{\sqrt{2}}{2}")
THIRD = boxed(r"\frac{2}{2\sqrt{3}}", r"\frac{\sqrt{3}}{3}")
FIFTH = boxed(r"\frac{2}{2\sqrt{5}}", r"\frac{\sqrt{5}}{5}")
"""Right, but only algebra can tell."""
HARD = [rf"\int_0^{n} \sin(\sin(\sin(\sin(x^{{x^{{x}}}})))) dx" for n in range(1, 9)]
"""Of these nobody can tell in time."""


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
    assert grader.grade([boxed(answer, gold)]) == [grade]


@pytest.mark.parametrize(
    ("gold", "grade"),
    [
        (["203", "204"], CORRECT),
        (["203", r"\boxed{204}"], CORRECT),
        ([203, 204.0], CORRECT),
        (204, CORRECT),
        (204.5, WRONG),
        (["203", "205"], WRONG),
        (["x+1", r"\frac{408x}{2x}"], CORRECT),
    ],
)
def test_gold_may_be_a_number_or_several(grader: Grader, gold: Any, grade: Grade) -> None:
    assert grader.grade([boxed("204", gold)]) == [grade]


def test_a_right_answer_does_not_wait_for_what_else_would_be_right() -> None:
    with new_grader(timeout_s=1.5) as grader:
        for golds in ([FIFTH.gold, *HARD], [*HARD, FIFTH.gold]):
            assert grader.grade([boxed(r"\frac{2}{2\sqrt{5}}", golds)]) == [CORRECT]


def test_many_expected_answers_share_the_time_of_one() -> None:
    judge = load_judge("boxed_math", timeout_s := 0.9)
    assert not isinstance(judge, str)
    began = time.process_time()
    assert judge(answer=r"\frac{2}{2\sqrt{5}}", golds=HARD, num_tokens=0) == {"kind": "late"}
    assert time.process_time() - began < timeout_s


def burn(cpu_s: float) -> None:
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


class Hard:
    """To be rid of it takes time."""

    def __del__(self) -> None:
        burn(0.5)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_ends_in_a_destructor_ends_what_comes_after_it() -> None:
    def compare() -> None:
        Hard()
        burn(1000.0)

    with pytest.raises(OutOfTimeError), cpu_limit(0.2):
        compare()
    burn(0.3)


def test_order_is_kept_across_workers_and_repeats(grader: Grader) -> None:
    samples = [
        boxed(rf"\frac{{{2 * n}x}}{{14}}", rf"\frac{{{n + n % 2}}}{{7}}x") for n in range(1, 13)
    ]
    expected = [CORRECT if n % 2 == 0 else WRONG for n in range(1, 13)]
    assert grader.grade([*samples, Sample("nothing", "1"), *samples]) == [
        *expected,
        NO_ANSWER,
        *expected,
    ]
    assert len(grader.worker_pids) == 2


def test_no_worker_is_started_where_spelling_decides() -> None:
    with new_grader() as grader:
        samples = [boxed("42", "42"), boxed("41", "42"), Sample("-", "42"), boxed("2/4", "0.5")]
        assert grader.grade(samples) == [CORRECT, WRONG, NO_ANSWER, CORRECT]
        assert grader.worker_pids == ()


def test_what_is_too_large_is_not_handed_to_algebra() -> None:
    long = "1+" * MAX_ANSWER_CHARS + "1"
    with new_grader() as grader:
        assert grader.grade([boxed(long, "7"), boxed(long, long), boxed("7", long)]) == [
            Grade(0.0, "too_large"),
            CORRECT,
            ERROR,
        ]
        assert grader.worker_pids == ()


def test_known_questions_are_not_asked_again() -> None:
    with new_grader() as grader:
        assert grader.grade([HALF]) == [CORRECT]
        grader.close()
        assert grader.grade([HALF, HALF]) == [CORRECT, CORRECT]
        assert grader.worker_pids == ()


def test_threads_may_share_a_grader() -> None:
    samples = [boxed(rf"\frac{{{2 * n}x}}{{14}}", rf"\frac{{{n}}}{{7}}x") for n in range(1, 25)]
    with new_grader(workers=2) as grader, ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(grader.grade, [samples[k::4] for k in range(4)]))
        assert parts == [[CORRECT] * 6] * 4
        assert len(grader.worker_pids) == 2


def test_a_forked_copy_has_workers_of_its_own() -> None:
    with new_grader() as grader:
        assert grader.grade([HALF]) == [CORRECT]
        (worker,) = grader.worker_pids
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def grade_there() -> None:
            theirs.send((grader.grade([THIRD]), grader.worker_pids))
            grader.close()

        child = context.Process(target=grade_there)
        child.start()
        grades, pids = ours.recv()
        child.join()
        assert grades == [CORRECT]
        assert worker not in pids
        assert grader.grade([FIFTH]) == [CORRECT]
        assert grader.worker_pids == (worker,)


# Workers that go away


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with new_grader() as grader:
        assert grader.grade([HALF]) == [CORRECT]
        (victim,) = grader.worker_pids
        os.kill(victim, signal.SIGKILL)
        assert grader.grade([THIRD]) == [CORRECT]
        assert grader.worker_pids != (victim,)


def test_a_stopped_worker_is_a_timeout_and_is_replaced() -> None:
    with new_grader(timeout_s=3.0) as grader:
        assert grader.grade([HALF]) == [CORRECT]
        os.kill(grader.worker_pids[0], signal.SIGSTOP)
        assert grader.grade([THIRD]) == [LATE]
        assert grader.grade([FIFTH]) == [CORRECT]


def test_workers_do_not_see_the_signals_that_tell_a_run_to_stop() -> None:
    with new_grader() as grader:
        assert grader.grade([HALF]) == [CORRECT]
        (worker,) = grader.worker_pids
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGUSR1)
        assert grader.grade([THIRD]) == [CORRECT]
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
    with new_grader() as grader:
        assert grader.grade([boxed(r"\text{deadly}", "x+1"), boxed("1,2", "2,1")]) == [
            ERROR,
            CORRECT,
        ]


def test_workers_that_cannot_start_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        new_grader() as grader,
        pytest.raises(GradingError, match="Is math-verify not installed"),
    ):
        grader.grade([HALF])


def test_close_ends_the_workers() -> None:
    with new_grader(workers=2) as grader:
        grader.grade([THIRD, FIFTH])
        pids = grader.worker_pids
        assert pids
    assert grader.worker_pids == ()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


ABANDONING_PARENT = r"""
import sys
import time

from osft_mcore.evaluation.scorers import Question
from osft_mcore.evaluation.worker_process import WorkerProcess

worker = WorkerProcess("boxed_math", timeout_s=1.0, memory_bytes=1 << 30)
while worker.listen() != {"kind": "ready"}:
    time.sleep(0.05)
if sys.argv[1] == "busy":
    worker.ask(Question(answer="9^{9^{9^9}}", golds=("x+17",)))
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
    with new_grader() as grader:
        grader.grade([HALF])
        process = Path(f"/proc/{grader.worker_pids[0]}")
        assert b"do-not-pass-on" not in (process / "environ").read_bytes()
        assert "torch" not in (process / "maps").read_text()
        (address_space,) = [
            line
            for line in (process / "limits").read_text().splitlines()
            if line.startswith("Max address space")
        ]
        assert address_space.split()[3:5] == [str(1 << 30)] * 2
