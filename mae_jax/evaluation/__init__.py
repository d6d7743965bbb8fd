"""Evaluators: what a trained model is worth, measured on pictures that it has not seen."""
