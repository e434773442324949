"""Held-out reward with intervals."""
