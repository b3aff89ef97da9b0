"""This rank's Megatron-Core GPTModel stage."""
