"""Does the model of a checkpoint compute what transformers computes from the same weights?"""

import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.checkpoint.formats import config_folder, format_of, open_source
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.schema import CheckpointConfig, ModelConfig
from osft_mcore.errors import AgreementError, WeightError
from osft_mcore.log.console import Console
from osft_mcore.model.build import build_chunks, output_weight
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import alone
from osft_mcore.weights.fill import fill
from osft_mcore.weights.params import megatron_layouts
from osft_mcore.weights.source import WeightSource

NUM_SEQUENCES = 3
NUM_TOKENS = 32
TOLERANCE = 1e-4
"""In fp32."""


def compare_logits(folder: Path, *, hf_config: Path | None, hf: Path | None) -> str:
    """Say how far apart the two are on a few random sequences, both in fp32 on the CPU.

    transformers reads `hf`; without it `folder`, or what it converts to: then both have the same
    weights, and agree on mistaken ones. Raises AgreementError if a logit differs by more than
    TOLERANCE, WeightError if `hf` has another vocabulary.
    """
    hf_config = config_folder(folder, hf_config=hf_config, hf=hf)
    source, shape, model = open_source(folder, hf_config=hf_config)
    if hf is not None and (vocab := read_model_shape(hf).vocab) != shape.vocab:
        raise WeightError(f"--hf: {hf} has a vocabulary of {vocab}, {folder} one of {shape.vocab}")
    generator = torch.Generator().manual_seed(1)
    size = (NUM_SEQUENCES, min(NUM_TOKENS, shape.max_position))
    tokens_BS = torch.randint(0, shape.vocab, size, generator=generator)
    ours_BSV = megatron_logits(source, shape, tokens_BS)
    if hf is not None:
        against, advice = str(hf), ""
        theirs_BSV = transformers_logits(hf, tokens_BS)
    elif format_of(folder) == "hf":
        against, advice = "this folder's own weights", "; --hf compares with another"
        theirs_BSV = transformers_logits(folder, tokens_BS)
    else:
        against, advice = "this checkpoint's own weights", "; --hf compares with the original"
        theirs_BSV = _converted_logits(folder, model, tokens_BS)
    largest = float((ours_BSV - theirs_BSV).abs().max())
    found = (
        f"largest difference {largest:.3g} over {ours_BSV.numel()} logits against transformers on "
        f"{against}"
    )
    # Not `>`: NaN is no agreement.
    if not largest <= TOLERANCE:
        raise AgreementError(f"{found}, at most {TOLERANCE:g} is rounding")
    return found + advice


@torch.no_grad()
def megatron_logits(source: WeightSource, shape: ModelShape, tokens_BS: Tensor) -> Tensor:
    """What Megatron-Core computes, [B, S, vocab] in fp32."""
    padded = ModelConfig().vocab_multiple
    with alone() as context:
        (chunk,) = build_chunks(
            shape, context, dtype=torch.float32, sequence_parallel=False, vocab_multiple=padded
        )
        params = {name: parameter.data for name, parameter in chunk.named_parameters()}
        layouts = megatron_layouts(
            shape,
            tp=1,
            tp_rank=0,
            pp=1,
            pp_rank=0,
            vocab_padded=output_weight(chunk).shape[0],
            transformer_engine=False,
        )
        fill(params, layouts, source.layouts, source.rows)
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous()
        with megatron_device():
            hidden_BSH = chunk(tokens_BS, positions_BS, None)
        logits_BSV: Tensor = hidden_BSH @ output_weight(chunk).T
        return logits_BSV[..., : shape.vocab]


@torch.no_grad()
def transformers_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    """What transformers computes, [B, S, vocab] in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    logits_BSV: Tensor = model(tokens_BS).logits
    return logits_BSV


def _converted_logits(folder: Path, model: Path, tokens_BS: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "hf"
        mcore_to_hf(
            folder,
            converted,
            hf_config=model,
            dtype=None,
            max_shard_bytes=CheckpointConfig().max_shard_bytes,
            hashes=False,
            console=Console(enabled=False),
        )
        return transformers_logits(converted, tokens_BS)
