"""Objectives: a model to train, its data, its loss, and its evaluation."""
