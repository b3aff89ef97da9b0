"""Write a Hugging Face folder with random weights of a wanted size, to measure conversions with."""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from osft_mcore.checkpoint.command import run_tool
from osft_mcore.checkpoint.staging import target_problems
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.errors import ConfigError
from osft_mcore.files import json_bytes, write_file
from osft_mcore.log.console import Console
from osft_mcore.weights.fill import random_tensor
from osft_mcore.weights.hf_writer import save_hf
from osft_mcore.weights.params import hf_tensors


def main() -> int:
    """Parse the command line, write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--gib", type=float, default=2.0, help="size in bf16; the nearest layer")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 128")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary")
    parser.add_argument("--shard-gib", type=float, default=0.5, help="largest safetensors file")
    return run_tool(parser.prog, partial(_make, parser.parse_args()))


def _make(args: argparse.Namespace, console: Console) -> int:
    if problems := target_problems(args.out):
        raise ConfigError(problems)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.gib * 2**30 / torch.bfloat16.itemsize
    sizes = []
    for num_layers in (1, 2):
        shape = _shape(args, num_layers)
        sizes.append(shape.num_parameters)
    per_layer = sizes[1] - sizes[0]
    shape = _shape(args, max(1, 1 + round((wanted - sizes[0]) / per_layer)))
    dtype, limit = torch.bfloat16, int(args.shard_gib * 2**30)
    save_hf(args.out, _tensors(shape), shape=shape, dtype=dtype, max_shard_bytes=limit)
    console.say(
        f"{args.out}: {shape.num_layers} layers, {shape.num_parameters / 1e6:.1f}M parameters, "
        f"{shape.num_parameters * dtype.itemsize / 2**30:.2f} GiB"
    )
    return 0


def _shape(args: argparse.Namespace, num_layers: int) -> ModelShape:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": num_layers,
        "hidden_size": args.hidden,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "intermediate_size": 3 * args.hidden,
        "vocab_size": args.vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_file(args.out / "config.json", [json_bytes(config)])
    return read_model_shape(args.out)


def _tensors(shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    for name, size in hf_tensors(shape).items():
        yield name, random_tensor(name, size, 1, shape.init_std).to(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
