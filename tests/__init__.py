"""One file of tests for each source module; tolerances are in `tests.support.tolerances`."""
