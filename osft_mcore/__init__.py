"""osft-mcore: online supervised fine-tuning with Megatron-Core actors and vLLM rollouts."""

__version__ = "0.1.0"
