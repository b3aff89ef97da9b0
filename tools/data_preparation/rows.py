"""How one row of a data set becomes a problem, or why it cannot."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_preparation.catalog import AnswerForm, DataSet
from osft_mcore.data.parquet import to_messages
from osft_mcore.evaluation.answers import last_boxed
from osft_mcore.records import GroundTruth, Message

OWN_COLUMNS = ("prompt", "reward_model")
"""A file that has both is in this project's layout already."""

_ROLES = {"human": "user", "gpt": "assistant"}
_HASHES = re.compile(r"####[ \t]*([^\n]*)")

Row = Mapping[str, Any]


class Unusable(ValueError):
    """A row that is left out; the message is the reason that is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a source hold what."""

    question: str
    answer: str
    given_id: str | None
    only: str | None
    others: tuple[str, ...]
    """Not used."""

    @property
    def own_layout(self) -> bool:
        """True if the source is in this project's layout already."""
        return (self.question, self.answer) == OWN_COLUMNS

    @property
    def used(self) -> list[str]:
        """All that a row is made of, each once."""
        extra = ("data_source", "response") if self.own_layout else ()
        names = (self.question, self.answer, self.given_id, self.only, *extra)
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of the output."""

    messages: tuple[Message, ...]
    ground_truth: GroundTruth
    """A tuple only where the source is in this project's layout and has lists."""
    given_id: str | None
    key: str
    """SHA-256 of the question as it was given."""
    response: str | None
    index: int
    """Of the row in its source."""


def find_columns(data_set: DataSet, found: Sequence[str]) -> Columns | str:
    """Which of the columns `found` to use, or what is missing."""
    own = all(name in found for name in OWN_COLUMNS)
    asked = {
        "the question": OWN_COLUMNS[:1] if own else data_set.question,
        "the answer": OWN_COLUMNS[1:] if own else data_set.answer,
    }
    if data_set.only and not own:
        asked["the kind of question"] = data_set.only[:1]
    chosen = {what: _first(names, found) for what, names in asked.items()}
    missing = [
        f"{what} ({' or '.join(asked[what])})" for what, name in chosen.items() if name is None
    ]
    if missing:
        return f"no column for {' and '.join(missing)}; found {', '.join(found) or 'none'}"
    columns = Columns(
        question=str(chosen["the question"]),
        answer=str(chosen["the answer"]),
        given_id=_first(data_set.given_id, found),
        only=chosen.get("the kind of question"),
        others=(),
    )
    return replace(columns, others=tuple(name for name in found if name not in columns.used))


def _first(names: Sequence[str], found: Sequence[str]) -> str | None:
    return next((name for name in names if name in found), None)


def to_problem(
    data_set: DataSet, columns: Columns, row: Row, index: int, *, system: str, suffix: str
) -> Problem:
    """The problem in a row. Raises Unusable with the reason if there is none."""
    if columns.only and data_set.only and row.get(columns.only) != data_set.only[1]:
        raise Unusable(f"{columns.only} is not {data_set.only[1]}")
    if columns.own_layout and row.get("data_source", data_set.data_source) != data_set.data_source:
        raise Unusable(f"data_source is not {data_set.data_source}")
    question = _question(row.get(columns.question))
    try:
        given = to_messages(question, system_prompt="", prompt_suffix="")
        messages = to_messages(question, system_prompt=system, prompt_suffix=suffix)
    except ValueError as reason:
        raise Unusable(str(reason)) from reason
    cell = row.get(columns.answer)
    answer = _answer(cell)
    response = row.get("response") if columns.own_layout else answer
    given_id = row.get(columns.given_id) if columns.given_id else None
    return Problem(
        messages=tuple(messages),
        ground_truth=_accepted(cell)
        if columns.own_layout
        else _ground_truth(answer, data_set.answer_form),
        given_id=None if given_id in (None, "") else str(given_id),
        key=_key(given),
        response=response if data_set.with_response and isinstance(response, str) else None,
        index=index,
    )


def _key(messages: Sequence[Message]) -> str:
    turns = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _turns(cell: Any) -> list[dict[str, Any]] | None:
    """The turns in a cell, with the roles that this project knows; None if it holds no turns."""
    if not isinstance(cell, list) or not cell or not all(isinstance(turn, dict) for turn in cell):
        return None
    turns = []
    for turn in cell:
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if "content" in turn else turn.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise Unusable("a turn without role or text")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return turns


def _question(cell: Any) -> str | list[dict[str, Any]]:
    if cell is None or cell == "" or cell == []:
        raise Unusable("no prompt")
    if isinstance(cell, str):
        return cell
    turns = _turns(cell)
    if turns is None:
        raise Unusable("the prompt is neither text nor turns")
    roles = [turn["role"] for turn in turns]
    return turns[: roles.index("assistant")] if "assistant" in roles else turns


def _answer(cell: Any) -> str:
    """Text of an answer, however it is stored."""
    if isinstance(cell, dict):
        cell = cell.get("ground_truth")
    if isinstance(cell, list) and (turns := _turns(cell)):
        cell = next((turn["content"] for turn in turns if turn["role"] == "assistant"), None)
    if isinstance(cell, list) and all(isinstance(part, str) for part in cell):
        cell = ", ".join(cell)
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | None):
        raise Unusable("the answer is neither text nor a number")
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        raise Unusable("no answer")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if not str(cell).strip():
        raise Unusable("no answer")
    return str(cell)


def _accepted(cell: Any) -> GroundTruth:
    """In this project's layout one of a list is enough; elsewhere all are asked for, and joined."""
    golds = cell.get("ground_truth") if isinstance(cell, dict) else None
    if isinstance(golds, list) and len(golds) > 1:
        return tuple(map(_answer, golds))
    return _answer(cell)


def _ground_truth(answer: str, form: AnswerForm) -> str:
    if form == "plain":
        return answer
    if form == "whole_number":
        digits = answer.strip()
        return str(int(digits)) if digits.isascii() and digits.isdigit() else answer
    if form == "last_box":
        found = last_boxed(answer)
        if found is None or not found.strip():
            raise Unusable("no boxed answer")
        return found.strip()
    last = _HASHES.findall(answer)[-1:]
    number = last[0].strip().replace(",", "") if last else ""
    if not number:
        raise Unusable("no answer after ####")
    return number
