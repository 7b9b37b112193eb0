"""The training loop: the loss, the step, checkpoints, validation."""
