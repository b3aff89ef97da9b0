"""Does the model of a checkpoint compute what transformers computes from the same weights?"""

import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.checkpoint.formats import format_of, open_source
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import CheckpointConfig, ModelConfig
from osft_mcore.errors import AgreementError
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

    transformers reads `hf`, or else the checkpoint converted into a temporary folder. Raises
    AgreementError if a logit differs by more than TOLERANCE.
    """
    source, shape, model = open_source(folder, hf_config=hf_config)
    generator = torch.Generator().manual_seed(1)
    size = (NUM_SEQUENCES, min(NUM_TOKENS, shape.max_position))
    tokens_BS = torch.randint(0, shape.vocab, size, generator=generator)
    ours_BSV = megatron_logits(source, shape, tokens_BS)
    with tempfile.TemporaryDirectory() as temporary:
        reference = folder if format_of(folder) == "hf" else hf
        if reference is None:
            reference = Path(temporary) / "hf"
            mcore_to_hf(
                folder,
                reference,
                hf_config=model,
                dtype=None,
                max_shard_bytes=CheckpointConfig().max_shard_bytes,
                hashes=False,
                console=Console(enabled=False),
            )
        theirs_BSV = transformers_logits(reference, tokens_BS)
    largest = float((ours_BSV - theirs_BSV).abs().max())
    found = f"largest difference {largest:.3g} over {ours_BSV.numel()} logits"
    # Not `>`: NaN is no agreement.
    if not largest <= TOLERANCE:
        raise AgreementError(f"{found}, at most {TOLERANCE:g} is rounding")
    return found


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
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    logits_BSV: Tensor = model(tokens_BS).logits
    return logits_BSV
