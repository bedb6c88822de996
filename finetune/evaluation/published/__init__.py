"""Published benchmarks of spoken language models: which of two recordings is likelier, and likelihood by length.

The data sets are not part of this project: docs/evaluation_paper.md says where they come from and how they must lie.
"""
