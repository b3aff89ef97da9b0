"""What micro-batches by token budget gain over fixed ones, in whole optimizer updates."""
