"""Worked examples that stand before every problem: k-shot evaluation."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from osft_mcore.data.parquet import (
    DataFile,
    RowProblems,
    check_prompt_column,
    check_text_column,
    read_table,
    to_messages,
)
from osft_mcore.files import parse_json
from osft_mcore.records import Message

OPTION: Final = "evaluation.shots_file"
MIN_CONTAINED: Final = 20
"""Characters of a question that tells itself apart: found inside of another, it is the same one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shots:
    """The examples that were chosen, the same for every problem."""

    file: Path
    rows: tuple[int, ...]
    """Where the file has them, from 0, in their order in the prompt."""
    num_held_out: int
    """Rows that were drawn and left out, because they are problems to be scored on."""
    turns: tuple[Message, ...]
    """A user's and an assistant's turn for each."""

    def before(self, messages: Sequence[Message]) -> list[Message]:
        """A problem's messages with the examples after its system turns."""
        first = next((i for i, at in enumerate(messages) if at.role != "system"), len(messages))
        return [*messages[:first], *self.turns, *messages[first:]]

    def record(self) -> dict[str, Any]:
        """What a result says of them, JSON-able."""
        return {
            "count": len(self.rows),
            "file": str(self.file),
            "rows": list(self.rows),
            "left_out_as_held_out": self.num_held_out,
        }


def choose_shots(
    file: str | Path,
    questions: Iterable[str],
    *,
    count: int,
    seed: int,
    prompt_key: str,
    response_key: str,
    prompt_suffix: str,
) -> Shots:
    """Draw `count` examples from a parquet or jsonl file of prompts and responses (text).

    `questions`: of all held-out problems; a row that asks one of them is left out and counted.
    The same file, count, seed and questions give the same examples. Raises DataError that names
    the options, the file, and every kind of fault.
    """
    source = DataFile(path=Path(file), option=OPTION)
    held_out = {_plain(question) for question in questions}
    examples = _read(source, prompt_key, response_key)
    rows: list[int] = []
    num_left_out = 0
    for row in np.random.default_rng(seed).permutation(len(examples)).tolist():
        if len(rows) == count:
            break
        if _is_among(_plain(examples[row][0]), held_out):
            num_left_out += 1
        else:
            rows.append(row)
    if len(rows) < count:
        raise source.error(
            f"evaluation.shots is {count}, but of {len(examples)} examples {num_left_out} are "
            f"held-out problems (evaluation.files), which leaves {len(rows)}; name a file with "
            "more, or ask for fewer"
        )
    turns = [
        message
        for row in rows
        for message in (
            Message(role="user", content=examples[row][0] + prompt_suffix),
            Message(role="assistant", content=examples[row][1]),
        )
    ]
    return Shots(file=source.path, rows=tuple(rows), num_held_out=num_left_out, turns=tuple(turns))


def questions_of(file: str | Path, *, prompt_key: str, option: str) -> Iterator[str]:
    """The last user turn of every row of a parquet file of problems; faulty rows have none."""
    source = DataFile(path=Path(file), option=option)
    table = read_table(source, (prompt_key,), (), None)
    check_prompt_column(source, table, prompt_key, "data.prompt_key")
    for record in table.to_pylist():
        try:
            yield to_messages(record[prompt_key], system_prompt="", prompt_suffix="")[-1].content
        except ValueError:
            # Whoever loads the problems says so.
            continue


def _read(source: DataFile, prompt_key: str, response_key: str) -> list[tuple[str, str]]:
    """Question and answer of every row."""
    if source.path.suffix == ".jsonl":
        records: Sequence[Mapping[str, Any]] = list(_json_rows(source))
    else:
        table = read_table(source, (prompt_key, response_key), (), None)
        check_prompt_column(source, table, prompt_key, "data.prompt_key")
        check_text_column(source, table, response_key, "data.response_key")
        records = table.to_pylist()
    problems = RowProblems(source)
    examples = []
    for row, record in enumerate(records):
        try:
            examples.append(_example(record.get(prompt_key), record.get(response_key)))
        except ValueError as reason:
            problems.add(row, str(reason))
    problems.raise_if_any(len(records))
    return examples


def _json_rows(source: DataFile) -> Iterator[Mapping[str, Any]]:
    try:
        lines = source.path.read_bytes().split(b"\n")
    except OSError as error:
        raise source.error(f"cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
            # JSON may escape half of a surrogate pair, which no tokenizer takes.
            json.dumps(found, ensure_ascii=False).encode()
        except ValueError as error:
            raise source.error(f"line {number} is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise source.error(f"line {number} is no JSON object")
        yield found


def _example(prompt: Any, response: Any) -> tuple[str, str]:
    """Raises ValueError with the reason if the two are no question and answer."""
    is_messages = isinstance(prompt, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in prompt
    )
    if prompt and not isinstance(prompt, str) and not is_messages:
        raise ValueError("the prompt is neither text nor messages")
    messages = to_messages(prompt, system_prompt="", prompt_suffix="")
    turns = [message for message in messages if message.role != "system"]
    if len(turns) > 1:
        raise ValueError(f"a conversation of {len(turns)} turns, expected one question")
    if not isinstance(response, str) or not response.strip():
        raise ValueError("no response")
    return turns[0].content, response


def _is_among(question: str, held_out: set[str]) -> bool:
    """Also if one of the two has more around it, such as an instruction."""
    return question in held_out or any(
        min(len(question), len(other)) >= MIN_CONTAINED and (question in other or other in question)
        for other in held_out
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
