"""Which commands make up the ablation; pure.

One starting model, the same for all. Every method then takes the same number of updates of the same
size from it, at the same learning rate, once per seed; only what the answers are and what is
minimised differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

EXPERIMENT: Final = "arithmetic_ablation"

ONLINE: Final = {
    "OSFT": (),
    "OSFT, annealed 0.6 to 1": ("rollout.annealing.mode=linear", "rollout.annealing.end_tau=1"),
    "EM-FT": (
        "rollout.tau_sample=1",
        "algorithm.objective=entropy",
        "algorithm.follow_tau_sample=true",
    ),
    "coupled": ("rollout.tau_sample=1",),
}
"""What each online method changes of the experiment, which is OSFT."""
OFFLINE: Final = "offline"
METHODS: Final = (*ONLINE, OFFLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command; it is done when `result` is there."""

    name: str
    command: tuple[str, ...]
    result: Path


def plan(out: Path, *, seeds: Sequence[int], steps: int) -> list[Job]:
    """All jobs, in an order in which each finds what it needs."""
    base = _score(out, "base", out / "sft" / "hf", base_scores(out), seed=1, baselines=True)
    jobs = [*_starting_model(out), base]
    for seed in seeds:
        for method, changes in ONLINE.items():
            jobs.append(_online(out, method, changes, seed=seed, steps=steps))
        jobs += _offline(out, seed=seed, steps=steps)
    return jobs


def summary_of(out: Path, method: str, seed: int) -> Path:
    """Where the score of a method's run is."""
    folder = out / _folder(method, seed)
    return (folder / "score" if method == OFFLINE else folder) / "summary.json"


def base_scores(out: Path) -> Path:
    """Where the scores of the starting model are."""
    return out / "base" / "summary.json"


def _folder(method: str, seed: int) -> str:
    name = "".join(c if c.isalnum() else "_" for c in method.lower().replace(", ", "_"))
    return f"{name}_{seed}"


def _starting_model(out: Path) -> list[Job]:
    data, sft = out / "data", out / "sft"
    return [
        Job(
            name="data",
            command=(
                "python",
                "tools/make_arithmetic.py",
                "--out",
                f"{data}",
                "--seed",
                "7",
                "--overwrite",
            ),
            result=data / "train.parquet",
        ),
        Job(
            name="starting model",
            command=(
                "osft",
                "sft",
                "experiment=arithmetic_sft",
                "parallel.tp=1",
                "parallel.dp=2",
                "train.micro_batch_size=32",
                f"output_dir={sft}",
                f"model.path={data}/model",
                f"data.train={data}/sft.parquet",
            ),
            result=sft / "summary.json",
        ),
    ]


def _inputs(out: Path) -> tuple[str, ...]:
    return (f"data.train={out}/data/train.parquet", f"evaluation.files=[{out}/data/eval.parquet]")


def _online(out: Path, method: str, changes: Sequence[str], *, seed: int, steps: int) -> Job:
    folder = out / _folder(method, seed)
    # The experiment anneals over epochs; here it is over the whole run.
    length = (f"rollout.annealing.steps={steps}",) if "annealed" in method else ()
    return Job(
        name=f"{method}, seed {seed}",
        command=(
            "osft",
            "train",
            f"experiment={EXPERIMENT}",
            f"output_dir={folder}",
            f"model.path={out}/sft/hf",
            *_inputs(out),
            f"seed={seed}",
            f"train.steps={steps}",
            *changes,
            *length,
        ),
        result=folder / "summary.json",
    )


def _offline(out: Path, *, seed: int, steps: int) -> list[Job]:
    """The answers that OSFT's first pass would sample, if the model never changed."""
    folder = out / _folder(OFFLINE, seed)
    common = (f"experiment={EXPERIMENT}", f"seed={seed}", f"train.steps={steps}")
    return [
        Job(
            name=f"{OFFLINE}, seed {seed}: answers",
            command=(
                "osft",
                "generate",
                *common,
                f"output_dir={folder}/answers",
                f"model.path={out}/sft/hf",
                *_inputs(out),
            ),
            result=folder / "answers" / "summary.json",
        ),
        Job(
            name=f"{OFFLINE}, seed {seed}: training set",
            command=(
                "python",
                "tools/solutions_to_sft.py",
                "--solutions",
                f"{folder}/answers/solutions.jsonl",
                "--out",
                f"{folder}/sft.parquet",
                # OSFT trains on them, too.
                "--truncated",
                "keep",
            ),
            result=folder / "sft.parquet",
        ),
        Job(
            name=f"{OFFLINE}, seed {seed}: training",
            command=(
                "osft",
                "sft",
                *common,
                f"output_dir={folder}/run",
                f"model.path={out}/sft/hf",
                f"data.train={folder}/sft.parquet",
                "data.prompt_key=prompt_token_ids",
                "data.response_key=response_token_ids",
                "evaluation.files=[]",
            ),
            result=folder / "run" / "summary.json",
        ),
        _score(
            out,
            f"{OFFLINE}, seed {seed}: score",
            folder / "run" / "hf",
            summary_of(out, OFFLINE, seed),
            seed=seed,
        ),
    ]


def _score(
    out: Path, name: str, model: Path, result: Path, *, seed: int, baselines: bool = False
) -> Job:
    others = ("evaluation.baseline_temperatures=[0,0.3,0.6]",) if baselines else ()
    return Job(
        name=name,
        command=(
            "osft",
            "evaluate",
            f"experiment={EXPERIMENT}",
            f"output_dir={result.parent}",
            f"model.path={model}",
            *_inputs(out),
            f"seed={seed}",
            *others,
        ),
        result=result,
    )
