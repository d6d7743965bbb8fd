"""Ablations: a grid of settings, runs for each cell and seed, and a table of their scores."""
