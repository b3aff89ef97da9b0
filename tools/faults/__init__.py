"""What a run does when one of its ranks is killed or frozen, phase by phase."""
