"""What a checkpoint costs the training loop: in the background, and while the loop waits."""
