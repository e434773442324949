"""Environments as services: what is said (`wire.py`), and the client (`remote.py`), an environment itself."""
