"""Settings: the command line, checks, and what their values name."""
