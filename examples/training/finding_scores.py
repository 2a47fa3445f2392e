"""Scores where an image may have several findings, each told by a threshold of its own.

Labels int (N, L) of L findings are 1, 0 or `findings.UNKNOWN`, which takes no part; logits (N, L)
are log-odds. A score is None where it is not defined: where all images have a finding, or none.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from examples.data.findings import UNKNOWN


def thresholds(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The logit (L,) from which on each finding is said to be there, for the best F1 of these.

    0, a probability of one half, for a finding that no image has.
    """
    return np.array([threshold(y, x) for y, x in annotated(labels, logits)])


def threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """That of one finding: labels of 0 and 1, logits (N,)."""
    if not labels.any():
        return 0.0
    precision, recall, candidates = precision_recall_curve(labels, logits)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(f1[:-1].argmax())
    # any logit down to the next smaller one divides these images alike: others best in the middle
    return float(candidates[max(best - 1, 0) : best + 1].astype(np.float64).mean())


def of_epoch(labels: np.ndarray, logits: np.ndarray) -> dict[str, float | None]:
    """What chooses the epoch, macro-F1 with thresholds for these images, and its companions."""
    found = scores(labels, logits, thresholds(labels, logits), range(labels.shape[1]))
    return {name: found[name] for name in ("macro_f1", "macro_auroc", "average_precision")}


def scores(
    labels: np.ndarray, logits: np.ndarray, thresholds: np.ndarray, names: Sequence[Any]
) -> dict[str, Any]:
    """All scores of a split, as scikit-learn defines them, their means over findings first.

    Args:
        labels, logits: int and float (N, L), of the images.
        thresholds: (L,), on the logits.
        names: of the findings (L,).
    """
    pairs = zip(annotated(labels, logits), thresholds, strict=True)
    each = [of_one(y, x, least) for (y, x), least in pairs]

    def mean(score: str) -> float | None:
        known = [found[score] for found in each if found[score] is not None]
        return float(np.mean(known)) if known else None

    return {
        "macro_f1": mean("f1"),
        "macro_auroc": mean("auroc"),
        "average_precision": mean("average_precision"),
        "findings": dict(zip(names, each, strict=True)),
    }


def of_one(labels: np.ndarray, logits: np.ndarray, threshold: float) -> dict[str, Any]:
    """Those of one finding: labels of 0 and 1, logits (N,)."""
    found: dict[str, Any] = {"images_without": int((labels == 0).sum())}
    found |= {"images_with": int((labels == 1).sum())}
    names = ("auroc", "average_precision", "f1", "precision", "recall")
    if not found["images_with"]:
        return found | dict.fromkeys(names)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, logits >= threshold, average="binary", zero_division=0
    )
    ranked = roc_auc_score(labels, logits) if found["images_without"] else None
    values = (ranked, average_precision_score(labels, logits), f1, precision, recall)
    return found | {k: v if v is None else float(v) for k, v in zip(names, values, strict=True)}


def annotated(labels: np.ndarray, logits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels and logits (n,) of each finding, of the images in which somebody looked for it."""
    for y, x in zip(labels.T, logits.T, strict=True):
        known = y != UNKNOWN
        yield y[known], x[known]
