"""Episodes: one (`episode.py`), and many at once (`scheduler.py`)."""
