"""Weights as intervals of Hugging Face tensors: layouts, plans, transport, safetensors."""
