"""From a data set to batches: sources, encoding, the cache, readers."""
