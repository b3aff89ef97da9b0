"""Check a checkpoint, or a Hugging Face folder: files, rows, values; prints ok and FAILED lines."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from osft_mcore.checkpoint.command import run_tool
from osft_mcore.checkpoint.verify import Check, answer, verify
from osft_mcore.errors import WeightError
from osft_mcore.log.console import Console


def main() -> int:
    """Parse the command line, ask everything, print the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what to check; the format is found out")
    parser.add_argument("--hf", type=Path, help="compare every tensor with this folder's")
    parser.add_argument(
        "--hf-config",
        type=Path,
        help="folder with config.json (model/ in the checkpoint, or --hf)",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="run the model with Megatron-Core and with transformers on random tokens (the weights "
        "of --hf, or else the checkpoint's own, converted); needs the model in memory twice",
    )
    return run_tool(parser.prog, partial(_verify, parser.parse_args()))


def _verify(args: argparse.Namespace, console: Console) -> int:
    failed = False
    for check in _checks(args):
        for line in check.lines:
            console.say(line)
        failed = failed or bool(check.problems)
    return WeightError.exit_code if failed else 0


def _checks(args: argparse.Namespace) -> Iterator[Check]:
    yield from verify(args.folder, hf_config=args.hf_config, hf=args.hf)
    if args.logits:
        # On the CPU, whatever the machine has.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        warnings.filterwarnings("ignore", module=r"megatron|torch|transformers")
        # Files are checked where Megatron-Core and transformers are not installed, too.
        from transformers.utils import logging

        from osft_mcore.checkpoint.logits import compare_logits

        logging.disable_progress_bar()
        yield answer(
            "logits", partial(compare_logits, args.folder, hf_config=args.hf_config, hf=args.hf)
        )


if __name__ == "__main__":
    sys.exit(main())
