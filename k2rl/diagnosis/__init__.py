"""What the processes of a run are doing, for those who ask because one of them does not answer. No torch."""
