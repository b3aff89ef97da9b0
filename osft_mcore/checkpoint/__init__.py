"""Checkpoints on disk: training state, and weights in the formats of others."""
