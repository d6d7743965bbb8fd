"""RankMe: the effective rank of features."""

from collections.abc import Iterator

import numpy as np

from mae_jax.evaluation.evaluator import Evaluator, State

MAX_ROWS = 25_600  # the paper's number; float64 singular values of [25600, 768] take seconds on a laptop
EPSILON = 1e-7  # the paper's equation 1, for float32 features


class RankMe(Evaluator):
    """The effective rank of the training features."""

    measures_features = True
    protocol = "RankMe: of the training features"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        if self.data.labelled:  # like the other evaluators: without labels, no features are computed
            yield "rankme", rankme(self.data.features(state, "train")[0])


def rankme(features: np.ndarray) -> float:
    """Effective rank, from 1 to min(N, D), of features [N, D] (Garrido et al. 2022, arXiv 2210.02885, eq. 1-2).

    exp of the entropy of p_k = sigma_k / sum(sigma) + EPSILON with singular values sigma_k. Beyond MAX_ROWS features,
    evenly spaced ones are used, since a folder's pictures are sorted by class.
    """
    rows = np.linspace(0, len(features) - 1, min(len(features), MAX_ROWS)).round().astype(np.int64)
    # In float64 and not by the Gram matrix: its eigenvalues are squares, so small ones would be lost.
    sigma = np.linalg.svd(features[rows].astype(np.float64), compute_uv=False)
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + EPSILON
    return float(np.exp(-np.sum(p * np.log(p))))
