"""Convert a checkpoint in a Megatron layout to a Hugging Face folder; no GPU, tensor by tensor."""

import argparse
import sys
from functools import partial
from pathlib import Path

from osft_mcore.checkpoint.command import run_tool
from osft_mcore.checkpoint.convert import mcore_to_hf, shard_bytes
from osft_mcore.checkpoint.dtypes import DTYPES
from osft_mcore.config.schema import CheckpointConfig
from osft_mcore.log.console import Console


def main() -> int:
    """Parse the command line, convert, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mcore",
        type=Path,
        required=True,
        help="checkpoint to read: step_N of a run, what convert_hf_to_mcore.py wrote, or one that "
        "Megatron-Core wrote in the format torch_dist",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--hf-config",
        type=Path,
        help="Hugging Face folder with config.json, tokenizer and so on (model/ in the checkpoint)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="store all tensors so (as read)")
    parser.add_argument(
        "--max-shard-gib",
        type=float,
        default=CheckpointConfig().max_shard_gib,
        help="largest safetensors file (%(default)s)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="compare sizes with the manifest, not hashes"
    )
    return run_tool(parser.prog, partial(_convert, parser.parse_args()))


def _convert(args: argparse.Namespace, console: Console) -> int:
    mcore_to_hf(
        args.mcore,
        args.out,
        hf_config=args.hf_config,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        max_shard_bytes=shard_bytes(args.max_shard_gib),
        hashes=not args.no_verify,
        console=console,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
