"""The files of a run: whole-file writes, lock, checkpoints, metrics and their writers."""
