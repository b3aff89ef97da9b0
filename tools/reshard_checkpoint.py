"""Write a checkpoint at another layout, optimizer state included, so that a run goes on there."""

import argparse
import sys
from functools import partial
from pathlib import Path

from osft_mcore.checkpoint.command import run_tool
from osft_mcore.checkpoint.reshard import reshard
from osft_mcore.config.schema import ModelConfig
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology


def main() -> int:
    """Parse the command line, reshard, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mcore", type=Path, required=True, help="checkpoint to read, such as step_N of a run"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tp", type=int, required=True, help="tensor parallel size")
    parser.add_argument("--pp", type=int, required=True, help="pipeline parallel size")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per stage (1)")
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=ModelConfig().vocab_multiple,
        help="as model.vocab_multiple (%(default)s)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="compare sizes with the manifest, not hashes"
    )
    return run_tool(parser.prog, partial(_reshard, parser.parse_args()))


def _reshard(args: argparse.Namespace, console: Console) -> int:
    reshard(
        args.mcore,
        args.out,
        topology=Topology(tp=args.tp, pp=args.pp, vpp=args.vpp, dp=1),
        vocab_multiple=args.vocab_multiple,
        hashes=not args.no_verify,
        console=console,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
