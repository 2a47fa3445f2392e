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
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from examples.training.checkpoints import write_atomically

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
    """All scores of a split, as scikit-learn defines them: labels int (N,), logits (N, C)."""
    predicted, classes = logits.argmax(1), range(logits.shape[1])
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "macro_f1": macro_f1(labels, logits),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": f1.tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def write_predictions(path: Path, ids: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> None:
    """An .npz of ids str (N,), labels int64 (N,), logits float32 (N, C)."""
    stream = io.BytesIO()
    np.savez(stream, ids=ids, labels=labels, logits=logits.astype(np.float32))
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
