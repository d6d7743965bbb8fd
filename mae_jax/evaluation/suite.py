"""Runs the evaluators named in `evaluate.evaluators`, one after the other."""

import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

# These modules register their evaluators.
from mae_jax.evaluation import classification, drawing, linear_probe, masked_loss, neighbours, rankme  # noqa: F401
from mae_jax.evaluation.evaluator import EVALUATORS, EvaluationData, State


class EvaluationSuite:
    """Evaluators, by name or "module:class", on the same data. UserError for unknown names or unsuitable settings."""

    def __init__(self, config: ConfigDict, data: EvaluationData, names: Sequence[str]):
        self.data = data
        self.evaluators = [EVALUATORS.find(name)(config, data) for name in names]

    def run(self, state: State, *, features_only: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Numbers and pictures by name. A "loss" that is not finite ends the evaluation and is returned alone."""
        numbers, pictures = {}, {}
        try:
            for evaluator in self._of_features() if features_only else self.evaluators:
                for name, value in evaluator.run(state):
                    if np.ndim(value):
                        pictures[name] = value
                        continue
                    numbers[name] = float(value)
                    if name == "loss" and not math.isfinite(value):
                        return {name: numbers[name]}, {}
        finally:
            self.data.forget()
        return numbers, pictures

    def _of_features(self) -> list:
        return [evaluator for evaluator in self.evaluators if getattr(evaluator, "measures_features", False)]

    @property
    def measures_features(self) -> bool:
        """Whether some evaluator measures features and the data have labels for it."""
        return self.data.labelled and bool(self._of_features())

    @property
    def protocol(self) -> str:
        """How features are measured, in words."""
        return "; ".join([self.data.description, *(evaluator.protocol for evaluator in self._of_features())])
