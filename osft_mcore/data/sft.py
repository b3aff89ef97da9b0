"""Given answers: (prompt, response) pairs for supervised fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from osft_mcore.data.parquet import (
    DataFile,
    RowProblems,
    check_prompt_column,
    check_text_column,
    read_table,
    to_messages,
)
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class SftData:
    """The examples of one file, in file order."""

    file: Path
    examples: tuple[Example, ...]
    num_dropped_overlong: int
    """Examples left out because prompt and response exceed max_tokens together."""


def load_examples(
    file: str | Path,
    tokenizer: ChatTokenizer,
    *,
    prompt_key: str,
    response_key: str,
    system_prompt: str,
    prompt_suffix: str,
    max_tokens: int,
) -> SftData:
    """Read, render and tokenise a parquet file of prompts (text or messages) and responses.

    Raises DataError that names data.train, the file, and every kind of fault.
    """
    source = DataFile(path=Path(file), option="data.train")
    table = read_table(source, (prompt_key, response_key), (), None)
    check_prompt_column(source, table, prompt_key, "data.prompt_key")
    check_text_column(source, table, response_key, "data.response_key")
    problems = RowProblems(source)
    examples = []
    for row, record in enumerate(table.to_pylist()):
        try:
            messages = to_messages(
                record[prompt_key], system_prompt=system_prompt, prompt_suffix=prompt_suffix
            )
            prompt = tokenizer.render(messages)[1]
            examples.append(_example(prompt, record[response_key], tokenizer, row=row))
        except ValueError as reason:
            problems.add(row, str(reason))
    problems.raise_if_any(table.num_rows)
    kept = tuple(example for example in examples if example.num_tokens <= max_tokens)
    if not kept:
        shortest = min(example.num_tokens for example in examples)
        raise source.error(
            f"all {len(examples)} examples are longer than rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens = {max_tokens}; the shortest has {shortest} tokens"
        )
    return SftData(file=source.path, examples=kept, num_dropped_overlong=len(examples) - len(kept))


def _example(
    prompt_token_ids: tuple[int, ...], response: str | None, tokenizer: ChatTokenizer, *, row: int
) -> Example:
    if not response or not response.strip():
        raise ValueError("no response")
    return Example(
        prompt_token_ids=prompt_token_ids,
        response_token_ids=tokenizer.encode_response(response),
        row=row,
    )
