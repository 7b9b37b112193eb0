"""Compiles models and adapters to engines; writes the engine manifest through `runtime.engines.manifest`."""
