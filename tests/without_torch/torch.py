"""Stands for a PyTorch that is not installed, in programs that tests start: users of the project need none."""

raise ImportError("PyTorch is not installed")
