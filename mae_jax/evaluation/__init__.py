"""Evaluators, which measure a trained model on pictures it has not seen."""
