"""Checkpoints: written, resumed, opened, verified."""
