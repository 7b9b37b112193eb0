"""What a GPU says of this program, in stages under a budget of seconds: `python -m benchmarks.gpu`."""
