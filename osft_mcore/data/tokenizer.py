"""Text to token ids and back: the model's own tokenizer and chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from osft_mcore.errors import ConfigError
from osft_mcore.records import Message

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""All that decides how text becomes tokens and which of them end an answer."""
PROBE = "What is 1+1"
"""A template that does not render this text back loses the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTokenizer:
    """A tokenizer with a chat template and a known end of answer."""

    eos_token_ids: frozenset[int]
    """Any of these ends an answer: generation_config.json's, else the tokenizer's."""
    response_eos_id: int
    """The one that a given answer is closed with."""
    hf_tokenizer: Any

    def render(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """Text and token ids of a prompt that ends where the answer begins.

        Raises ValueError if the chat template refuses the messages.
        """
        text = _apply_template(self.hf_tokenizer, messages)
        return text, self._encode(text)

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of a given answer, closed with one end-of-answer token.

        Raises ValueError if the answer contains an end-of-answer token before its end.
        """
        token_ids = self._encode(text)
        if not token_ids or token_ids[-1] not in self.eos_token_ids:
            token_ids = (*token_ids, self.response_eos_id)
        self.check_ends_once(token_ids)
        return token_ids

    def check_ends_once(self, token_ids: Sequence[int]) -> None:
        """Raise ValueError if an answer contains an end-of-answer token before its end."""
        if not self.eos_token_ids.isdisjoint(token_ids[:-1]):
            raise ValueError("an end-of-answer token inside the answer")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, special tokens left out."""
        return str(self.hf_tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.hf_tokenizer.encode(text, add_special_tokens=False))


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that a model folder has."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def load_tokenizer(
    model_path: str | Path,
    chat_template: str | None,
    *,
    renders: bool = True,
    trust_remote_code: bool = False,
) -> ChatTokenizer:
    """Load the tokenizer of a local model folder; `chat_template` is a Jinja file, or None.

    `renders` False: no prompt will be rendered, so that no template is needed. `trust_remote_code`:
    Python files in the folder may run.
    Raises ConfigError (options model.path, data.chat_template).
    """
    folder = Path(model_path)
    hf_tokenizer = _load_hf_tokenizer(folder, trust_remote_code=trust_remote_code)
    eos_ids = _eos_ids(folder, hf_tokenizer.eos_token_id)
    own_eos = hf_tokenizer.eos_token_id
    if chat_template is not None:
        hf_tokenizer.chat_template = _read_template(Path(chat_template))
    if renders:
        _check_template(hf_tokenizer, folder, chat_template)
    return ChatTokenizer(
        eos_token_ids=frozenset(eos_ids),
        response_eos_id=own_eos if own_eos in eos_ids else eos_ids[0],
        hf_tokenizer=hf_tokenizer,
    )


def _load_hf_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: {str(folder)!r} is not a folder; expected a local Hugging Face model "
            "folder with a tokenizer"
        )
    # Without this check transformers invents an empty tokenizer from the model type alone.
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(
            f"model.path: no tokenizer in {str(folder)!r}; expected one of "
            f"{', '.join(VOCABULARY_FILES)}"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"model.path: the tokenizer in {str(folder)!r} cannot be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """generation_config.json's eos_token_id (one or a list), else the tokenizer's."""
    declared = _read_json(folder / "generation_config.json").get("eos_token_id")
    source = "generation_config.json"
    if declared is None:
        declared, source = tokenizer_eos, "the tokenizer"
    ids = tuple(declared) if isinstance(declared, list) else (declared,)
    if ids in ((), (None,)):
        raise ConfigError(
            f"model.path: no end-of-text token in {str(folder)!r}: neither generation_config.json "
            "(eos_token_id) nor the tokenizer (eos_token) names one; answers could never end"
        )
    # transformers gives some tokenizers a default EOS and appends it when the vocabulary lacks it.
    vocab = _read_json(folder / "config.json").get("vocab_size")
    for token_id in ids:
        if type(token_id) is not int or token_id < 0 or (vocab and token_id >= int(vocab)):
            raise ConfigError(
                f"model.path: {source} of {str(folder)!r} has end-of-text token id {token_id!r}, "
                f"which the model does not have (vocab_size {vocab}); "
                "set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
            )
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} is not a JSON object")
    return content


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template: {str(path)!r} cannot be read ({error}); "
            "expected a file with a Jinja chat template"
        ) from error


def _check_template(hf_tokenizer: Any, folder: Path, chat_template: str | None) -> None:
    if not hf_tokenizer.chat_template:
        raise ConfigError(
            f"data.chat_template: the tokenizer in {str(folder)!r} has no chat template; "
            "name a file with one"
        )
    option = "model.path" if chat_template is None else "data.chat_template"
    source = f"the chat template of {str(folder)!r}" if chat_template is None else chat_template
    try:
        text = _apply_template(hf_tokenizer, [Message(role="user", content=PROBE)])
    except ValueError as error:
        raise ConfigError(f"{option}: {source} does not work: {error}") from error
    if PROBE not in text:
        raise ConfigError(f"{option}: {source} leaves out the user's message")


def _apply_template(hf_tokenizer: Any, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            hf_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"chat template: {error}") from error
