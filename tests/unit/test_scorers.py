"""Scorers by name, and functions from files."""

from pathlib import Path
from typing import Any

import pytest

from osft_mcore.config.schema_evaluation import SCORERS as NAMES
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import GradingError
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.scorers import SCORERS, Sample

MAX_TOKENS = 100


def new_grader(scorer: str, timeout_s: float = 60.0, **options: Any) -> Grader:
    config = EvaluationConfig(scorer=scorer, grader_timeout_s=timeout_s, **options)
    return Grader(config, MAX_TOKENS)


def score(scorer: str, text: str, gold: Any, num_tokens: int = 0, **options: Any) -> Any:
    with new_grader(scorer, **options) as grader:
        (grade,) = grader.grade([Sample(text, gold, num_tokens)])
        assert grader.worker_pids == ()
        return grade.score, grade.status


def test_the_schema_names_every_scorer() -> None:
    assert set(NAMES) == set(SCORERS)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("So #### 1,234", "1234", (1.0, "ok")),
        ("So #### 1234", "1,234", (1.0, "ok")),
        ("So #### 1234", "9 + ... #### 1,234", (1.0, "ok")),
        ("So #### 42", ["41", 42], (1.0, "ok")),
        ("So #### 42.0", "42", (0.0, "ok")),
        (r"So \boxed{42}", "42", (0.0, "no_answer")),
        ("#### 42 #### 41", "42", (0.0, "ok")),
    ],
)
def test_gsm8k(text: str, gold: Any, expected: Any) -> None:
    assert score("gsm8k", text, gold) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Answer: 42", "42", (1.0, "ok")),
        ("Answer: $x = \\frac12$", "1/2", (1.0, "ok")),
        ("Answer: 12 dollars", "12", (1.0, "ok")),
        ("Answer: 41", "42", (-1.0, "ok")),
        ("Answer: 42\nAnswer: 41", "42", (-1.0, "ok")),
        (r"\boxed{42}", "42", (-1.0, "no_answer")),
        ("Answer: 42", ["41", 42], (1.0, "ok")),
        # Spelling decides, no algebra:
        ("Answer: 2/4", "1/2", (-1.0, "ok")),
    ],
)
def test_answer_line(text: str, gold: Any, expected: Any) -> None:
    assert score("answer_line", text, gold) == expected


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.25), (80, -0.5), (100, -1.0)]
)
def test_overlong_responses_lose_score(num_tokens: int, penalty: float) -> None:
    options = {"overlong_buffer_tokens": 40}
    for text, plain in (("Answer: 42", 1.0), ("Answer: 41", -1.0), ("none", -1.0)):
        found, _ = score("answer_line", text, "42", num_tokens, **options)
        assert found == pytest.approx(plain + penalty)
    # Of no other scorer, and not without a buffer.
    assert score("boxed_math", r"\boxed{42}", "42", num_tokens, **options) == (1.0, "ok")
    assert score("answer_line", "Answer: 42", "42", num_tokens) == (1.0, "ok")


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"\boxed{1,234.50}", "1234.5", (1.0, "ok")),
        (r"\boxed{\$42}", "42", (1.0, "ok")),
        (r"\boxed{42 \text{ km}}", "42", (1.0, "ok")),
        (r"\boxed{-3}", 3, (0.0, "ok")),
        (r"\boxed{3}", [2, 3.0], (1.0, "ok")),
        (r"\boxed{x}", "3", (0.0, "no_answer")),
        (r"\boxed{1/2}", "0.5", (0.0, "no_answer")),
        ("3", "3", (0.0, "no_answer")),
        (r"\boxed{3}", "x", (0.0, "error")),
        (r"\boxed{" + "9" * 5_000_000 + "}", "3", (0.0, "no_answer")),
    ],
)
def test_boxed_numeric(text: str, gold: Any, expected: Any) -> None:
    assert score("boxed_numeric", text, gold) == expected


FILE = """
import os, subprocess, time

def score(response, ground_truth, num_tokens):
    if response == "raise":
        raise KeyError("what a scorer may do")
    if response == "hang":
        started = subprocess.Popen(["sleep", "1000"])
        open(os.environ["TMPDIR"] + "/pids", "w").write(f"{os.getpid()} {started.pid}")
        time.sleep(1000)
    if response == "die":
        os._exit(3)
    if response == "exit":
        raise SystemExit("no more")
    if response == "nan":
        return float("nan")
    if response == "allocate":
        return len(bytearray(3 << 30))
    print("not a reply")
    return num_tokens + 0.5 * (ground_truth in (response, ["a", "b"]))
"""


def runs(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    file = tmp_path / "my_scorer.py"
    file.write_text(FILE)
    return file


def test_a_function_from_a_file(file: Path) -> None:
    long = "\u00e9\ud800" * 200_000
    with new_grader(f"{file}:score") as grader:
        grader.check()
        samples = [Sample("x", "x", 3), Sample("x", "y", 3), Sample("y", ["a", "b"])]
        grades = grader.grade([*samples, Sample(long, long)])
        assert [grade.score for grade in grades] == [3.5, 3.0, 0.5, 0.5]
        assert all(grade.correct and grade.status == "ok" for grade in grades)


def test_what_such_a_function_may_do_wrong(file: Path) -> None:
    texts = ["raise", "hang", "die", "exit", "nan", "allocate", "x"]
    with new_grader(f"{file}:score", timeout_s=1.0) as grader:
        grades = dict(zip(texts, grader.grade([Sample(t, "x") for t in texts]), strict=True))
        # What a hanging function had started is gone as well.
        assert not any(map(runs, (file.parent / "pids").read_text().split()))
    assert {text: grade.status for text, grade in grades.items()} == {
        "raise": "error",
        "hang": "timeout",
        "die": "error",
        "exit": "error",
        "nan": "error",
        "allocate": "error",
        "x": "ok",
    }
    assert "KeyError: 'what a scorer may do'" in grades["raise"].reason
    assert "MemoryError" in grades["allocate"].reason
    assert "SystemExit: no more" in grades["exit"].reason
    assert "finite" in grades["nan"].reason
    assert [grade.score for grade in grades.values()] == [0, 0, 0, 0, 0, 0, 0.5]


FORKS = """
import os, time

def score(response, ground_truth, num_tokens):
    if response == "fork" and os.fork() == 0:
        time.sleep(0.1)
    elif response != "fork":
        time.sleep(0.3)
    return float(response == "fork")
"""


def test_a_function_that_comes_back_twice_scores_its_own_answer_only(tmp_path: Path) -> None:
    (tmp_path / "my_scorer.py").write_text(FORKS)
    with new_grader(f"{tmp_path}/my_scorer.py:score") as grader:
        grades = grader.grade([Sample(text, "") for text in ("fork", "x", "y")])
    assert [(grade.score, grade.status) for grade in grades] == [(1, "ok"), (0, "ok"), (0, "ok")]


def test_a_file_that_hangs_or_dies_is_named_and_tried_no_longer_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osft_mcore.evaluation.worker_process.START_TIMEOUT_S", 2.0)
    file = tmp_path / "my_scorer.py"
    file.write_text("open(__file__ + '.tried', 'a').write('x')\nimport time; time.sleep(600)")
    with new_grader(f"{file}:score") as grader, pytest.raises(GradingError) as hangs:
        grader.check()
    assert f"evaluation.scorer: importing {str(file)!r} has not ended after" in str(hangs.value)
    monkeypatch.undo()
    assert len((tmp_path / "my_scorer.py.tried").read_text()) <= 1
    file.write_text("import os; os._exit(3)")
    with new_grader(f"{file}:score") as grader, pytest.raises(GradingError) as dies:
        grader.check()
    assert f"Does {str(file)!r} (evaluation.scorer) end who imports it, or" in str(dies.value)
    assert "math-verify" not in str(dies.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module", r"ModuleNotFoundError.*no_such_module"),
        ("other = 1", "has no function 'score'"),
        ("def score(:", "SyntaxError"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_file_that_does_not_load_is_told_at_the_start(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "my_scorer.py").write_text(content)
    with (
        new_grader(f"{tmp_path}/my_scorer.py:score") as grader,
        pytest.raises(GradingError, match=rf"evaluation\.scorer: .*{message}"),
    ):
        grader.check()
