"""Measures time and memory of TTT beside stock moshi. Each module is a command: `python -m benchmarks.cost.step`."""
