"""The loss of an autoencoder on images it has not seen."""

from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.evaluation.evaluator import EVALUATORS, EvaluationData, Evaluator, State
from mae_jax.evaluation.extraction import one_ahead
from mae_jax.runtime.sharding import on_rows


@EVALUATORS.register("loss")
class MaskedLoss(Evaluator):
    """The mean loss over all evaluation images, of the patches in `model.loss_patches`."""

    def __init__(self, config: ConfigDict, data: EvaluationData):
        super().__init__(config, data)
        self._hidden = data.hidden_patches
        self._losses_of = on_rows(self._losses, data.mesh)

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        variables = state.variables()
        found = one_ahead(self._losses_of(variables, batch) for batch in self.data.batches(self.data.evaluation))
        losses, weights = np.concatenate([np.stack(jax.device_get(rows)) for rows in found], axis=1).astype(np.float64)
        yield "loss", float(np.sum(losses * weights) / np.sum(weights))

    def _losses(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        images, index = self.data.normalize(batch["image"]), batch["index"]
        output = self._hidden.apply(self.data.bind(variables), images, index, index)
        return output.example_loss, batch["weight"]
