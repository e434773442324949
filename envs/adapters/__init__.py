"""Environments of other packages, as ours."""
