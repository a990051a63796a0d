"""Benchmarks: each checks that what it times is right, then measures, and prints JSON on its last line."""
