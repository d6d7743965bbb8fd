import functools

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

from mae_jax.evaluation.classification import (
    Predictions,
    class_table,
    confusion_matrix,
    draw_confusion_matrix,
    predict,
    summarize_predictions,
)
from mae_jax.runtime.mesh import batch_sharding, put_batch
from tests.meshes import device_mesh


def batches(logits, labels, size, devices=1):
    """Device batches of an evaluation, the last one filled with rows of weight 0 that would be hits."""
    mesh = device_mesh(devices)
    for first in range(0, len(labels), size):
        real = len(labels[first : first + size])
        batch = {
            "logits": np.pad(logits[first : first + size], [(0, size - real), (0, 0)]),
            "label": np.pad(labels[first : first + size], (0, size - real)).astype(np.int32),
            "weight": (np.arange(size) < real).astype(np.float32),
        }
        yield put_batch(batch, batch_sharding(mesh))


def judge(logits, labels, size=8, devices=1) -> Predictions:
    logits = np.asarray(logits, np.float32)
    return predict(lambda batch: batch["logits"], batches(logits, np.asarray(labels), size, devices))


@functools.cache
def example(classes=7, count=53):
    """Logits and labels [N] of which about half are hits."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    logits = rng.standard_normal((count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_every_example_counts_once_whatever_the_batches_and_devices(devices, size):
    logits, labels = example()
    found = judge(logits, labels, size, devices)
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))
    ranks = [sum(other > row[label] for other in row) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_array_equal(found.rank, ranks)
    shifted = logits.astype(np.float64)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5, atol=1e-6)  # a few float32 roundings
    scores = summarize_predictions(found)
    assert scores["top1"] == sum(rank < 1 for rank in ranks) / 53
    assert scores["top5"] == sum(rank < 5 for rank in ranks) / 53
    assert scores["loss"] == pytest.approx(losses.mean(), rel=1e-6)


def test_top_1_and_top_5_are_those_of_scikit_learn():
    logits, labels = example()
    scores = summarize_predictions(judge(logits, labels))
    for k, name in ((1, "top1"), (5, "top5")):
        assert scores[name] == pytest.approx(top_k_accuracy_score(labels, logits, k=k), abs=1e-12)


def test_of_equal_logits_the_first_class_wins_as_in_argmax():
    logits = np.zeros((7, 7))
    found = judge(logits, np.arange(7))
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))
    np.testing.assert_array_equal(found.rank, np.arange(7))
    scores = summarize_predictions(found)
    assert (scores["top1"], scores["top5"]) == (1 / 7, 5 / 7)


def test_a_hit_is_what_argmax_says_also_where_logits_are_equal():
    rng = np.random.default_rng(0)
    logits, labels = rng.integers(0, 3, (200, 6)), rng.integers(0, 6, 200)
    found = judge(logits, labels)
    np.testing.assert_array_equal(found.rank == 0, logits.argmax(1) == labels)


def test_with_fewer_than_five_classes_every_answer_is_among_the_first_five():
    logits, labels = example(classes=4)
    assert summarize_predictions(judge(logits, labels))["top5"] == 1.0


def test_logits_that_are_no_numbers_are_no_hits_and_show_in_the_loss():
    logits, labels = np.full((4, 7), np.nan), np.array([0, 1, 2, 6])
    scores = summarize_predictions(judge(logits, labels))
    assert np.isnan(scores["loss"]) and (scores["top1"], scores["top5"]) == (0, 0)


def test_confusions_precision_and_recall_are_those_of_scikit_learn():
    logits, labels = example()
    found = judge(logits, labels)
    predicted = logits.argmax(1)
    confusions = confusion_matrix(found, 7)
    np.testing.assert_array_equal(confusions, sklearn_confusion_matrix(labels, predicted, labels=range(7)))
    assert confusions.dtype == np.int64
    rows = class_table(confusions, [f"class {index}" for index in range(7)])
    precision, recall, _, images = precision_recall_fscore_support(labels, predicted, labels=range(7))
    assert [row["class"] for row in rows] == [f"class {index}" for index in range(7)]
    assert [row["images"] for row in rows] == list(images)
    assert [row["recall"] for row in rows] == pytest.approx(list(recall))
    assert [row["precision"] for row in rows] == pytest.approx(list(precision))


def test_the_table_names_the_class_that_one_is_most_often_taken_for_and_leaves_out_what_has_no_value():
    confusions = np.array([[5, 1, 3, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    rows = class_table(confusions, ["cat", "dog", "owl", "bee"])
    assert rows[0] == {"class": "cat", "images": 9, "recall": 5 / 9, "precision": 5 / 6, "often_taken_for": "owl"}
    assert rows[1] == {"class": "dog", "images": 2, "recall": 1.0, "precision": 2 / 3, "often_taken_for": None}
    assert rows[2] == {"class": "owl", "images": 0, "recall": None, "precision": 0.0, "often_taken_for": None}
    assert rows[3] == {"class": "bee", "images": 1, "recall": 0.0, "precision": None, "often_taken_for": "cat"}


@pytest.mark.parametrize("classes", [3, 100])
def test_confusions_are_drawn_darker_where_there_are_more_of_them(classes):
    pytest.importorskip("matplotlib")
    confusions = np.zeros((classes, classes), np.int64)
    names = [f"class {index}" for index in range(classes)]
    empty = draw_confusion_matrix(confusions, names, ["nothing"])
    full = draw_confusion_matrix(confusions + 9 * np.eye(classes, dtype=np.int64), names, ["all right"])
    for picture in (empty, full):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 400
    assert full.mean() < empty.mean()


STRANGE = ["a$^$", "two\nlines", "\x1b[31mred"]  # "$^$" is not a formula that matplotlib can draw


def test_names_of_classes_are_drawn_as_they_are():
    pytest.importorskip("matplotlib")
    assert draw_confusion_matrix(np.eye(3, dtype=np.int64), STRANGE, ["runs/$^$\n", "2"]).ndim == 3
