"""Log-probabilities and entropy over a sharded vocabulary; how token losses are weighted."""
