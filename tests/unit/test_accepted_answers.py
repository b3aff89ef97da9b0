"""Problems with several accepted answers, from the file to the kept answers and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_evaluator import ScriptedEngine, decode

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.problems import load_problems
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.evaluation.evaluator import Evaluator, read_answers
from osft_mcore.evaluation.grading import Grader
from osft_mcore.records import Prompt

SCORER = """
def score(response, ground_truth, num_tokens):
    assert ground_truth in (["a", "7"], "7"), ground_truth
    return response in ground_truth
"""
CASES: dict[str, tuple[list[Any], list[str], list[float]]] = {
    # The last two are for algebra, which has to go through the list.
    "boxed_math": (
        [["a", "7"], ["7"], [r"\frac{\pi}{2}", "2x+2"]],
        [r"\boxed{a}", r"\boxed{7}", r"\boxed{8}", r"\boxed{2(x+1)}", r"\boxed{2(x+2)}"],
        [1, 1, 0, 1, 0],
    ),
    "boxed_math_fast": (
        [["a", "7"], ["7"], [r"\frac{\pi}{2}", "2x+2"]],
        [r"\boxed{7}", r"\boxed{7}", r"\boxed{a}", r"\boxed{2(x+1)}", r"\boxed{2(x+2)}"],
        [1, 1, 0, 1, 0],
    ),
    "boxed_numeric": ([["6", "7"], ["7"]], [r"\boxed{7.0}", r"\boxed{7}", r"\boxed{6}"], [1, 1, 0]),
    "gsm8k": ([["6", "7"], ["7"]], ["#### 7", "#### 7", "#### 6"], [1, 1, 0]),
    "answer_line": ([["6", "7"], ["7"]], ["Answer: 7", "Answer: 7", "Answer: 6"], [1, 1, -1]),
    "file": ([["a", "7"], ["7"]], ["7", "7", "a"], [1, 1, 0]),
}
"""By scorer: expected answers of the problems; responses, those without an own problem to the last
problem; scores."""


def load(folder: Path, truths: list[Any]) -> tuple[Prompt, ...]:
    write_model_folder(folder / "model", TinyModel())
    rows = [
        {"prompt": "1+2=?", "data_source": "s", "reward_model": {"ground_truth": truth}}
        for truth in truths
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "problems.parquet")
    return load_problems(
        folder / "problems.parquet", load_tokenizer(folder / "model", None), prompt_key="prompt",
        system_prompt="", prompt_suffix="", max_prompt_tokens=100, option="evaluation.files",
    ).prompts  # fmt: skip


@pytest.mark.parametrize("scorer", CASES)
def test_one_of_them_is_enough_for_every_scorer(scorer: str, tmp_path: Path) -> None:
    truths, texts, scores = CASES[scorer]
    (tmp_path / "own.py").write_text(SCORER)
    name = f"{tmp_path}/own.py:score" if scorer == "file" else scorer
    prompts = load(tmp_path, truths)
    last = len(prompts) - 1
    engine = ScriptedEngine(
        {
            prompt.prompt_id: texts[last:] if row == last else [texts[row]] * len(texts[last:])
            for row, prompt in enumerate(prompts)
        }
    )
    with Grader(EvaluationConfig(scorer=name, grader_timeout_s=60.0), 100) as grader:
        evaluator = Evaluator(
            engine, {"s": prompts}, decode, grader, num_samples=len(texts[last:]), top_p=1.0,
            max_tokens=100, seed=1, portion=1000, scorer=name, max_ungraded_share=0.0,
        )  # fmt: skip
        (portion,) = evaluator.graded(0, 1.0)
    assert portion.answers is not None
    evaluation = evaluator.evaluation(0, 1.0, portion.answers)
    assert evaluation is not None
    *firsts, others = evaluation.sources[0].problems
    assert [answers[0].score for answers in firsts] + [a.score for a in others] == scores
    kept = [json.loads(json.dumps(dataclasses.asdict(answer))) for answer in evaluation.answers]
    assert kept[0]["ground_truth"] == truths[0]
    assert evaluator.evaluation(0, 1.0, read_answers(kept)) == evaluation
    # Another list is another problem.
    changed = [row | {"ground_truth": ["a", "8"]} for row in kept[: len(texts[last:])]]
    changed += kept[len(texts[last:]) :]
    assert evaluator.evaluation(0, 1.0, read_answers(changed)) is None
