"""The trained model: batching, optimizer, the update step."""
