"""The model's thread: rows, how they draw, who has one, the step that all are in, and their sound."""
