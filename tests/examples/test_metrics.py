"""The scores of a result file: scikit-learn's, and by hand where it has none."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from tests.frameworks import load

load("tensorboard")

from examples.training import results  # noqa: E402
from lmf_multi import adjust_logits, tune_adjustment  # noqa: E402


@pytest.fixture
def split():
    """Labels (300,) of four classes, the last one rare, and logits that know a little."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 300, p=[0.6, 0.2, 0.15, 0.05])
    return labels, (rng.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]).astype(np.float32)


def test_scores_are_scikit_learns(split):
    labels, logits = split
    found, predicted = results.scores(labels, logits), logits.argmax(1)
    p, one_hot = softmax(logits.astype(float), axis=1), np.eye(4)[labels]
    expected = {
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "accuracy": np.mean(labels == predicted),
        "macro_auroc": roc_auc_score(labels, p, multi_class="ovr", average="macro"),
        "average_precision": average_precision_score(one_hot, p, average="macro"),
        "recall": recall_score(labels, predicted, average=None),
        "precision": precision_score(labels, predicted, average=None),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_a_class_that_the_split_lacks_is_left_out_of_areas(split):
    labels, logits = split
    kept = labels != 3
    found = results.scores(labels[kept], logits[kept])
    p = softmax(logits[kept].astype(float), axis=1)
    each = [roc_auc_score(labels[kept] == c, p[:, c]) for c in range(3)]
    np.testing.assert_allclose(found["macro_auroc"], np.mean(each), rtol=1e-12)
    alone = results.scores(labels[labels == 1], logits[labels == 1])
    assert alone["macro_auroc"] is None and alone["average_precision"] is None


def test_the_calibration_error_by_hand():
    """Two sure answers of which one is right, and one half sure that is right: three bins."""
    p = np.array([[0.95, 0.05], [0.97, 0.03], [0.55, 0.45], [0.75, 0.25]])
    labels = np.array([0, 1, 0, 0])
    by_hand = (2 * abs(0.96 - 0.5) + abs(0.55 - 1) + abs(0.75 - 1)) / 4
    np.testing.assert_allclose(results.calibration_error(labels, p), by_hand, rtol=1e-12)


def test_the_calibration_error_is_small_where_confidence_is_the_chance():
    rng = np.random.default_rng(0)
    p = softmax(2 * rng.normal(size=(100_000, 3)), axis=1)
    labels = (rng.random((100_000, 1)) > np.cumsum(p, 1)).sum(1)
    assert results.calibration_error(labels, p) < 0.005
    surer = softmax(3 * np.log(p), axis=1)
    bins = np.minimum((surer.max(1) * 15).astype(int), 14)
    right = surer.argmax(1) == labels
    by_hand = sum(
        np.mean(bins == b) * abs(surer.max(1)[bins == b].mean() - right[bins == b].mean())
        for b in np.unique(bins)
    )
    np.testing.assert_allclose(results.calibration_error(labels, surer), by_hand, rtol=1e-9)
    assert by_hand > 0.05


def test_tau_is_tuned_on_validation_and_scored_on_test(split):
    labels, logits = split
    counts = [600, 200, 150, 50]
    logits = adjust_logits(logits, counts, -1)  # as cross-entropy leaves them
    val = {"val_labels": labels[:150], "val_logits": logits[:150]}
    found = results.tuned(labels[150:], logits[150:], class_counts=counts, **val)
    assert found["tau"] == tune_adjustment(logits[:150], labels[:150], counts)
    assert found["tau"] > 0.3
    adjusted = adjust_logits(logits[150:], counts, found["tau"])
    assert found["test"] == results.scores(labels[150:], adjusted)
    assert found["test"] != results.scores(labels[150:], logits[150:])


def test_predictions_keep_what_they_are_given(split, tmp_path):
    labels, logits = split
    ids = np.array([f"image-{i}" for i in range(300)])
    results.write_predictions(tmp_path / "old.npz", ids, labels, logits)
    assert set(np.load(tmp_path / "old.npz")) == {"ids", "labels", "logits"}
    kept = {"val_labels": labels[:9], "val_logits": logits[:9].astype(float)}
    results.write_predictions(tmp_path / "new.npz", ids, labels, logits, **kept)
    with np.load(tmp_path / "new.npz") as file:
        np.testing.assert_array_equal(file["ids"], ids)
        np.testing.assert_array_equal(file["val_labels"], labels[:9])
        np.testing.assert_array_equal(file["val_logits"], logits[:9])
        assert file["val_logits"].dtype == np.float32
