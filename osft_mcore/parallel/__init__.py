"""Ranks and process groups; what Megatron-Core needs to run without CUDA."""
