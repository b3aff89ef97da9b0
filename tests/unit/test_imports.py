"""What a rank imports."""

import subprocess
import sys

RANK = """
import sys
from osft_mcore.parallel.imports import import_megatron
from osft_mcore.train import preflight
assert "megatron.core" not in sys.modules, "before a mistake in the options is told"
import_megatron()
from osft_mcore.train import osft
from osft_mcore.actor import actor
assert "wandb" not in sys.modules
import wandb
assert wandb.init
"""


def test_ranks_do_not_import_what_megatron_would_for_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RANK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
