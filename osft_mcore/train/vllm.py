"""The rollout engine of a real run."""

import torch

from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.rollout.vllm_engine import VllmEngine


def build_engine(
    config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer
) -> VllmEngine:
    """The rollout engine of this world, without weights."""
    return VllmEngine(
        config.model.path,
        rollout=config.rollout,
        dtype=torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
        seed=config.seed,
        stop_token_ids=sorted(tokenizer.eos_token_ids),
        context=context,
        live_weights=config.sync.mode != "reload",
        trust_remote_code=config.model.trust_remote_code,
    )
