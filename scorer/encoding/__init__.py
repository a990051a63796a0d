"""Records -> token sequences."""
