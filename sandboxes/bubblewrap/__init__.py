"""Sandboxes of Linux namespaces, made by bubblewrap; the embedded default.

`backend.py` is the door. `keeper.py` is a small process of its own that starts sandboxes and outlives nobody;
`agent.py` is process 1 inside each of them. Neither imports anything but the standard library.
"""
