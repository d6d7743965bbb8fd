"""Predictions of single pictures as rows of a table, and which of them a person should look at first."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, log_softmax

from mae_jax.runtime.errors import escaped

SHOWN_CLASSES = 3  # of several that apply, in a caption


class Rows(NamedTuple):
    """What is told of n pictures."""

    cells: list[list]  # of the table: as many as `columns`, without the picture's name
    doubt: np.ndarray  # float [n]: those with the largest are to be looked at first
    words: list[str]  # captions


class ClassRows:
    """Of logits [n, K] for one class of several: the `top` most probable classes."""

    def __init__(self, names: Sequence[str], top: int, labelled: bool):
        self._names, self._top, self._labelled = [escaped(name) for name in names], min(top, len(names)), labelled
        self.columns = [f"{kind}_{n}" for n in range(1, self._top + 1) for kind in ("class", "probability")]
        self.columns += ["label", "correct"] if labelled else []

    def __call__(self, logits: np.ndarray, labels: np.ndarray) -> Rows:
        """Wrong ones before right and unlabelled ones, the surest first; those from the least sure on."""
        shares = np.exp(log_softmax(logits.astype(np.float64), axis=1))
        best = np.argsort(-logits, axis=1, kind="stable")[:, : self._top]  # of equals the first, as argmax
        cells, words, surest = [], [], shares[np.arange(len(best)), best[:, 0]]
        wrong = (labels >= 0) & (labels != best[:, 0])
        for row, places in enumerate(best):
            cell = [text for place in places for text in (self._names[place], _number(shares[row, place]))]
            told = f"{self._names[places[0]]} {surest[row]:.0%}"
            if self._labelled:
                label = self._names[labels[row]] if labels[row] >= 0 else ""
                cell += [label, "" if not label else "no" if wrong[row] else "yes"]
                told += f" ({label})" if wrong[row] else ""
            cells.append(cell)
            words.append(told)
        return Rows(cells, np.where(wrong, 1 + surest, 1 - surest), words)


class MultiRows:
    """Of logits [n, K] for classes that apply or not: each one's probability."""

    def __init__(self, names: Sequence[str], labelled: bool):
        self._names, self._labelled = np.asarray([escaped(name) for name in names], object), labelled
        self.columns = [*self._names, *(["labels", "correct"] if labelled else [])]

    def __call__(self, logits: np.ndarray, labels: np.ndarray) -> Rows:
        """Wrong ones first, with the surest mistake first; then those with the least sure class."""
        shares, applies = expit(logits.astype(np.float64)), labels > 0
        known = ~np.isnan(labels).any(axis=1)
        mistaken = ((logits > 0) != applies) & known[:, None]
        wrong, sure = mistaken.any(axis=1), np.abs(shares - 0.5)
        cells, words = [], []
        for row, share in enumerate(shares):
            cell = [_number(value) for value in share]
            told = ", ".join(f"{self._names[k]} {share[k]:.0%}" for k in np.argsort(-share)[:SHOWN_CLASSES])
            if self._labelled:
                right = "|".join(self._names[applies[row]]) if known[row] else ""
                cell += [right, "" if not known[row] else "no" if wrong[row] else "yes"]
                told += f" ({right or 'none'})" if wrong[row] else ""
            cells.append(cell)
            words.append(told)
        return Rows(cells, np.where(wrong, 1 + (sure * mistaken).max(1), 0.5 - sure.min(1)), words)


class NumberRows:
    """Of numbers [n, K] in the data's units; `std` [K] is that of the training labels."""

    def __init__(self, names: Sequence[str], std: Sequence[float], labelled: bool):
        names = [escaped(name) for name in names]
        self._std, self._labelled = np.asarray(std or np.ones(len(names))), labelled
        self.columns = [*names, *(f"label {name}" for name in names if labelled)]

    def __call__(self, outputs: np.ndarray, labels: np.ndarray) -> Rows:
        """Those with the largest error, in units of `std`, first; of those without a label the largest numbers."""
        errors = np.abs(outputs - labels) / self._std
        known, cells, words = ~np.isnan(labels).any(axis=1), [], []
        for row, values in enumerate(outputs):
            cell, told = [_number(value) for value in values], f"{values[0]:.4g}"
            if self._labelled:
                cell += [_number(value) if known[row] else "" for value in labels[row]]
                told += f" ({labels[row, 0]:.4g})" if known[row] else ""
            cells.append(cell)
            words.append(told)
        far = np.nan_to_num(errors).max(axis=1)
        return Rows(cells, np.where(known, 1 + far, 0 if self._labelled else outputs[:, 0]), words)


def _number(value: float) -> str:
    return f"{value:.6g}"
