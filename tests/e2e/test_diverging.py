"""A run that diverges ends by itself, and says what to look at."""

import json
from pathlib import Path

from program import forked, no_process_left

from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, write_arithmetic

TASK = ArithmeticTask(num_sft=24, num_train=8, num_eval=8, num_addends=2, max_addend=30)
MODEL = TinyModel(hidden=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn=96)


def test_a_run_whose_loss_stays_infinite_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    """A learning rate of 1e30: the first update takes all weights there, the next ones overflow."""
    files = write_arithmetic(tmp_path / "data", TASK, MODEL)
    with no_process_left():
        ended = forked(
            [
                "sft", f"output_dir={tmp_path / 'run'}", f"model.path={files.model}",
                "model.init=random", "model.dtype=fp32", "parallel.tp=2",
                f"data.train={tmp_path / 'data' / 'sft.parquet'}",
                "rollout.max_prompt_tokens=32", "rollout.max_response_tokens=16",
                "train.prompts_per_step=8", "train.prompts_per_update=8",
                "train.micro_batch_size=8", "train.lr=1e30", "train.lr_warmup_steps=0",
                "train.steps=9", "train.max_skipped_updates=2",
            ],
            tmp_path,
        )  # fmt: skip
    assert ended.code == 7, ended
    assert "Traceback" not in ended.err
    assert (
        "osft: NonFiniteError\n"
        "  - step 3: 2 updates in a row were skipped because loss or gradient was not finite"
    ) in ended.err
    assert "train.lr (found 1e+30)" in ended.err
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [record["optim/num_skipped"] for record in logged] == [0, 1]
    assert len(list((tmp_path / "run/skipped").iterdir())) == 2
