"""What TTT costs in time and memory, beside stock moshi. Each module is a command: `python -m benchmarks.cost.step`."""
