"""k-shot: which examples are drawn, where they stand, and that none of them is a problem."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osft_mcore.config.check_evaluation import absent_evaluation_files, evaluation_problems
from osft_mcore.config.evaluation import benchmark_files
from osft_mcore.config.load import as_options
from osft_mcore.config.schema import DataConfig, ModelConfig, RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.data.shots import Shots, choose_shots
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.evaluation.scorers import Sample, ScorerOptions, boxed_numeric, gsm8k
from osft_mcore.records import Message
from osft_mcore.train.inputs import load_held_out
from osft_mcore.train.scored import check_earlier_scores, scores_identity

TOOLS = Path(__file__).parents[2] / "tools"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def examples(count: int = 9) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}+1?", "response": f"It is {n + 1}."} for n in range(count)]


def choose(file: Path, *held_out: str, count: int = 3, seed: int = 1, suffix: str = "") -> Shots:
    return choose_shots(
        file, held_out, count=count, seed=seed, prompt_key="prompt", response_key="response",
        prompt_suffix=suffix,
    )  # fmt: skip


def test_the_seed_alone_decides_which(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "shots.jsonl", examples(50))
    assert choose(file) == choose(file)
    assert len({choose(file, seed=seed).rows for seed in range(5)}) == 5
    chosen = choose(file, seed=3)
    assert [message.content for message in chosen.turns[:2]] == [
        f"What is {chosen.rows[0]}+1?", f"It is {chosen.rows[0] + 1}.",
    ]  # fmt: skip
    assert [message.role for message in chosen.turns] == ["user", "assistant"] * 3


def test_parquet_of_messages_gives_the_same_as_jsonl_of_text(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "shots.jsonl", examples())
    system = {"role": "system", "content": "Be brief."}
    rows = [
        row | {"prompt": [system, {"role": "user", "content": row["prompt"]}]} for row in examples()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shots.parquet")
    ours, theirs = choose(lines, suffix=" Think."), choose(tmp_path / "shots.parquet", suffix=" ?")
    assert ours.rows == theirs.rows
    assert ours.turns[0].content.removesuffix(" Think.") == theirs.turns[0].content[:-2]
    assert [at.content for at in ours.turns[1::2]] == [at.content for at in theirs.turns[1::2]]


def test_examples_stand_between_the_system_turn_and_the_question(tmp_path: Path) -> None:
    chosen = choose(write_jsonl(tmp_path / "shots.jsonl", examples()), count=1)
    system, question = Message(role="system", content="S"), Message(role="user", content="Q")
    assert chosen.before([system, question]) == [system, *chosen.turns, question]
    assert chosen.before([question]) == [*chosen.turns, question]


def test_no_held_out_problem_is_an_example(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"A farmer has {n} cows and buys one. How many?", "response": str(n + 1)}
        for n in range(5)
    ]
    file = write_jsonl(tmp_path / "shots.jsonl", rows)
    # Other spaces and letters, and an instruction around it.
    held_out = (
        "a farmer has 0 cows  and buys one.\nhow many?",
        "Solve it. A farmer has 3 cows and buys one. How many? Answer in a box.",
        "How many?",
    )
    for seed in range(8):
        chosen = choose(file, *held_out, seed=seed)
        assert sorted(chosen.rows) == [1, 2, 4]
        assert 0 <= chosen.num_held_out <= 2
    assert (
        choose(file, *held_out).record()["left_out_as_held_out"]
        == choose(file, *held_out).num_held_out
    )
    expected = "evaluation.shots is 4, but of 5 examples 2 are held-out problems .* leaves 3"
    with pytest.raises(DataError, match=expected):
        choose(file, *held_out, count=4)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "Q"}, "1 of 2 rows cannot be used: row 1: no response"),
        ({"prompt": "Q", "response": " "}, "row 1: no response"),
        ({"response": "A"}, "row 1: no prompt"),
        ({"prompt": [1, 2], "response": "A"}, "row 1: the prompt is neither text nor messages"),
        (
            {
                "prompt": [{"role": role, "content": "x"} for role in ("user", "tool", "user")],
                "response": "A",
            },
            "row 1: a conversation of 3 turns, expected one question",
        ),
        (["no object"], "line 2 is no JSON object"),
        ({"prompt": "\ud800", "response": "1"}, "line 2 is no JSON .*surrogates"),
    ],
)
def test_what_is_no_example_is_named(row: Any, match: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "shots.jsonl", [*examples(1), row])
    with pytest.raises(DataError, match=f"evaluation.shots_file: .*{match}"):
        choose(file, count=1)


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    for content, match in ((b"[" * 100_000, "nested too deep"), (b"\xff\n", "can't decode")):
        (tmp_path / "shots.jsonl").write_bytes(content)
        with pytest.raises(
            DataError, match=f"evaluation.shots_file: .*line 1 is no JSON .*{match}"
        ):
            choose(tmp_path / "shots.jsonl")


def test_only_a_new_line_ends_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": "one\u2028two\x85three", "response": "a\u2029b"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "shots.jsonl").write_text(f"{lines}\r\n\n", encoding="utf-8")
    assert choose(tmp_path / "shots.jsonl", count=1).turns[0].content == rows[0]["prompt"]


def test_token_ids_are_no_text(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "response": [1, 2]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shots.parquet")
    with pytest.raises(DataError, match="column 'response' has type list"):
        choose(tmp_path / "shots.parquet", count=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shots": 3, "files": ("a",)}, "evaluation.shots: found 3, but evaluation.shots_file is"),
        ({"shots_file": "x.jsonl", "files": ("a",)}, "shots_file: .* but evaluation.shots is 0"),
        ({"shots": 3, "shots_file": "x.jsonl"}, "found 3, but evaluation.files is empty"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], match: str) -> None:
    config = RunConfig(evaluation=EvaluationConfig(**options))
    (problem,) = evaluation_problems(config, "evaluate")
    assert re.search(match, problem), problem
    if "shots_file" in options:
        absent = list(absent_evaluation_files(config, "evaluate"))
        assert "evaluation.shots_file: 'x.jsonl' is not a file; expected parquet or jsonl" in absent


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tools/prepare_data.py gsm8k` leaves of a small local copy, and a model's tokenizer."""
    root = tmp_path_factory.mktemp("gsm8k")
    for split, numbers in (("train", range(8)), ("test", range(8, 11))):
        rows = [
            {"question": f"{n} + {n} = ?", "answer": f"Twice {n}.\n#### {2 * n * 1000:,}"}
            for n in numbers
        ]
        write_jsonl(root / f"{split}.jsonl", rows)
    command = [sys.executable, str(TOOLS / "prepare_data.py"), "gsm8k", "--validation-rows=2"]
    command += ["--from", str(root), "--out", str(root / "data")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    write_model_folder(root / "model", TinyModel())
    (root / "chat.jinja").write_text(CHAT, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> ChatTokenizer:
    return load_tokenizer(prepared / "model", str(prepared / "chat.jinja"))


def gsm8k_config(prepared: Path, **evaluation: Any) -> RunConfig:
    train = prepared / "data" / "gsm8k_train.parquet"
    options = {"files": ("gsm8k",), "shots": 2, "shots_file": str(train), **evaluation}
    return RunConfig(
        model=ModelConfig(path=str(prepared / "model"), init="random"),
        data=DataConfig(folder=str(prepared / "data"), chat_template=str(prepared / "chat.jinja")),
        evaluation=EvaluationConfig(**options),
    )


def test_gsm8k_is_found_by_name_and_asked_with_examples(
    prepared: Path, tokenizer: ChatTokenizer
) -> None:
    config = gsm8k_config(prepared)
    assert benchmark_files(config) == (str(prepared / "data" / "gsm8k_test.parquet"),)
    held_out = load_held_out(config, tokenizer)
    assert held_out.shots is not None
    assert held_out.num_problems == 3
    texts = [prompt.text for prompt in held_out.by_source["openai/gsm8k"]]
    before = "".join(f"<{at.role}>{at.content}\n" for at in held_out.shots.turns)
    for n, text in zip(range(8, 11), texts, strict=True):
        assert text == f"{before}<user>{n} + {n} = ?\n<assistant>"
    assert before.count("#### ") == 2


@pytest.mark.parametrize(
    ("scorer", "right", "without"),
    [(boxed_numeric, r"so \boxed{18{,}000}", "#### 18000"), (gsm8k, "#### 18,000", r"\boxed{18}")],
)
def test_both_scorers_grade_its_answers(
    prepared: Path, tokenizer: ChatTokenizer, scorer: Any, right: str, without: str
) -> None:
    problem = load_held_out(gsm8k_config(prepared), tokenizer).by_source["openai/gsm8k"][1]
    options = ScorerOptions(max_tokens=9, overlong_buffer_tokens=0)
    assert scorer(Sample(right.replace("{,}", ","), problem.ground_truth), options).score == 1
    assert scorer(Sample(right.replace("18", "19"), problem.ground_truth), options).score == 0
    assert scorer(Sample(without, problem.ground_truth), options).status == "no_answer"


def test_what_examples_make_too_long_is_dropped_and_counted(
    prepared: Path, tokenizer: ChatTokenizer
) -> None:
    config = gsm8k_config(prepared)
    held_out = load_held_out(config, tokenizer)
    lengths = sorted(len(prompt.token_ids) for prompt in held_out.by_source["openai/gsm8k"])
    assert lengths[0] < lengths[-1]
    shorter = replace(config.rollout, max_prompt_tokens=lengths[0])
    found = load_held_out(replace(config, rollout=shorter), tokenizer)
    assert found.dropped_overlong == {"openai/gsm8k": sum(n > lengths[0] for n in lengths)}
    with pytest.raises(DataError, match=r"with 2 examples \(evaluation.shots\)"):
        load_held_out(
            replace(config, rollout=replace(config.rollout, max_prompt_tokens=20)), tokenizer
        )


def test_scores_with_other_examples_are_not_gone_on_with(prepared: Path, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    write_jsonl(shots, examples())
    config = replace(gsm8k_config(prepared, shots_file=str(shots)), output_dir=str(tmp_path))
    before = {"phase": "evaluate", "options": as_options(config)}
    before |= {"identity": scores_identity(config)}
    (tmp_path / "manifest.json").write_text(json.dumps(before), encoding="utf-8")
    assert check_earlier_scores(config)
    more = replace(config, evaluation=replace(config.evaluation, shots=3))
    with pytest.raises(ConfigError, match=r"evaluation.shots: 2 -> 3"):
        check_earlier_scores(more)
    write_jsonl(shots, examples(8))
    with pytest.raises(ConfigError, match=r"evaluation.shots_file, .* has changed"):
        check_earlier_scores(config)
