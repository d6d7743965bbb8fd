"""How well an autoencoder reconstructs each picture: high errors are of pictures unlike those that it has learned."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.augment import valid_values
from mae_jax.data.files import first_few
from mae_jax.data.sources import Source
from mae_jax.evaluation.each_picture import EachPicture
from mae_jax.evaluation.evaluator import EvaluationData, State
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.sharding import on_rows


class PictureErrors(NamedTuple):
    """Of n usable pictures, in order, and why others are not."""

    index: np.ndarray  # int64 [n]
    errors: np.ndarray  # float64 [n, masks]: the loss of each picture with each mask; the first is the evaluation's
    bad: dict[int, str]


def measure_errors(config: ConfigDict, data: EvaluationData, state: State) -> PictureErrors:
    """Reconstructs every evaluation picture with each of `reconstruct.masks` masks, drawn from seed and index.

    If `evaluate.mask` gives each picture's mask, with that one alone.
    """
    hidden, masks = data.hidden_patches, 1 if config.evaluate.mask else config.reconstruct.masks

    def losses(variables: dict, batch: dict) -> tuple[jax.Array, ...]:
        images, index, valid = data.normalize(batch["image"]), batch["index"], valid_values(batch["image"])
        model = data.bind(variables)
        return tuple(hidden.apply(model, images, index, index, valid, draw=m).example_loss for m in range(masks))

    losses_of = functools.partial(on_rows(losses, data.mesh), state.variables())
    pictures, index, errors = EachPicture(losses_of, data, data.evaluation), [], []
    for indices, found in pictures:
        index.append(indices)
        errors.append(np.stack(found, axis=1).astype(np.float64))
    return PictureErrors(np.concatenate(index), np.concatenate(errors), pictures.bad)


def find_outliers(source: Source, names: Sequence[str]) -> np.ndarray:
    """Whether each picture is labelled with one of the class names: 1, 0, or -1 without a label; int [n].

    UserError for names of no class.
    """
    known = list(source.class_names or ()) if source.label_kind != "number" else []
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"reconstruct.outliers={first_few(list(unknown))} is no class of the pictures {source.place}, which have "
            f"{first_few(known) or 'none'}"
        )
    places, labels = [known.index(name) for name in names], source.labels()
    if source.label_kind == "multi":
        found, known = (labels[:, places] > 0).any(axis=1), ~np.isnan(labels).any(axis=1)
    else:
        found, known = np.isin(labels, places), labels >= 0
    return np.where(known, found.astype(int), -1)


def outlier_auroc(errors: np.ndarray, outlier: np.ndarray) -> float | None:
    """The chance that an outlier has a larger error than another picture (area under the ROC curve), or None."""
    from sklearn.metrics import roc_auc_score  # slow to import: a second

    known = (outlier >= 0) & np.isfinite(errors)
    both = len(np.unique(outlier[known])) == 2
    return float(roc_auc_score(outlier[known], errors[known])) if both else None
