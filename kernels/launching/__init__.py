"""What the host sides of the kernels share: dispatch, tiles, tuning."""
