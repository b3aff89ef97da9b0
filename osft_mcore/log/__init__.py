"""What a run prints and leaves behind: console, run folder, metrics, manifest."""
