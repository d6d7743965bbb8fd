"""Ablations: a grid of settings, a run for each cell and seed, and a table of what they come to."""
