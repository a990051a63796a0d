"""Paths on a disk or in a store, files that are whole or absent, and locks."""
