"""A small OSFT run that has something to learn: data, start weights, options."""

import json
import shutil
from pathlib import Path
from typing import Any

from osft_mcore.config.schema import (
    AnnealingConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReportConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, write_arithmetic
from osft_mcore.parallel.topology import Topology

Start = tuple[Path, Path]
"""The data folder and the model to start from."""
START = Path(__file__).parent / "golden" / "osft_start.safetensors"
"""Weights to start from: a short SFT taught them the form of an answer and some sums. Kept, because
training them anew on another processor would end in other weights (SFT amplifies rounding)."""
# All stated here: the demo's defaults may change without changing this run.
TASK = ArithmeticTask(
    num_sft=40, num_train=16, num_eval=16, num_addends=2, max_addend=12, wrong_share=0.1, seed=1
)
MODEL = TinyModel(
    hidden=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, ffn=64, tied=True,
    max_position=64, init_std=0.06,
)  # fmt: skip
# Adam divides by sqrt(v) + eps. With the usual 1e-8 a gradient of pure rounding noise moves its
# weight by a whole lr, differently in each layout; this eps is above the noise.
EPS = 1e-3


def write_start(root: Path) -> Start:
    files = write_arithmetic(root / "data", TASK, MODEL)
    shutil.copyfile(START, files.model / "model.safetensors")
    return root / "data", files.model


def toy_config(start: Start, out: Path, topology: Topology) -> RunConfig:
    data, model = start
    return RunConfig(
        output_dir=str(out),
        model=ModelConfig(path=str(model), dtype="fp32"),
        parallel=ParallelConfig(**topology.actor_sizes()),
        rollout=RolloutConfig(
            tp=topology.rollout_tp, tau_sample=0.6, num_samples=2,
            annealing=AnnealingConfig(mode="linear", end_tau=1.0, steps=15),
            max_prompt_tokens=16, max_response_tokens=20,
        ),
        train=TrainConfig(
            steps=20, prompts_per_step=8, prompts_per_update=4, micro_batch_size=4,
            lr=5e-4, lr_schedule="cosine", lr_warmup_steps=3, eps=EPS,
        ),
        data=DataConfig(train=str(data / "train.parquet")),
        evaluation=EvaluationConfig(
            files=(str(data / "eval.parquet"),), every=7, num_samples=4, baseline_temperatures=(0,),
            # Needs no worker, which takes seconds to load its algebra. The golden run has them.
            scorer="boxed_numeric",
        ),
        # Seconds for every run; test_report_of_run.py has them on.
        report=ReportConfig(at_end=False, every_minutes=0),
    )  # fmt: skip


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
