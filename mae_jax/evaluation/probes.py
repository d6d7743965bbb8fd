"""Linear classifiers on frozen features."""

import numpy as np


def logistic_regression_predict(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, *, c: float, seed: int = 0
) -> np.ndarray:
    """Predicted classes [M] of test features [M, D] by scikit-learn's multinomial logistic regression on [N, D].

    Features are standardised with the training features' mean and deviation; `c` is the inverse L2 strength.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, random_state=seed))
    return probe.fit(train, train_labels).predict(test)
