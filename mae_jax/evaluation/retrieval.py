"""Retrieval: the nearest pictures of an index to each query, and how many of them are of the query's class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from mae_jax.evaluation.features import find_neighbours

RECALL_AT = (1, 5, 10)
BLOCK = 2**24  # cosines that the host holds at a time


class Neighbours(NamedTuple):
    """The nearest rows of an index of each query, nearest first."""

    cosine: np.ndarray  # float32 [M, k]
    rows: np.ndarray  # int32 [M, k]; -1: there are no more


def find_own(index_names: Sequence[str], query_names: Sequence[str]) -> np.ndarray:
    """The rows of the index with the name of each query, int64 [M, most], filled up with -1."""
    rows: dict[str, list[int]] = {name: [] for name in query_names}
    for row, name in enumerate(index_names):
        if name in rows:
            rows[name].append(row)
    own = np.full((len(query_names), max(map(len, rows.values()), default=0)), -1, np.int64)
    for query, name in enumerate(query_names):
        own[query, : len(rows[name])] = rows[name]
    return own


def find_others(index: np.ndarray, queries: np.ndarray, own: np.ndarray, k: int, mesh: Mesh) -> Neighbours:
    """The k nearest by cosine of features [N, D] to each of the queries [M, D], without their `own` rows [M, S]."""
    cosine, rows = find_neighbours(index, queries, k + own.shape[1], mesh)
    is_own = (rows[:, :, None] == own[:, None, :]).any(axis=2)
    rows = np.where(is_own, -1, rows)
    order = np.argsort(is_own, axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(cosine, order, 1), np.take_along_axis(rows, order, 1))


def average_precisions(
    index: np.ndarray, queries: np.ndarray, own: np.ndarray, labels: np.ndarray, query_labels: np.ndarray
) -> np.ndarray:
    """Average precision of the whole ranking of the index [N, D] for each query [M, D]: float64 [M].

    Those of the query's label count; precision is taken at each of their cosines, with all that are as near (as in
    scikit-learn). Labels are numbers, -1: none. NaN for a query without a label, or with one that no other has.
    """
    index, found = _unit(index), np.full(len(queries), np.nan)
    known = np.flatnonzero(np.isin(query_labels, labels[labels >= 0]))
    size = max(1, BLOCK // max(1, len(index)))
    for block in (known[at : at + size] for at in range(0, len(known), size)):
        cosines = _unit(queries[block]) @ index.T
        for query, cosine in zip(block, cosines, strict=True):
            is_other = np.ones(len(index), bool)
            is_other[own[query][own[query] >= 0]] = False
            # Sorted by distance, so that the place after all of the same distance is how many are at least as near.
            relevant = np.sort(-cosine[is_other & (labels == query_labels[query])])
            if len(relevant):
                ranked = np.sort(-cosine[is_other])
                place, hits = (np.searchsorted(among, relevant, "right") for among in (ranked, relevant))
                found[query] = np.mean(hits / place)
    return found


def score(
    neighbours: Neighbours, precisions: np.ndarray, labels: np.ndarray, query_labels: np.ndarray
) -> dict[str, float]:
    """{"recall_at_1": .., "map": ..} over the queries whose precision is a number; empty if there are none.

    recall_at_k is the share of them with at least one of their label among the k nearest, which must be at least 10,
    or all.
    """
    scored = ~np.isnan(precisions)
    if not scored.any():
        return {}
    rows = neighbours.rows[scored]
    hit = (rows >= 0) & (labels[rows] == query_labels[scored, None])
    recalls = {f"recall_at_{k}": float(hit[:, :k].any(axis=1).mean()) for k in RECALL_AT}
    return recalls | {"map": float(precisions[scored].mean())}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
