"""Measurements, each a `python -m benchmarks.<name>` that writes its rows to `benchmarks/results/<device>/`."""
