"""The evaluators that `evaluate.evaluators` names, run one after the other."""

import math
from collections.abc import Sequence

import ml_collections
import numpy as np

# These modules register their evaluators.
from mae_jax.evaluation import classification, drawing, linear_probe, masked_loss, neighbours, rankme  # noqa: F401
from mae_jax.evaluation.evaluator import EVALUATORS, EvaluationData, State


class EvaluationSuite:
    """Evaluators with their data.

    Args:
      names: registered names, or "module:class".

    Raises:
      UserError: for a name that is neither, and for settings that an evaluator cannot use.
    """

    def __init__(self, config: ml_collections.ConfigDict, data: EvaluationData, names: Sequence[str]):
        self.data = data
        self.evaluators = [EVALUATORS.find(name)(config, data) for name in names]

    def run(self, state: State, *, features_only: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The numbers and the pictures of all evaluators, by name; the "loss" alone if it is not finite.

        Args:
          features_only: run only those that measure the encoder's features.
        """
        numbers, pictures = {}, {}
        try:
            for evaluator in self.evaluators:
                if features_only and not getattr(evaluator, "measures_features", False):
                    continue
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

    @property
    def measures_features(self) -> bool:
        """Whether some evaluator measures features, and the data have labels to do so."""
        return self.data.labelled and any(getattr(e, "measures_features", False) for e in self.evaluators)

    @property
    def protocol(self) -> str:
        """How features are measured, for people."""
        parts = [self.data.description, *(getattr(evaluator, "protocol", "") for evaluator in self.evaluators)]
        return "; ".join(filter(None, parts))
