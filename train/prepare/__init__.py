"""Making data sets: tokeniser, packed rows, shards of images, and their verification."""
