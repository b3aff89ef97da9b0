"""Hostile answers end in time and in bounds, wherever they are graded from."""

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from hostile_answers import GOLD, responses
from test_verifier_oracle import ORACLE, sample

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.scorers import Grade, Sample

DEADLINE_S = 1.5
GENEROUS_S = 60.0
EASY = Sample(r"\boxed{\frac{2}{2\sqrt{5}}}", r"\frac{\sqrt{5}}{5}")
CAP_KIB = 1 << 20


def new_grader(timeout_s: float, workers: int) -> Grader:
    return Grader(
        EvaluationConfig(grader_timeout_s=timeout_s, grader_workers=workers),
        max_response_tokens=100,
    )


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += family(int(child))
    return found


@contextmanager
def watched_memory(pid: int, peaks_kib: list[int]) -> Iterator[None]:
    """Appends the largest address space of any process below `pid`, again and again."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            try:
                statuses = [Path(f"/proc/{p}/status").read_text() for p in family(pid)]
            except (FileNotFoundError, ProcessLookupError):
                continue
            lines = [line for text in statuses for line in text.splitlines()]
            peaks_kib.extend(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_hostile_answers_end_in_time_and_leave_the_pool_alive() -> None:
    seconds: dict[str, float] = {}
    grades: dict[str, Grade] = {}
    peaks_kib: list[int] = []
    start = time.monotonic()
    assert len(responses()) >= 70
    with new_grader(DEADLINE_S, workers=1) as grader:
        assert grader.grade([EASY])[0].correct
        pids = grader.worker_pids
        with watched_memory(pids[0], peaks_kib):
            for row, (name, response) in enumerate(responses().items()):
                # An easy one first: what is measured is no worker's start.
                assert grader.grade([Sample(rf"\boxed{{y+{row}z+y}}", f"{row}z+2y")])[0].correct
                begin = time.monotonic()
                (grades[name],) = grader.grade([Sample(response, GOLD)])
                seconds[name] = time.monotonic() - begin
        assert len(grader.worker_pids) == 1
        again = time.monotonic()
        assert grader.grade([Sample(text, GOLD) for text in responses().values()]) == [
            *grades.values()
        ]
        assert time.monotonic() - again < len(grades) * DEADLINE_S / 4
        easier = Sample(r"\boxed{\frac{2}{2\sqrt{7}}}", r"\frac{\sqrt{7}}{7}")
        assert grader.grade([easier])[0].correct
    assert {name: grade for name, grade in grades.items() if grade.score != 0} == {}
    assert {name: s for name, s in seconds.items() if s > 1.5 * DEADLINE_S} == {}
    assert {grade.status for grade in grades.values()} >= {"ok", "timeout", "too_large"}
    assert max(peaks_kib) <= CAP_KIB
    # Replacing a child takes milliseconds, and nobody waits for a reply that has come.
    assert time.monotonic() - start < 90


SOME = list(responses().values())[::3]


def scores_of_some() -> tuple[list[float], list[float]]:
    """Of every third hostile answer, and of the reference verifier's pairs."""
    with new_grader(DEADLINE_S / 4, workers=2) as grader:
        hostile = grader.grade([Sample(text, GOLD) for text in SOME])
    with new_grader(GENEROUS_S, workers=1) as grader:
        ordinary = grader.grade([sample(pair) for pair in ORACLE])
    return [grade.score for grade in hostile], [grade.score for grade in ordinary]


EXPECTED = ([0.0] * len(SOME), [pair["score"] for pair in ORACLE])


def spin() -> None:
    while True:
        json.loads("[1, 2, 3]")


def send_scores(to: Connection) -> None:
    to.send(scores_of_some())


def test_the_same_scores_from_a_thread_of_a_busy_machine() -> None:
    context = multiprocessing.get_context("spawn")
    busy = [context.Process(target=spin, daemon=True) for _ in range(2)]
    for process in busy:
        process.start()
    found: list[tuple[list[float], list[float]]] = []
    thread = threading.Thread(target=lambda: found.append(scores_of_some()))
    thread.start()
    thread.join()
    for process in busy:
        process.kill()
        process.join()
    assert found == [EXPECTED]


def test_the_same_scores_from_a_subprocess() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_scores, args=(there,))
    process.start()
    found = here.recv()
    process.join()
    assert found == EXPECTED
