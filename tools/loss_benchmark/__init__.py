"""What the loss without logits in memory costs, against losses of whole logits."""
