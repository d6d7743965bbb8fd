import numpy as np

from mae_jax.evaluation.knn import BLOCK, knn_predict


def knn_by_loops(train, labels, test, num_classes, k, temperature):
    """The definition, one query and one neighbour at a time, in float64."""
    predictions = []
    for query in test.astype(np.float64):
        cosines = [row @ query / (np.linalg.norm(row) * np.linalg.norm(query)) for row in train.astype(np.float64)]
        votes = np.zeros(num_classes)
        for neighbour in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[labels[neighbour]] += np.exp(cosines[neighbour] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


def test_predictions_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    labels = rng.integers(5, size=60)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 1.0), (60, 0.5)):
        ours = knn_predict(train, labels, test, num_classes=5, k=k, temperature=temperature)
        np.testing.assert_array_equal(ours, knn_by_loops(train, labels, test, 5, k, temperature))


def test_the_length_of_features_does_not_matter():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(20, 4)).astype(np.float32)
    labels = rng.integers(3, size=30)
    scales = rng.uniform(0.1, 10, size=(30, 1)).astype(np.float32)
    expected = knn_predict(train, labels, test, num_classes=3, k=5, temperature=0.07)
    np.testing.assert_array_equal(
        knn_predict(train * scales, labels, test * 100, num_classes=3, k=5, temperature=0.07), expected
    )


def test_nearer_neighbours_outvote_more_distant_ones():
    train = np.array([[1, 0], [0.2, 1], [0.2, 1]], np.float32)
    prediction = knn_predict(
        train, np.array([0, 1, 1]), np.array([[1, 0.05]], np.float32), num_classes=2, k=3, temperature=0.07
    )
    assert prediction.tolist() == [0]


def test_more_queries_than_a_block_and_fewer_examples_than_k_are_fine():
    train = np.eye(3, dtype=np.float32)
    test = np.tile(train, (BLOCK // 3 + 2, 1))
    prediction = knn_predict(train, np.array([2, 0, 1]), test, num_classes=3, k=20, temperature=0.07)
    np.testing.assert_array_equal(prediction, np.tile([2, 0, 1], BLOCK // 3 + 2))
