"""The trainer: packed batches in, updated weights out."""
