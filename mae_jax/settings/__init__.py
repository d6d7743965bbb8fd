"""Settings: the command line, checks of values, and registries of implementations."""
