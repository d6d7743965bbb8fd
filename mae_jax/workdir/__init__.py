"""The files of a run: atomic writes, lock, checkpoints, metrics and their writers."""
