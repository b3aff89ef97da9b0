"""The benchmark of the weight push: ours against the usual way, on the real actor and engine."""
