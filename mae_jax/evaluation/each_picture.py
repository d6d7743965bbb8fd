"""What a model says of each picture, by its name, while the pictures are read."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mae_jax.data.device_batches import evaluation_batch_size, on_devices
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import Source
from mae_jax.evaluation.evaluator import EvaluationData, State, one_ahead
from mae_jax.runtime.mesh import process_share, whole
from mae_jax.runtime.processes import from_all


def features_of_each(data: EvaluationData, state: State, source: Source) -> "EachPicture":
    """Outputs are features [n, D] (or tokens [n, L, D]) as `EvaluationData.features`, and labels."""
    variables = state.variables()
    return EachPicture(lambda batch: (data.encode_rows(variables, batch), batch["label"]), data, source)


class EachPicture:
    """Iterates once over the pictures of a source, in order: a batch's (indices [n], outputs) at a time.

    `function`: device batch (see `EvaluationData.batches`) -> a sequence of arrays [B, ...]. Outputs are the rows of
    the n usable pictures, in NumPy. At the end, `bad` has the reason for each index that is missing, of all processes.
    """

    def __init__(self, function: Callable[[dict], Sequence[jax.Array]], data: EvaluationData, source: Source):
        self._function, self._data, self._source = function, data, source
        self.bad: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        data, settings = self._data, self._data.config
        size = evaluation_batch_size(settings.evaluate.batch_size, len(self._source), data.mesh)
        images = data.model.image_size, data.model.channels
        read = make_eval_batches(self._source, settings.data, size, *images, process_share(data.mesh), replaces=False)
        batches = on_devices(read, data.mesh, settings.data.prefetch_batches)
        computed = (whole((batch["index"], batch["weight"], self._function(batch))) for batch in batches)
        for index, weight, outputs in one_ahead(computed):
            usable = np.asarray(weight) > 0
            yield np.asarray(index)[usable], [np.asarray(rows)[usable] for rows in outputs]
        for reasons in from_all({str(index): why for index, why in read.reasons.items()}):
            self.bad |= {int(index): why for index, why in reasons.items()}
