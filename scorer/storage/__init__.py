"""Paths on a disk or in object storage, atomic writes, and locks."""
