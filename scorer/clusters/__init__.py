"""Sentence embeddings of a run's records, and k-means over them."""
