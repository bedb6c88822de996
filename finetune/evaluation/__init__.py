"""Evaluation of a finished checkpoint: what `eval_from_checkpoint.py` calls."""
