"""Linear classifiers on frozen features."""

import numpy as np


def logistic_regression_predict(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, *, c: float
) -> np.ndarray:
    """Predicted classes [M] of test features [M, D] by scikit-learn's multinomial logistic regression on [N, D].

    The features are taken as they are, since they come out of a LayerNorm; `c` is the inverse L2 strength.
    """
    from sklearn.linear_model import LogisticRegression  # here, since it takes a second

    return LogisticRegression(C=c, max_iter=1000).fit(train, train_labels).predict(test)
