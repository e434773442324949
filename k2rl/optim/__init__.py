"""Muon for matrices, AdamW for the rest, as one optimizer."""
