"""`osft doctor`: what a machine has, and whether training would start on it."""
