"""The kernels' compiled code, without a GPU."""
