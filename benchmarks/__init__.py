"""Measures what TTT costs (`cost`) and where it helps (`evidence`). Run from the root: `python -m benchmarks.…`."""
