"""Ranking records, and writing those that are kept."""
