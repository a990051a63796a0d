"""Benchmarks: each checks correctness first, then measures, and prints JSON on its last line."""
