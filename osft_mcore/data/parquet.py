"""Reading parquet files: the columns, rows and values that a run needs, or why it cannot."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from osft_mcore.errors import DataError
from osft_mcore.records import Message

NUM_ROWS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A data file and the option that names it; both go into every error message."""

    path: Path
    option: str

    def error(self, problem: str) -> DataError:
        """The error to raise about this file."""
        return DataError(f"{self.option}: {self.path}: {problem}")


@dataclass(slots=True)
class RowProblems:
    """Collects what is wrong with single rows, to report them together."""

    file: DataFile
    unit: str = "row"
    """What a row of the file is called."""
    reasons: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """Note that `row` cannot be used."""
        self.reasons.append((row, reason))

    def raise_if_any(self, num_rows: int) -> None:
        """Raise DataError with the first rows and the total count."""
        if not self.reasons:
            return
        shown = "; ".join(
            f"{self.unit} {row}: {reason}" for row, reason in self.reasons[:NUM_ROWS_SHOWN]
        )
        more = len(self.reasons) - NUM_ROWS_SHOWN
        raise self.file.error(
            f"{len(self.reasons)} of {num_rows} {self.unit}s cannot be used: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def data_sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def count_rows(file: str | Path) -> int | None:
    """Rows of a parquet file, from its footer; None if it is not there or not parquet."""
    try:
        return int(pq.ParquetFile(file).metadata.num_rows)
    except (OSError, pa.ArrowException):
        return None


def read_table(
    file: DataFile, required: Sequence[str], optional: Sequence[str], limit: int | None
) -> pa.Table:
    """Read the first `limit` rows of the named columns; an absent optional one is left out."""
    try:
        with pq.ParquetFile(file.path) as parquet:
            found: list[str] = parquet.schema_arrow.names
            missing = [name for name in required if name not in found]
            if missing:
                raise file.error(
                    f"no column {', '.join(map(repr, missing))}; the file has {', '.join(found)}"
                )
            wanted = [*required, *(name for name in optional if name in found)]
            table = parquet.read(columns=wanted)
    except FileNotFoundError as error:
        raise file.error("no such file") from error
    except (OSError, pa.ArrowException) as error:
        raise file.error(f"not a readable parquet file ({error})") from error
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise file.error(f"its values are damaged, expected text in UTF-8 ({error})") from error
    if table.num_rows == 0:
        raise file.error("the file has no rows")
    if limit is not None and limit < 1:
        raise file.error(f"a limit of {limit} rows leaves nothing; expected at least 1")
    return table if limit is None else table.slice(0, limit)


def check_prompt_column(
    file: DataFile, table: pa.Table, name: str, option: str, *, or_else: str = ""
) -> None:
    """Raise DataError unless the column holds texts or lists of {role, content} messages."""
    kind = table.schema.field(name).type
    if _is_text(kind):
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        turn = kind.value_type
        fields = {f.name: f.type for f in turn} if pa.types.is_struct(turn) else {}
        if all(name in fields and _is_text(fields[name]) for name in ("role", "content")):
            return
    raise file.error(
        f"column {name!r} has type {kind}; expected text or a list of {{role, content}} messages"
        f"{or_else} (option {option} names the column)"
    )


def check_text_column(
    file: DataFile, table: pa.Table, name: str, option: str, *, expected: str = "text"
) -> None:
    """Raise DataError unless the column holds texts."""
    kind = table.schema.field(name).type
    if not _is_text(kind):
        raise file.error(
            f"column {name!r} has type {kind}; expected {expected} "
            f"(option {option} names the column)"
        )


def file_holds_token_ids(file: str | Path, name: str) -> bool:
    """`holds_token_ids` of a file, from its footer; False if it is not there or not parquet."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException):
        return False
    return name in schema.names and _is_token_ids(schema.field(name).type)


def holds_token_ids(table: pa.Table, name: str) -> bool:
    """True if the column holds lists of whole numbers."""
    return _is_token_ids(table.schema.field(name).type)


def _is_token_ids(kind: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_list = any(is_kind(kind) for is_kind in kinds)
    return is_list and bool(pa.types.is_integer(kind.value_type))


def to_token_ids(cell: Sequence[int | None], *, vocab: int) -> tuple[int, ...]:
    """The token ids in a cell. Raises ValueError for one that the model does not have."""
    ids = []
    for token_id in cell:
        if token_id is None or not 0 <= token_id < vocab:
            raise ValueError(
                f"token id {token_id}, which the model does not have (vocab_size {vocab}); the "
                "ids must be of model.path's own tokenizer"
            )
        ids.append(token_id)
    return tuple(ids)


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def to_messages(cell: Any, *, system_prompt: str, prompt_suffix: str) -> list[Message]:
    """Turn a prompt cell into messages; a text is one user turn.

    A non-empty `system_prompt` goes first and replaces a system turn that the data has.
    `prompt_suffix` is appended to the last turn, which must be the user's.
    Raises ValueError with the reason if the cell holds no question.
    """
    if not cell:
        raise ValueError("no prompt")
    turns = [{"role": "user", "content": cell}] if isinstance(cell, str) else cell
    for turn in turns:
        if not turn or not turn["role"] or turn["content"] is None:
            raise ValueError("a prompt message without role or content")
    if turns[-1]["role"] != "user":
        raise ValueError(f"the last prompt message has role {turns[-1]['role']!r}, expected 'user'")
    if not turns[-1]["content"].strip():
        raise ValueError("the prompt is empty")
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in turns]
    messages[-1] = Message(role="user", content=messages[-1].content + prompt_suffix)
    if system_prompt:
        rest = [message for message in messages if message.role != "system"]
        messages = [Message(role="system", content=system_prompt), *rest]
    return messages
