"""What a run reads before it builds a model: tokenizer, prompts, held-out problems."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from osft_mcore.config.evaluation import benchmark_files
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.order import steps_per_epoch
from osft_mcore.data.parquet import data_sha256, file_holds_token_ids
from osft_mcore.data.problems import Problems, load_problems
from osft_mcore.data.sft import SftData, load_examples
from osft_mcore.data.shots import Shots, choose_shots, questions_of
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.evaluation.evaluator import check_problems
from osft_mcore.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Problems to score on, by data source, and what was left out."""

    by_source: dict[str, tuple[Prompt, ...]]
    dropped_overlong: dict[str, int]
    """By data source: problems longer than rollout.max_prompt_tokens."""
    shots: Shots | None = None
    """The worked examples that stand before every problem."""

    @property
    def num_problems(self) -> int:
        """Over all sources."""
        return sum(len(prompts) for prompts in self.by_source.values())

    @property
    def num_dropped_overlong(self) -> int:
        """Over all sources."""
        return sum(self.dropped_overlong.values())


def load_train_prompts(config: RunConfig, tokenizer: ChatTokenizer) -> Problems:
    """The prompts to sample answers to."""
    return _load(config, tokenizer, config.data.train, option="data.train", limit=None)


def load_chat_tokenizer(config: RunConfig, *, renders: bool = True) -> ChatTokenizer:
    """The tokenizer of model.path, as the options want it."""
    return load_tokenizer(
        config.model.path,
        config.data.chat_template,
        renders=renders,
        trust_remote_code=config.model.trust_remote_code,
    )


def load_sft_tokenizer(config: RunConfig) -> ChatTokenizer:
    """The tokenizer of given answers: prompts that are token ids need no chat template."""
    ids = file_holds_token_ids(config.data.train, config.data.prompt_key)
    return load_chat_tokenizer(config, renders=not ids)


def load_sft_examples(config: RunConfig, tokenizer: ChatTokenizer) -> SftData:
    """The given answers to train on."""
    return load_examples(
        config.data.train,
        tokenizer,
        prompt_key=config.data.prompt_key,
        response_key=config.data.response_key,
        system_prompt=config.data.system_prompt,
        prompt_suffix=config.data.prompt_suffix,
        chat_template=config.data.chat_template,
        max_tokens=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        vocab=read_model_shape(config.model.path).vocab,
    )


def load_held_out(config: RunConfig, tokenizer: ChatTokenizer) -> HeldOut:
    """The evaluation problems of all files."""
    limit, shots = config.evaluation.max_problems, _shots(config)
    files = [
        _load(config, tokenizer, file, option="evaluation.files", limit=limit, shots=shots)
        for file in benchmark_files(config)
    ]
    by_source: dict[str, list[Prompt]] = {}
    for problems in files:
        for prompt in problems.prompts:
            by_source.setdefault(prompt.data_source, []).append(prompt)
    if by_source:
        check_problems(by_source)
    return HeldOut(
        by_source={source: tuple(prompts) for source, prompts in by_source.items()},
        dropped_overlong=dict(sum((Counter(at.dropped_overlong) for at in files), Counter())),
        shots=shots,
    )


def total_steps(config: RunConfig, num_items: int) -> int:
    """Rollout (or SFT) batches of the whole run. Raises DataError if not one can be filled."""
    per_epoch = steps_per_epoch(num_items, config.train.prompts_per_step)
    return config.train.epochs * per_epoch if config.train.steps is None else config.train.steps


def data_hashes(files: Sequence[str]) -> dict[str, Any]:
    """SHA-256 of every data file, for the manifest."""
    return {"data_sha256": {file: data_sha256(file) for file in files}}


def _shots(config: RunConfig) -> Shots | None:
    """Chosen with all held-out problems in sight, also those that max_problems leaves out."""
    evaluation, data = config.evaluation, config.data
    files = benchmark_files(config)
    if evaluation.shots == 0 or not files:
        return None
    return choose_shots(
        evaluation.shots_file,
        chain.from_iterable(
            questions_of(file, prompt_key=data.prompt_key, option="evaluation.files")
            for file in files
        ),
        count=evaluation.shots,
        seed=config.seed,
        prompt_key=data.prompt_key,
        response_key=data.response_key,
        prompt_suffix=data.prompt_suffix,
    )


def _load(
    config: RunConfig,
    tokenizer: ChatTokenizer,
    file: str,
    *,
    option: str,
    limit: int | None,
    shots: Shots | None = None,
) -> Problems:
    return load_problems(
        file,
        tokenizer,
        prompt_key=config.data.prompt_key,
        system_prompt=config.data.system_prompt,
        prompt_suffix=config.data.prompt_suffix,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        option=option,
        limit=limit,
        shots=shots,
    )
