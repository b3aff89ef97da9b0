"""Answers that a model gave once: solutions.jsonl, and the SFT set that is made of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError

from osft_mcore.data.parquet import DataFile, RowProblems
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.files import rename
from osft_mcore.records import GroundTruth, Message, Response, listed

TokenIds = tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One line of solutions.jsonl: an answer, and all that is needed to train on it."""

    row: Annotated[int, Field(ge=0, lt=2**63)]
    """Of the prompt, in data.train."""
    prompt_id: str
    sample: Annotated[int, Field(ge=0, lt=2**31)]
    data_source: str
    ground_truth: GroundTruth
    prompt: tuple[Message, ...]
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)]
    response: str
    """For people; the tokens decide."""
    response_token_ids: TokenIds
    """First token through the end-of-answer token, if it was not cut off."""
    truncated: bool
    """Cut off by rollout.max_response_tokens."""
    tau_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @property
    def empty(self) -> bool:
        """True if it says nothing."""
        return not self.response_token_ids or not self.response.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What became of the answers of one file."""

    num_answers: int
    num_empty: int
    """Dropped."""
    num_truncated: int
    """Of those that are not empty."""
    truncated_kept: bool
    num_train: int
    num_val: int
    num_train_tokens: int
    """Of the responses."""
    val_file: Path | None

    def table(self) -> list[list[str]]:
        """Rows of name and count, for people."""
        did = "kept" if self.truncated_kept else "dropped"
        rows = [
            ["answers read", str(self.num_answers)],
            ["empty, dropped", str(self.num_empty)],
            [f"cut off, {did}", str(self.num_truncated)],
            ["written to train on", str(self.num_train)],
            ["their response tokens", str(self.num_train_tokens)],
        ]
        if self.val_file is not None:
            rows.append([f"written to {self.val_file.name}", str(self.num_val)])
        return rows


_SOLUTION: Final = TypeAdapter(Solution)
_SCHEMA: Final = pa.schema(
    {
        "id": pa.string(),
        "row": pa.int64(),
        "sample": pa.int32(),
        "data_source": pa.string(),
        "ground_truth": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "response": pa.string(),
        "prompt_token_ids": pa.list_(pa.int32()),
        "response_token_ids": pa.list_(pa.int32()),
        "truncated": pa.bool_(),
        "tau_sample": pa.float64(),
    }
)


def solution_lines(
    responses: Iterable[Response], decode: Callable[[Sequence[int]], str], *, tau_sample: float
) -> str:
    """The lines of sampled answers."""
    return "".join(
        _SOLUTION.dump_json(_solution(response, decode, tau_sample)).decode() + "\n"
        for response in responses
    )


def _solution(
    response: Response, decode: Callable[[Sequence[int]], str], tau_sample: float
) -> Solution:
    prompt = response.prompt
    return Solution(
        row=prompt.row,
        prompt_id=prompt.prompt_id,
        sample=response.sample_index,
        data_source=prompt.data_source,
        ground_truth=prompt.ground_truth,
        prompt=prompt.messages,
        prompt_token_ids=prompt.token_ids,
        response=decode(response.token_ids),
        response_token_ids=response.token_ids,
        truncated=response.truncated,
        tau_sample=tau_sample,
    )


def read_solutions(file: Path, *, option: str) -> list[Solution]:
    """All of a file. Raises DataError that names `option`, the file, and the first bad lines."""
    source = DataFile(path=file, option=option)
    problems, solutions = RowProblems(source, unit="line"), []
    seen: dict[tuple[int, int], int] = {}
    num_lines = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for num_lines, line in enumerate(stream, start=1):
                try:
                    solution = _SOLUTION.validate_json(line, strict=True)
                except ValidationError as error:
                    problems.add(num_lines, _reason(error))
                    continue
                place = (solution.row, solution.sample)
                if (first := seen.setdefault(place, num_lines)) != num_lines:
                    problems.add(num_lines, f"row and sample are those of line {first}")
                solutions.append(solution)
    except (OSError, UnicodeDecodeError) as error:
        raise source.error(f"cannot be read ({error}); expected a solutions.jsonl") from error
    problems.raise_if_any(num_lines)
    if not solutions:
        raise source.error("the file has no lines")
    return solutions


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def convert_solutions(
    file: Path,
    out: Path,
    *,
    truncated: Literal["drop", "keep"],
    val_share: float = 0.0,
    seed: int = 1,
) -> Conversion:
    """Write the answers of `file` as a parquet file that `osft sft` reads, in their order.

    `val_share` of the prompts, drawn with `seed`, go with all of their answers to a second file
    beside it, <out>_val. Raises ConfigError if an output exists, DataError if `file` is
    not as it should be or nothing is left to train on. Nothing is written then.
    """
    if not 0 <= val_share < 1:
        raise ConfigError(f"--val-share: found {val_share:g}, expected at least 0 and below 1")
    if seed < 0:
        raise ConfigError(f"--seed: found {seed}, expected at least 0")
    val_file = out.with_name(f"{out.stem}_val{out.suffix}") if val_share else None
    outputs = [path for path in (out, val_file) if path is not None]
    if present := [
        f"--out: {str(path)!r} exists; name another" for path in outputs if path.exists()
    ]:
        raise ConfigError(present)
    solutions = read_solutions(file, option="--solutions")
    said = [solution for solution in solutions if not solution.empty]
    usable = [solution for solution in said if truncated == "keep" or not solution.truncated]
    num_truncated = sum(solution.truncated for solution in said)
    if not usable:
        advice = (
            "; raise rollout.max_response_tokens and generate anew, or keep what was cut off "
            "(--truncated keep)"
        )
        raise DataError(
            f"--solutions: {file}: nothing is left to train on: of {len(solutions)} answers "
            f"{len(solutions) - len(said)} are empty and {num_truncated} cut off"
            f"{advice if num_truncated else ''}"
        )
    held_out = _held_out_rows(usable, val_share, seed)
    train = [solution for solution in usable if solution.row not in held_out]
    # Both files alike, whichever of them has the lists.
    several = any(not isinstance(solution.ground_truth, str) for solution in usable)
    _write(out, train, several=several)
    if val_file is not None:
        rest = (solution for solution in usable if solution.row in held_out)
        _write(val_file, rest, several=several)
    return Conversion(
        num_answers=len(solutions),
        num_empty=len(solutions) - len(said),
        num_truncated=num_truncated,
        truncated_kept=truncated == "keep",
        num_train=len(train),
        num_val=len(usable) - len(train),
        num_train_tokens=sum(len(solution.response_token_ids) for solution in train),
        val_file=val_file,
    )


def _held_out_rows(solutions: Sequence[Solution], share: float, seed: int) -> set[int]:
    """The prompts of the second file. Raises DataError if one of the two would be empty."""
    rows = sorted({solution.row for solution in solutions})
    count = round(share * len(rows))
    if share and not 0 < count < len(rows):
        raise DataError(
            f"--val-share: {share:g} of {len(rows)} prompts leaves one of the two files empty"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    return {rows[index] for index in generator.permutation(len(rows))[:count].tolist()}


def _write(path: Path, solutions: Iterable[Solution], *, several: bool) -> None:
    """In one step: what has the name is complete. `several`: ground truths are lists."""
    rows, schema = list(_columns(solutions)), _SCHEMA
    if several:
        place = schema.get_field_index("ground_truth")
        schema = schema.set(place, pa.field("ground_truth", pa.list_(pa.string())))
        for row in rows:
            row["ground_truth"] = listed(row["ground_truth"])
    table = pa.Table.from_pylist(rows, schema=schema)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    rename(temporary, path)


def _columns(solutions: Iterable[Solution]) -> Iterator[dict[str, Any]]:
    for solution in solutions:
        yield {
            "id": solution.prompt_id,
            "prompt": [{"role": m.role, "content": m.content} for m in solution.prompt],
            **{
                name: getattr(solution, name)
                for name in _SCHEMA.names
                if name not in ("id", "prompt")
            },
        }
