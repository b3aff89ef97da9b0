"""The demo task: chains of additions, a character tokenizer and a small Qwen2 config."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from osft_mcore.errors import ConfigError, DataError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"

PROMPT_TYPE = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
PROBLEM_SCHEMA = pa.schema(
    [
        ("prompt", PROMPT_TYPE),
        ("data_source", pa.string()),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("id", pa.string()),
    ]
)
SFT_SCHEMA = pa.schema([("prompt", PROMPT_TYPE), ("response", pa.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticTask:
    """How many problems, how hard, and how often the given traces err."""

    num_sft: int = 40_000
    num_train: int = 20_000
    num_eval: int = 512
    num_addends: int = 4
    max_addend: int = 29
    """Addends are uniform in 1..max_addend."""
    wrong_share: float = 0.3
    """Probability that a step of an SFT trace is wrong."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError with everything that cannot work."""
        problems = [
            f"{name}: found {getattr(self, name)}, expected at least {least}"
            for name, least in (
                ("num_sft", 1),
                ("num_train", 1),
                ("num_eval", 1),
                ("num_addends", 2),
                ("max_addend", 1),
            )
            if getattr(self, name) < least
        ]
        if not 0 <= self.wrong_share <= 1:
            problems.append(f"wrong_share: found {self.wrong_share}, expected 0 to 1")
        possible = max(self.max_addend, 1) ** max(self.num_addends, 1)
        if 2 * self.num_questions > possible:
            problems.append(
                f"num_sft + num_train + num_eval: found {self.num_questions} different questions, "
                f"but {self.num_addends} addends up to {self.max_addend} make {possible}; "
                "use at most half of them"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def num_questions(self) -> int:
        """All questions; no two are the same."""
        return self.num_sft + self.num_train + self.num_eval


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A Qwen2-architecture model; the default has 0.8M parameters."""

    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 384
    tied: bool = True
    max_position: int = 256
    init_std: float = 0.06
    """The usual 0.02 suits wide models; at this width 0.06 learns the task in fewer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A worked answer: running sums, then the last one in a box."""

    sums: tuple[int, ...]
    """As written; a wrong one is carried on."""
    wrong: tuple[bool, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticFiles:
    """What `write_arithmetic` wrote."""

    model: Path
    sft: Path
    train: Path
    eval: Path
    num_steps: int
    """Steps in the SFT traces, and how many of them are wrong."""
    num_wrong_steps: int


def write_arithmetic(
    out: Path, task: ArithmeticTask, model: TinyModel, *, overwrite: bool = False
) -> ArithmeticFiles:
    """Write model/, sft.parquet, train.parquet and eval.parquet into `out`.

    Raises DataError if `out` is a file or is not empty, unless `overwrite`.
    """
    if out.is_file():
        raise DataError(f"--out: {out} is a file; expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(f"--out: {out} is not empty; choose another or pass --overwrite")
    questions = iter(distinct_questions(task))
    sft_questions = [next(questions) for _ in range(task.num_sft)]
    train_questions = [next(questions) for _ in range(task.num_train)]
    rng = random.Random(f"{task.seed}/traces")
    traces = [write_trace(addends, task.wrong_share, rng) for addends in sft_questions]

    write_model_folder(out / "model", model)
    files = ArithmeticFiles(
        model=out / "model",
        sft=out / "sft.parquet",
        train=out / "train.parquet",
        eval=out / "eval.parquet",
        num_steps=sum(len(trace.wrong) for trace in traces),
        num_wrong_steps=sum(sum(trace.wrong) for trace in traces),
    )
    pq.write_table(_sft_table(sft_questions, traces), files.sft)
    pq.write_table(_problem_table(train_questions, "train"), files.train)
    pq.write_table(_problem_table(list(questions), "eval"), files.eval)
    return files


def distinct_questions(task: ArithmeticTask) -> list[tuple[int, ...]]:
    """`task.num_questions` different tuples of addends, in the order drawn."""
    rng = random.Random(f"{task.seed}/questions")
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < task.num_questions:
        drawn[tuple(rng.randint(1, task.max_addend) for _ in range(task.num_addends))] = None
    return list(drawn)


def question_text(addends: Sequence[int]) -> str:
    """`12+7+25=?`."""
    return "+".join(map(str, addends)) + "=?"


def write_trace(addends: Sequence[int], wrong_share: float, rng: random.Random) -> Trace:
    """Work through `addends`; each step gets one digit wrong with probability `wrong_share`."""
    sums, wrong, lines = [addends[0]], [], []
    for addend in addends[1:]:
        total = sums[-1] + addend
        wrong.append(rng.random() < wrong_share)
        written = _with_one_wrong_digit(total, rng) if wrong[-1] else total
        lines.append(f"{sums[-1]}+{addend}={written}\n")
        sums.append(written)
    text = "".join(lines) + f"\\boxed{{{sums[-1]}}}"
    return Trace(sums=tuple(sums[1:]), wrong=tuple(wrong), text=text)


def _with_one_wrong_digit(number: int, rng: random.Random) -> int:
    digits = list(str(number))
    place = rng.randrange(len(digits))
    choices = [d for d in "0123456789" if d != digits[place] and (place > 0 or d != "0")]
    digits[place] = rng.choice(choices)
    return int("".join(digits))


def _messages(addends: Sequence[int]) -> list[dict[str, str]]:
    return [{"content": question_text(addends), "role": "user"}]


def _sft_table(questions: Sequence[Sequence[int]], traces: Sequence[Trace]) -> pa.Table:
    rows: Iterator[dict[str, Any]] = (
        {"prompt": _messages(addends), "response": trace.text}
        for addends, trace in zip(questions, traces, strict=True)
    )
    return pa.Table.from_pylist(list(rows), schema=SFT_SCHEMA)


def _problem_table(questions: Sequence[Sequence[int]], split: str) -> pa.Table:
    rows: Iterator[dict[str, Any]] = (
        {
            "prompt": _messages(addends),
            "data_source": "arithmetic",
            "ability": "math",
            "reward_model": {"ground_truth": str(sum(addends)), "style": "rule"},
            "id": f"{split}/{row}",
        }
        for row, addends in enumerate(questions)
    )
    return pa.Table.from_pylist(list(rows), schema=PROBLEM_SCHEMA)


def write_model_folder(folder: Path, model: TinyModel) -> None:
    """Write config.json, generation_config.json and the tokenizer; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer(model.max_position)
    tokenizer.save_pretrained(str(folder))
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(folder / "generation_config.json", token_ids)
    _write_json(folder / "config.json", _qwen2_config(model, len(tokenizer)) | token_ids)


def character_tokenizer(max_position: int) -> Any:
    """One token per byte, so per ASCII character; returns a PreTrainedTokenizerFast.

    A byte-level BPE without merges, because transformers reads the tokenizer of every `qwen2`
    folder as a byte-level BPE, whatever tokenizer.json says. All 256 bytes, because such a
    tokenizer drops a character that it does not know without a word.
    """
    tokens = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<pad>",  # never produced; without it transformers adds a token of its own
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
    )


def _qwen2_config(model: TinyModel, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": model.hidden,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": vocab,
        "max_position_embeddings": model.max_position,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe(files: ArithmeticFiles, task: ArithmeticTask, model: TinyModel) -> str:
    """What was written, for a person."""
    sizes = f"{task.num_sft} SFT traces, {task.num_train} prompts, {task.num_eval} held out"
    share = files.num_wrong_steps / files.num_steps
    return (
        f"{sizes}; {task.num_addends} addends of 1..{task.max_addend}, "
        f"{share:.1%} of the trace steps wrong\n"
        f"model: {asdict(model)}\nwritten to {files.model.parent}"
    )
