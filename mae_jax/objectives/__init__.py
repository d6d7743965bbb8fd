"""Objectives: what is trained, on which data, with which loss, and how it is measured."""
