"""A run: its directory, its shards, and who scores them."""
