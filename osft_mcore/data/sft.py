"""Given answers: (prompt, response) pairs for supervised fine-tuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from osft_mcore.data.parquet import (
    DataFile,
    RowProblems,
    check_prompt_column,
    check_text_column,
    holds_token_ids,
    read_table,
    to_messages,
    to_token_ids,
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
    chat_template: str | None,
    max_tokens: int,
    vocab: int,
) -> SftData:
    """Read a parquet file of prompts (text, messages, or token ids) and responses (text or ids).

    Text is rendered and tokenised, and a response closed; token ids are taken as they are.
    `vocab`: of the model. `chat_template`: the option, which `tokenizer` follows already.
    Raises DataError that names data.train, the file, and every kind of fault.
    """
    source = DataFile(path=Path(file), option="data.train")
    table = read_table(source, (prompt_key, response_key), (), None)
    _check_columns(source, table, prompt_key, response_key)
    rendering = (
        ("data.system_prompt", system_prompt),
        ("data.prompt_suffix", prompt_suffix),
        ("data.chat_template", chat_template),
    )
    unused = [name for name, value in rendering if value]
    if unused and holds_token_ids(table, prompt_key):
        raise source.error(
            f"column {prompt_key!r} holds token ids, which are taken as they are, without "
            f"{' and '.join(unused)}; leave that out, or name a column with text"
        )
    problems = RowProblems(source)
    examples = []
    for row, record in enumerate(table.to_pylist()):
        try:
            prompt = _prompt(
                record[prompt_key],
                tokenizer,
                system_prompt=system_prompt,
                prompt_suffix=prompt_suffix,
                vocab=vocab,
            )
            response = _response(record[response_key], tokenizer, vocab=vocab)
            examples.append(Example(prompt_token_ids=prompt, response_token_ids=response, row=row))
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


def _check_columns(source: DataFile, table: pa.Table, prompt_key: str, response_key: str) -> None:
    if not holds_token_ids(table, prompt_key):
        check_prompt_column(
            source, table, prompt_key, "data.prompt_key", or_else=", or lists of token ids"
        )
    if not holds_token_ids(table, response_key):
        check_text_column(
            source,
            table,
            response_key,
            "data.response_key",
            expected="text or lists of token ids",
        )


def _prompt(
    cell: Any, tokenizer: ChatTokenizer, *, system_prompt: str, prompt_suffix: str, vocab: int
) -> tuple[int, ...]:
    if cell and isinstance(cell, list) and not isinstance(cell[0], dict):
        return to_token_ids(cell, vocab=vocab)
    messages = to_messages(cell, system_prompt=system_prompt, prompt_suffix=prompt_suffix)
    return tokenizer.render(messages)[1]


def _response(cell: Any, tokenizer: ChatTokenizer, *, vocab: int) -> tuple[int, ...]:
    if not cell or (isinstance(cell, str) and not cell.strip()):
        raise ValueError("no response")
    if isinstance(cell, str):
        return tokenizer.encode_response(cell)
    token_ids = to_token_ids(cell, vocab=vocab)
    # Not closed: an answer that was cut off must not teach that it ended there.
    tokenizer.check_ends_once(token_ids)
    return token_ids
