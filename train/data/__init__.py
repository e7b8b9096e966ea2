"""From shards to batches: the order of samples, the shards, decoding, and the loader."""
