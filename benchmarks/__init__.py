"""What TTT costs (`cost`), and what it is good for (`evidence`); run from the root with `python -m benchmarks.…`."""
