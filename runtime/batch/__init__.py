"""Many requests from a file, each to one picture, whatever is killed on the way: `python -m runtime.batch`."""
