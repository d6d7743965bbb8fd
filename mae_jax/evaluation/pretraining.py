"""What objectives/pretrain.py still asks for; `EvaluationSuite` takes its place."""

import numpy as np

from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.suite import EvaluationSuite
from mae_jax.models.mae import make_bind

PRETRAIN = ("loss", "reconstructions", "knn", "rankme", "linear_probe")


class MAEEvaluation:
    def __init__(self, config, model, mesh, train_source, eval_source):
        self._suite = EvaluationSuite(
            config, EvaluationData(config, make_bind(model), mesh, train_source, eval_source), PRETRAIN
        )
        self.labelled, self.protocol = self._suite.data.labelled, self._suite.protocol
        self.eval_source = self._suite.data.evaluation

    def loss(self, params: dict) -> float:
        return dict(self._suite.evaluators[0].run(Trained(0, params, "")))["loss"]

    def features(self, params: dict) -> dict[str, float]:
        return self._suite.run(Trained(0, params, ""), features_only=True)[0]

    def picture(self, params: dict, caption: str) -> np.ndarray:
        return dict(self._suite.evaluators[1].run(Trained(0, params, caption)))["reconstructions"]
