"""What a training leaves behind: scores, predictions, and what they were made with."""

import csv
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import binned_statistic
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from examples.data.datasets import Dataset
from examples.training import finding_scores
from examples.training.checkpoints import write_atomically
from lmf_multi import adjust_logits, tune_adjustment

CALIBRATION_BINS = 15  # of equal width, as in Guo et al., arXiv 1706.04599

PACKAGES = {
    "torch": ("torch", "torchvision"),
    "flax": ("jax", "flax", "optax"),
    "keras": ("keras",),
}


def macro_f1(labels: np.ndarray, logits: np.ndarray) -> float:
    """The mean of the classes' F1, of which a class that is never found has 0: (N,), (N, C)."""
    return float(
        f1_score(
            labels,
            logits.argmax(1),
            labels=range(logits.shape[1]),
            average="macro",
            zero_division=0,
        )
    )


def scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """All scores of a split, as scikit-learn defines them: labels int (N,), logits (N, C).

    ``recall`` is sensitivity. The area under the ROC curve and the average precision are means over
    the classes that the split has, each against the rest; None where it has but one.
    """
    predicted, classes = logits.argmax(1), range(logits.shape[1])
    p = softmax(np.asarray(logits, np.float64), axis=1)
    ranked = [c for c in np.unique(labels) if np.any(labels != c)]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "macro_f1": macro_f1(labels, logits),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_auroc": mean([roc_auc_score(labels == c, p[:, c]) for c in ranked]),
        "average_precision": mean([average_precision_score(labels == c, p[:, c]) for c in ranked]),
        "calibration_error": calibration_error(labels, p),
        "f1": f1.tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def mean(values: Sequence[float]) -> float | None:
    """None of none."""
    return float(np.mean(values)) if values else None


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """How far confidence is from the share that is right, on average: (N,), (N, C)."""
    confidence = probabilities.max(1)
    surplus = confidence - (probabilities.argmax(1) == labels)
    bins = binned_statistic(confidence, surplus, "sum", CALIBRATION_BINS, (0, 1))
    return float(np.abs(bins.statistic).sum() / len(labels))


def of_epoch(labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """The validation scores of an epoch's row: of labels (N,), or of findings (N, L)."""
    if labels.ndim == 2:
        found = finding_scores.of_epoch(labels, logits)
        return {f"val_{name}": score for name, score in found.items() if score is not None}
    accuracy = float(np.mean(logits.argmax(1) == labels))
    return {"val_macro_f1": macro_f1(labels, logits), "val_accuracy": accuracy}


def tuned(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    val_labels: np.ndarray,
    val_logits: np.ndarray,
    class_counts: np.ndarray,
) -> dict[str, Any]:
    """τ of the best validation macro-F1, and the scores of the logits less τ log π.

    Args:
        labels, logits: int (N,) and (N, C), of the split that is scored.
        val_labels, val_logits: (M,) and (M, C), of the same model on the validation images.
        class_counts: training images of each class (C,), whose shares are π.
    """
    tau = float(tune_adjustment(val_logits, val_labels, class_counts))
    return {"tau": tau, "test": scores(labels, adjust_logits(logits, class_counts, tau))}


def of_test(dataset: Dataset, logits: np.ndarray, val_logits: np.ndarray) -> dict[str, Any]:
    """A result file's scores of the test split, and what was tuned for them on validation alone.

    Args:
        dataset: with one class an image, for which τ is tuned, or several findings, for each of
            which a threshold is.
        logits, val_logits: float (N, C) and (M, C), of the test and the validation split.
    """
    labels, val_labels = dataset.test.labels, dataset.val.labels
    if dataset.has_findings:
        least = finding_scores.thresholds(val_labels, val_logits)
        found = finding_scores.scores(labels, logits, least, dataset.class_names)
        named = dict(zip(dataset.class_names, least.tolist(), strict=True))
        return {"test": found, "thresholds": named}
    kept = {"val_labels": val_labels, "val_logits": val_logits}
    counts = dataset.class_counts
    return {
        "test": scores(labels, logits),
        "tuned": tuned(labels, logits, class_counts=counts, **kept),
    }


def in_words(found: dict[str, Any], epoch: int) -> str:
    """What ``of_test`` found with the model of an epoch."""
    test, model = found["test"], f"with the model of epoch {epoch}"
    if "tuned" not in found:
        means = {"macro-F1": "macro_f1", "macro-AUROC": "macro_auroc"}
        means |= {"average precision": "average_precision"}
        words = (f"{name} {test[key]:.4f}" for name, key in means.items() if test[key] is not None)
        return f"Test {', '.join(words)} {model}, each finding's threshold tuned on validation"
    tuned = found["tuned"]
    return (
        f"Test macro-F1 {test['macro_f1']:.4f}, balanced accuracy "
        f"{test['balanced_accuracy']:.4f}, accuracy {test['accuracy']:.4f} {model}; "
        f"macro-F1 {tuned['test']['macro_f1']:.4f} with τ = {tuned['tau']:.2f}, tuned on validation"
    )


def write_predictions(
    path: Path,
    ids: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    val_labels: np.ndarray | None = None,
    val_logits: np.ndarray | None = None,
) -> None:
    """An .npz of ids str (N,), labels int64 (N,), logits float32 (N, C), and of validation's."""
    arrays = {"ids": ids, "labels": labels, "logits": logits.astype(np.float32)}
    if val_logits is not None:
        arrays |= {"val_labels": val_labels, "val_logits": val_logits.astype(np.float32)}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_atomically(path, stream.getvalue())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that people read too."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_history(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV file, one row an epoch."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, stream.getvalue().encode())


def versions(framework: str) -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    packages = (*PACKAGES[framework], "numpy", "pillow", "lmf-multi")
    if framework == "keras":
        import keras

        backend = keras.backend.backend()
        packages = (*packages, backend)
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
