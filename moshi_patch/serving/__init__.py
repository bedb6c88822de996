"""Serves a model: what is added to the stock server of one conversation."""
