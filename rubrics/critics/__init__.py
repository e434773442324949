"""Judging by rubrics, with a model."""
