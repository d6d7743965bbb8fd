"""The training loop, its step, state and optimizers, and the plan of a run."""
