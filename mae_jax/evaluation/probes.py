"""Linear classifiers on frozen features."""

import warnings

import numpy as np


def logistic_regression_predict(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, *, c: float
) -> np.ndarray:
    """Predicted classes [M] of test features [M, D] by scikit-learn's multinomial logistic regression on [N, D].

    The features are taken as they are, since they come out of a LayerNorm; `c` is the inverse L2 strength. L-BFGS
    makes at most 1,000 iterations, whether or not its criterion is met by then.
    """
    from sklearn.exceptions import ConvergenceWarning  # here, since scikit-learn takes a second
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="The number of unique classes")  # few examples a class are no mistake
        return LogisticRegression(C=c, max_iter=1000).fit(train, train_labels).predict(test)
