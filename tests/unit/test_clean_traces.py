"""tools/clean_traces.py: what a student should not learn from a teacher's traces goes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_preparation.trace_command import convert_traces
from data_preparation.traces import (
    clean_reasoning,
    clean_traces,
    final_number,
    without_boxes,
)

from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.parquet import data_sha256
from osft_mcore.data.sft import load_examples
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.evaluation.answers import last_boxed
from osft_mcore.log.console import Console

TOOL = Path(__file__).parents[2] / "tools" / "clean_traces.py"


def trace(**changes: Any) -> dict[str, Any]:
    return {
        "id": "7",
        "question": "How many?",
        "reasoning": "There are 3 boxes of 4.\n3 * 4 = 12.",
        "final": "ANSWER: 12",
        "final_number": "12",
        "correct": True,
        "usage": {"total_tokens": 9},
        "latency": 0.1,
    } | changes


@pytest.mark.parametrize(
    "line",
    [
        "I will output the result as ANSWER: 12",
        "I'll now write the final answer in the required format.",
        "Now, I need to give ANSWER: 12 and nothing else.",
        "So, I should put it in boxed.",
        "Let me write: ANSWER: 12",
        "We must end with ANSWER: 12",
        "And output as: ANSWER: 12",
        "I'll show my reasoning.",
        "At the very end, I must put the number.",
        "At the end, output ANSWER: <number>",
        'Then "ANSWER: 12" on its own line.',
        "It goes on its own line, as ANSWER: 12",
        "The last line should be ANSWER: 12",
        r"The problem says to put it in \boxed{}.",
        "- The instruction says: ANSWER: number",
        "I'm asked to use that format.",
        "The instructions want ANSWER: first",
        "It also says: show your reasoning.",
        "Reasoning first, then ANSWER: 12",
        "Let me think step by step.",
        "ANSWER: <number>",
        "It is 'ANSWER: number', so",
        "The output format is clear.",
        "Format: ANSWER: 12",
        "Now in the specified format, ANSWER: 12",
        "No units, so ANSWER: 12",
        "It should be ANSWER: 12 without units.",
        "Only the number after ANSWER:",
        "ANSWER: with just the number",
        "So the line reads ANSWER: 12",
        "Therefore, ANSWER: 12",
        "The final output should be: ANSWER: 12",
        "That's it.",
        "Done.",
    ],
)
def test_talk_about_the_format_goes(line: str) -> None:
    text, counts = clean_reasoning(f"3 * 4 = 12.\n{line}\nYes, 12.")
    assert text == "3 * 4 = 12.\nYes, 12."
    assert counts == Counter({"lines about the format dropped": 1})


@pytest.mark.parametrize(
    "line",
    [
        "At the end of the day he has 5 apples left.",
        "At the end he has to give 3 marbles to Tom.",
        "At the very end, she gives 5 apples away.",
        "I will write x for the number of apples.",
        "The problem says that she has 12 eggs.",
        "The question asks how many are left.",
        r"The question asks for 3 * 4, which is 12.",
        "He puts 4 books in a box, on its own shelf.",
        "So the answer to the first part is 8.",
        "Each line of the queue has 9 people.",
        "I need to give 4 apples to each of 3 people.",
        "She printed 20 pages without extra ink.",
        "Let me give the cost a name: c.",
        "Without other costs he pays 30.",
        "He boxed 12 apples.",
        "So 7 more, that is all of them.",
    ],
)
def test_reasoning_stays(line: str) -> None:
    text, counts = clean_reasoning(f"a\n{line}\nb")
    assert text == f"a\n{line}\nb"
    assert not counts


@pytest.mark.parametrize(
    "line",
    [
        "ANSWER: 12", "answer: 1,234", "**ANSWER: -3.5**", "  ANSWER:  $5 ", "Final answer: 7.",
        r"\boxed{12}", r"$$\boxed{12}$$",
    ],
)  # fmt: skip
def test_answer_lines_go(line: str) -> None:
    text, counts = clean_reasoning(f"a\n{line}\nb")
    assert (text, counts) == ("a\nb", Counter({"answer lines dropped": 1}))


@pytest.mark.parametrize(
    ("text", "opened", "count"),
    [
        (r"so \boxed{12}.", "so 12.", 1),
        (r"\boxed{\frac{1}{2}} and \boxed {3}", r"\frac{1}{2} and 3", 2),
        (r"\boxed{1 + \boxed{2}}", "1 + 2", 2),
        (r"\boxed{\{1\}}", r"\{1\}", 1),
        (r"\boxed{1", r"\boxed{1", 0),
        (r"\boxed{1 then \boxed{2}", r"\boxed{1 then 2", 1),
        ("boxed", "boxed", 0),
    ],
)
def test_boxes_are_opened(text: str, opened: str, count: int) -> None:
    assert without_boxes(text) == (opened, count)


@pytest.mark.parametrize(
    ("given", "final", "number"),
    [
        ("1,234", "ANSWER: 5", "1234"),
        (42.0, None, "42"),
        pytest.param(10**400, None, str(10**400), id="400 digits"),
        (0.5, None, "0.5"),
        ("$1,000.50", None, "1000.50"),
        (None, "In 2 days: ANSWER: 1,200\nwithin 3", "1200"),
        (None, "ANSWER: 1\n**ANSWER: -2**", "-2"),
        (None, "First 3, then 4 apples.", "4"),
        (None, "They are 3,4", "4"),
        ("twelve", "so 12", "12"),
        (True, "so 12", "12"),
        (float("nan"), "so 12", "12"),
        (None, "none", None),
        (None, None, None),
    ],
)
def test_the_final_number(given: Any, final: Any, number: str | None) -> None:
    assert final_number(given, final) == number


def test_a_response_ends_with_the_box() -> None:
    reasoning = "\n\n  There are 3 boxes.  \n\n\n\n" r"So \boxed{1,200}." "\n\nANSWER: 1,200\n"
    cleaned = clean_traces([trace(reasoning=reasoning, final_number="1,200")], wrong="drop")
    [row] = cleaned.rows
    assert row == {
        "prompt": "How many?",
        "response": "There are 3 boxes.\n\nSo 1,200.\n\n\\boxed{1200}",
        "id": "7",
    }
    assert last_boxed(str(row["response"])) == "1200"
    assert cleaned.changed == Counter({"boxes opened": 1, "answer lines dropped": 1})


@pytest.mark.parametrize("wrong", ["drop", "keep"])
def test_what_is_dropped_is_counted(wrong: Any) -> None:
    traces = [
        trace(),
        trace(id="8"),
        trace(correct=False, reasoning="wrong"),
        trace(correct=None, reasoning="not judged"),
        trace(question=" "),
        trace(reasoning=None),
        trace(reasoning="ANSWER: 12"),
        trace(final_number=None, final="I do not know."),
        "not JSON",
    ]
    cleaned = clean_traces(traces, wrong=wrong)
    expected = {
        "the same prompt and response again": 1,
        "no question": 1,
        "no reasoning": 1,
        "no reasoning once cleaned": 1,
        "no final number": 1,
        "not JSON": 1,
    } | ({"the answer is wrong": 1} if wrong == "drop" else {})
    assert dict(cleaned.dropped) == expected
    assert cleaned.num_read == 9 == len(cleaned.rows) + sum(cleaned.dropped.values())
    # What was dropped counts as dropped only.
    assert not cleaned.changed


def write(folder: Path, traces: list[Any]) -> Path:
    file = folder / "traces.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in traces))
    return file


def test_osft_sft_reads_the_output(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", TinyModel())
    out = tmp_path / "sft.parquet"
    source = write(tmp_path, [trace(question="1+2=?", reasoning="1+2"), trace(correct=False)])
    convert_traces(source, out, wrong="drop", force=False, console=Console(enabled=False))
    examples = load_examples(
        out, load_tokenizer(tmp_path / "model", None), prompt_key="prompt",
        response_key="response", system_prompt="", prompt_suffix="", max_tokens=1000, vocab=20,
        chat_template=None,
    ).examples  # fmt: skip
    assert len(examples) == 1
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["dropped"] == {"the answer is wrong": 1}
    assert report["source"]["sha256"] == data_sha256(source)
    assert report["outputs"]["sft.parquet"]["sha256"] == data_sha256(out)
    first = out.read_bytes()
    convert_traces(source, out, wrong="drop", force=True, console=Console(enabled=False))
    assert out.read_bytes() == first


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    console = Console(enabled=False)
    with pytest.raises(ConfigError) as caught:
        convert_traces(
            tmp_path / "no.jsonl", tmp_path / "x", wrong="drop", force=False, console=console
        )
    assert [p.partition(": ")[2] or p for p in caught.value.problems] == [
        str(tmp_path / "no.jsonl"), "expected a name that ends in .parquet",
    ]  # fmt: skip
    out = tmp_path / "sft.parquet"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"sft.parquet exists; .*--force"):
        convert_traces(write(tmp_path, [trace()]), out, wrong="drop", force=False, console=console)
    assert out.read_text() == "mine"
    out.unlink()
    with pytest.raises(DataError, match=r"none of 1 traces is left \(1 no question\)"):
        convert_traces(write(tmp_path, [{}]), out, wrong="drop", force=False, console=console)
    assert not out.exists()


def test_the_tool_prints_the_counts(tmp_path: Path) -> None:
    source = write(tmp_path, [trace(), trace(correct=False), trace(reasoning="x\nANSWER: 12")])
    command = [sys.executable, str(TOOL), str(source), str(tmp_path / "sft.parquet")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = {
        cells[1].strip(): cells[2].strip()
        for line in ran.stdout.splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert counts == {
        "traces read": "3", "dropped: the answer is wrong": "1", "kept": "2",
        "answer lines dropped": "1",
    }  # fmt: skip
    assert len(pq.read_table(tmp_path / "sft.parquet")) == 2
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("clean_traces: ")
