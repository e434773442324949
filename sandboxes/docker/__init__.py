"""Sandboxes that are containers, made through docker's SDK. `backend.py` is the door."""
