"""Questions with a known answer: what OSFT samples answers to and what evaluation scores."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from osft_mcore.data.parquet import (
    DataFile,
    RowProblems,
    check_prompt_column,
    check_text_column,
    read_table,
    to_messages,
)
from osft_mcore.data.shots import Shots
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.records import GroundTruth, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """The prompts of one file, in file order."""

    file: Path
    prompts: tuple[Prompt, ...]
    dropped_overlong: dict[str, int]
    """By data source: prompts left out because they have more than max_prompt_tokens tokens."""

    @property
    def num_dropped_overlong(self) -> int:
        """Over all sources."""
        return sum(self.dropped_overlong.values())


def load_problems(
    file: str | Path,
    tokenizer: ChatTokenizer,
    *,
    prompt_key: str,
    system_prompt: str,
    prompt_suffix: str,
    max_prompt_tokens: int,
    option: str,
    limit: int | None = None,
    shots: Shots | None = None,
) -> Problems:
    """Read, render and tokenise the first `limit` rows of a parquet file, `shots` before each.

    Columns: `prompt_key` (text or messages), `data_source`, `reward_model.ground_truth` (text, a
    number, or a list of accepted ones) and, optionally, `id`. Prompt.row is the row in the file,
    whatever is dropped.
    Raises DataError that names `option`, the file, and every kind of fault.
    """
    source = DataFile(path=Path(file), option=option)
    required = (prompt_key, "data_source", "reward_model")
    table = read_table(source, required, ("id",), limit)
    check_prompt_column(source, table, prompt_key, "data.prompt_key")
    check_text_column(source, table, "data_source", option)
    _check_reward_model(source, table)
    problems = RowProblems(source)
    prompts = []
    for row, record in enumerate(table.to_pylist()):
        try:
            messages = to_messages(
                record[prompt_key], system_prompt=system_prompt, prompt_suffix=prompt_suffix
            )
            if shots is not None:
                messages = shots.before(messages)
            prompt = _prompt(row, record, *tokenizer.render(messages))
            prompts.append(replace(prompt, messages=tuple(messages)))
        except ValueError as reason:
            problems.add(row, str(reason))
    problems.raise_if_any(table.num_rows)
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        examples = f", with {len(shots.rows)} examples (evaluation.shots)" if shots else ""
        raise source.error(
            f"all {len(prompts)} prompts are longer than rollout.max_prompt_tokens = "
            f"{max_prompt_tokens}; the shortest has {shortest} tokens{examples}"
        )
    return Problems(
        file=source.path,
        prompts=tuple(_with_unique_ids(kept)),
        dropped_overlong=dict(
            Counter(p.data_source for p in prompts if len(p.token_ids) > max_prompt_tokens)
        ),
    )


def _check_reward_model(source: DataFile, table: pa.Table) -> None:
    kind = table.schema.field("reward_model").type
    if not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        raise source.error(
            f"column 'reward_model' has type {kind}; expected a struct with ground_truth"
        )


def _prompt(row: int, record: dict[str, Any], text: str, token_ids: tuple[int, ...]) -> Prompt:
    data_source = record["data_source"]
    if not data_source:
        raise ValueError("no data_source")
    given_id = record.get("id")
    return Prompt(
        row=row,
        prompt_id=f"{data_source}/{row}" if given_id in (None, "") else str(given_id),
        data_source=data_source,
        text=text,
        token_ids=token_ids,
        ground_truth=_ground_truth(record["reward_model"]),
    )


def _ground_truth(reward_model: dict[str, Any] | None) -> GroundTruth:
    """Of several accepted answers all; a list of one is that one."""
    truth = None if reward_model is None else reward_model["ground_truth"]
    if not isinstance(truth, list):
        return _accepted(truth)
    if not truth:
        raise ValueError("no reward_model.ground_truth")
    golds = tuple(map(_accepted, truth))
    return golds[0] if len(golds) == 1 else golds


def _accepted(truth: Any) -> str:
    if truth is None or truth != truth or str(truth).strip() == "":
        raise ValueError("no reward_model.ground_truth")
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(
            f"reward_model.ground_truth is a {type(truth).__name__}, expected text, a number or a "
            "list of these"
        )
    return str(truth)


def _with_unique_ids(prompts: list[Prompt]) -> list[Prompt]:
    """Ids that repeat identify nothing: number the whole file by row instead."""
    if len({prompt.prompt_id for prompt in prompts}) == len(prompts):
        return prompts
    return [replace(p, prompt_id=f"{p.data_source}/{p.row}") for p in prompts]
