"""The evaluator of frozen features by a few pictures of each class: least squares, as in big_vision."""

from collections.abc import Iterator

import numpy as np

from mae_jax.data.sources import some_of_each_class
from mae_jax.evaluation.evaluator import Evaluator, State
from mae_jax.evaluation.scores import with_labels
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped

STD_FLOOR = 1e-5  # added to the deviations of the shots' features
NAMED = 10  # classes at most


class FewShot(Evaluator):
    """Top-1 on the evaluation images of ridge regressions on `evaluate.shots` random pictures of each class.

    Mean and standard deviation over `evaluate.shot_draws` draws. Of `evaluate.shot_penalties`, each draw takes the one
    with the lowest leave-one-out error of its own pictures.
    """

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        shots, penalties = ("/".join(f"{x:g}" for x in few) for few in (settings.shots, settings.shot_penalties))
        return (
            f"{shots} shots: least squares to one-hot labels on features standardised by the shots, L2 penalty of "
            f"{penalties} by their leave-one-out error, mean over {settings.shot_draws} draws"
        )

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        if self.data.labelled and self.data.train.label_kind == "class":
            for row in self.sweep(state):
                if row["penalty"] is None:
                    yield from ((f"{row['shots']}_shot/{name}", row[name]) for name in ("top1", "top1_std"))

    def sweep(self, state: State) -> list[dict[str, float | None]]:
        """{"shots", "penalty", "top1", "top1_std"}: a row for each number of shots and penalty; None: the chosen ones.

        Empty if no picture of a split has a label. Prints which classes have fewer pictures than shots.
        """
        settings, rows = self.config.evaluate, []
        splits = (with_labels(*self.data.features(state, split)) for split in ("train", "evaluation"))
        (train, labels), (test, test_labels) = splits
        penalties = sorted(settings.shot_penalties)
        for shots in settings.shots if len(train) and len(test) else ():
            self._name_small_classes(labels, shots)
            scores = []  # of each draw: the chosen penalty's, and each one's
            for draw in range(settings.shot_draws):
                rng = np.random.default_rng((self.config.data.seed, draw))
                chosen = some_of_each_class(labels, lambda _, shots=shots: shots, rng)
                found = fit_shots(train[chosen], labels[chosen], test, penalties)
                top1 = [float(np.mean(predicted == test_labels)) for _, predicted in found]
                scores.append([top1[int(np.argmin([error for error, _ in found]))], *top1])
            for penalty, of_draws in zip((None, *penalties), np.transpose(scores), strict=True):
                means = {"top1": float(of_draws.mean()), "top1_std": float(of_draws.std())}
                rows.append({"shots": shots, "penalty": penalty} | means)
        return rows

    def _name_small_classes(self, labels: np.ndarray, shots: int) -> None:
        names, counts = self.data.train.class_names, np.bincount(labels, minlength=self.data.train.num_classes)
        small = [f"{escaped(names[label])} ({counts[label]})" for label in np.flatnonzero(counts < shots)]
        if small:
            more = f" and {len(small) - NAMED:,} more" if len(small) > NAMED else ""
            say(f"note: {shots} shots: classes with fewer training images: {', '.join(small[:NAMED])}{more}")


def fit_shots(
    x: np.ndarray, labels: np.ndarray, test: np.ndarray, penalties: list[float]
) -> list[tuple[float, np.ndarray]]:
    """(mean squared leave-one-out error, predicted classes [M] of `test`) of each L2 penalty, in closed form.

    Features [N, D] and [M, D] are standardised by those of x, targets are one-hot, the intercept has no penalty.
    Penalties as scikit-learn's alpha; with targets of -1 and 1, as in big_vision, predictions are the same.
    """
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + STD_FLOOR
    present, targets = np.unique(labels, return_inverse=True)
    onehot = np.eye(len(present))[targets]
    centre = onehot.mean(axis=0)
    u, s, v = np.linalg.svd((x - mean) / std, full_matrices=False)
    found, coordinates = [], u.T @ (onehot - centre)
    for penalty in penalties:
        shrink = s**2 / (s**2 + penalty)
        fitted = centre + u @ (shrink[:, None] * coordinates)
        leverage = 1 / len(x) + (u**2) @ shrink  # the hat matrix's diagonal
        error = np.mean(((onehot - fitted) / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2)
        w = (v.T * (s / (s**2 + penalty))) @ coordinates / std[:, None]
        predicted = test @ w.astype(np.float32) + (centre - mean @ w).astype(np.float32)
        found.append((float(error), present[predicted.argmax(axis=1)]))
    return found
