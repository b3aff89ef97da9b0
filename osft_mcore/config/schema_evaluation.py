"""The options on scoring, and their defaults; a part of schema.py, which has the others."""

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import with_config

SCORERS: Final = ("boxed_math", "boxed_math_fast", "boxed_numeric", "gsm8k", "answer_line")
"""See `EvaluationConfig.scorer`."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Scoring on held-out problems."""

    files: tuple[str, ...] = ()
    """Parquet files in the schema of the training prompts, or names of benchmarks in data.folder
    (`gsm8k` is its test split there). Empty: no evaluation."""
    run: str = ""
    """For `osft evaluate`: score the checkpoints of this run, in the order of their steps, and the
    model that it began with; empty: score model.path."""
    steps: tuple[int, ...] = ()
    """Of evaluation.run, only the weights after these steps; 0 is what it began with."""
    every: int = 0
    """Evaluate after every this many steps; 0: only before and after."""
    before: bool = True
    mode: Literal["inline", "async"] = "inline"
    """For `osft train`. `inline`: the ranks that train score, and training waits. `async`: a
    process of its own scores weights that the run leaves it, and training goes on; same results."""
    devices: str = ""
    """Where the process of `async` computes, on rank 0's host: rollout.tp GPUs, as in
    CUDA_VISIBLE_DEVICES, which no rank uses; on CPU cores, as in 4-7,9, or empty: those of the
    ranks."""
    snapshots: str = ""
    """Folder on rank 0's host for the weights that wait for it, such as /dev/shm; empty:
    snapshots/ in output_dir."""
    max_waiting: int = 2
    """Sets of weights that may be there at once, each as large as the model. An evaluation that is
    due when there are so many is left out, and the run says so."""
    wait_minutes: float = 30.0
    """How long the end of the run waits for scores that are not there yet."""
    num_samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    baseline_temperatures: tuple[float, ...] = ()
    """Other temperatures for the starting model; its best one is the baseline to beat. For
    `osft evaluate` without evaluation.run that is the model which it scores."""
    sweep: str = ""
    """For `osft evaluate`: `first:last:step`, more temperatures for every model, both ends among
    them, as in 0:1.6:0.1."""
    portion: int = 2048
    """Answers that are sampled, graded and kept together, whole problems at a time: while one
    portion is graded the next one is sampled, and `osft evaluate` goes on after the last one."""
    max_problems: int | None = None
    """Use only the first this many problems of each file."""
    probe: int = 16
    """While training: problems of each data source whose first answer the actor looks at, for the
    log-probability and the entropy of its tokens; 0: none."""
    shots: int = 0
    """Worked examples before every problem, as turns of user and assistant: drawn by `seed` from
    shots_file, the same ones for all. One that is itself a problem of evaluation.files is left
    out."""
    shots_file: str = ""
    """Parquet or jsonl file with data.prompt_key (text, or messages with one question) and
    data.response_key (text), as tools/clean_traces.py and tools/prepare_data.py write."""
    scorer: str = "boxed_math"
    """What a response is worth; a score above 0 is correct. `boxed_math`: the last box, by spelling
    and algebra. `boxed_math_fast`: the same without math-verify, so that sets, lists, percentages
    and fractions have to be written like the ground truth. `boxed_numeric`: the last box, numbers
    only. `gsm8k`: the last `#### x`, as it stands. `answer_line`: the last `Answer:` line, 1 or -1.
    Or `path/to/file.py:function`, called in a grading worker with the response, the ground truth
    and the number of response tokens; it returns a number."""
    grader_timeout_s: float = 5.0
    """Wall-clock limit for grading one answer."""
    grader_memory_gib: float = 1.0
    """Address space of a grading worker; a scorer that imports much needs more."""
    grader_workers: int = 1
    max_ungraded_share: float = 0.05
    """The run fails if grading took too long or failed for a larger share of an evaluation's
    answers. Up to it they are counted, and are not correct."""
    overlong_buffer_tokens: int = 0
    """For answer_line: a response that gets nearer than this to rollout.max_response_tokens loses
    score, up to 1 in a straight line; 0: none does."""
