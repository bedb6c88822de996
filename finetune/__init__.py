"""Training of Moshi with In-Place TTT: what moshi-finetune does, plus one `ttt:` section and exact resume."""

PROJECT = "moshi-ttt"
"""Whose package this is: moshi-finetune's has the same name."""
