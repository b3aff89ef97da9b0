"""Convert a Hugging Face folder to a checkpoint in a Megatron layout; no GPU, tensor by tensor."""

import argparse
import sys
from functools import partial
from pathlib import Path

from osft_mcore.checkpoint.command import run_tool
from osft_mcore.checkpoint.convert import hf_to_mcore
from osft_mcore.checkpoint.dtypes import DTYPES
from osft_mcore.config.schema import ModelConfig
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology


def main() -> int:
    """Parse the command line, convert, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (1)")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per stage (1)")
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=ModelConfig().vocab_multiple,
        help="as model.vocab_multiple (%(default)s)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="store all parameters so (as read)")
    parser.add_argument(
        "--format",
        choices=("safetensors", "torch_dist"),
        default="safetensors",
        help="this package's own, or Megatron-Core's (%(default)s)",
    )
    return run_tool(parser.prog, partial(_convert, parser.parse_args()))


def _convert(args: argparse.Namespace, console: Console) -> int:
    hf_to_mcore(
        args.hf,
        args.out,
        topology=Topology(tp=args.tp, pp=args.pp, vpp=args.vpp, dp=1),
        vocab_multiple=args.vocab_multiple,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        target=args.format,
        console=console,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
