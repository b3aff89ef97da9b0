"""The data sets: where each is, and which of its columns hold what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

AnswerForm = Literal["plain", "whole_number", "after_hashes", "last_box"]
"""How the expected answer stands in its column: as it is; perhaps with zeros in front; after the
last `####`; in the last box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    r"""One public data set. Of alternative columns the first that is there counts.

    A file in this project's own layout (`prompt` and `reward_model`) is taken for any of them.
    """

    name: str
    hub: str
    """Its id on the hub."""
    hub_config: str | None = None
    splits: Mapping[str, str]
    """From the split's name to that of the file made of it."""
    question: tuple[str, ...] = ("problem", "question", "Problem")
    """Text, or turns of which those before the first answer are the question."""
    answer: tuple[str, ...] = ("answer", "Answer")
    """Text, number, list of texts, or turns of which the first answer counts."""
    answer_form: AnswerForm = "plain"
    given_id: tuple[str, ...] = ("id", "unique_id", "ID", "problem_idx")
    data_source: str
    """What answers are told apart by in evaluation."""
    ability: str = "math"
    style: str = "rule"
    only: tuple[str, str] | None = None
    """Column and value: rows with another value are left out."""
    with_response: bool = False
    """Also write a column `response`, the given answer in full, for `osft sft`."""
    published_rows: Mapping[str, int] = field(default_factory=dict)
    """Of a split, where the number is known; another one is said."""
    validation_name: str | None = None
    """Of the file that gets rows drawn from split train."""


def _benchmark(name: str, hub: str, split: str, rows: int, form: AnswerForm = "plain") -> DataSet:
    return DataSet(
        name=name,
        hub=hub,
        splits={split: name},
        published_rows={split: rows},
        answer_form=form,
        data_source=name,
    )


_ALL: Final = (
    _benchmark("math500", "HuggingFaceH4/MATH-500", "test", 500),
    _benchmark("amc23", "math-ai/amc23", "test", 40),
    _benchmark("amc", "AI-MO/aimo-validation-amc", "train", 83),
    _benchmark("aime", "HuggingFaceH4/aime_2024", "train", 30, "whole_number"),
    _benchmark("aime25", "math-ai/aime25", "test", 30, "whole_number"),
    _benchmark("minerva", "math-ai/minervamath", "test", 272),
    DataSet(
        name="olympiadbench",
        hub="zwhe99/simplerl-OlympiadBench",
        splits={"test": "olympiadbench"},
        published_rows={"test": 675},
        answer=("final_answer", "answer"),
        data_source="olympiadbench",
    ),
    DataSet(
        name="deepscaler",
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        splits={"train": "deepscaler"},
        data_source="deepscaler",
    ),
    DataSet(
        name="openthoughts_math",
        hub="open-thoughts/OpenThoughts3-1.2M",
        splits={"train": "openthoughts_math"},
        question=("conversations",),
        answer=("conversations",),
        answer_form="last_box",
        data_source="open-thoughts/OpenThoughts3-1.2M",
        only=("domain", "math"),
    ),
    DataSet(
        name="gsm8k",
        hub="openai/gsm8k",
        hub_config="main",
        splits={"train": "gsm8k_train", "test": "gsm8k_test"},
        published_rows={"train": 7473, "test": 1319},
        validation_name="gsm8k_validation",
        answer_form="after_hashes",
        data_source="openai/gsm8k",
        with_response=True,
    ),
    DataSet(
        name="dapo_math_17k",
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        splits={"train": "dapo_math_17k"},
        question=("prompt",),
        answer=("reward_model",),
        data_source="math_dapo",
    ),
    DataSet(
        name="tldr",
        hub="trl-internal-testing/tldr-preference-sft-trl-style",
        splits={"train": "tldr", "validation": "tldr_validation"},
        question=("messages",),
        answer=("messages",),
        data_source="tldr",
        ability="summarization",
        style="model",
        with_response=True,
    ),
)

DATA_SETS: Final = MappingProxyType({data_set.name: data_set for data_set in _ALL})
