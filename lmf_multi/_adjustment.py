"""Logit adjustment after training: decisions in which rare classes count as the caller wants."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmf_multi.spec import (
    Counts,
    Floats,
    as_numpy,
    check_label_range,
    check_parameters,
    log_priors,
)

Metric = Literal["macro_f1", "balanced_accuracy"] | Callable[[Any, Any], float]

# 0 and 1 among them; what a validation set of a few hundred images can tell apart
_TAUS = np.round(np.arange(-2.0, 3.01, 0.05), 2)


def adjust_logits(logits: Any, class_counts: Counts, tau: float = 1.0, *, axis: int = -1) -> Any:
    r"""Logits less τ log π, whose largest is the class to decide for.

    .. math:: \hat y = \mathrm{argmax}_j \, (z_j - \tau \log \pi_j)

    With τ = 1, what a model trained with cross-entropy says of a world in which all classes are
    equally frequent; ``tune_adjustment`` finds the τ of the best score. A model that was trained
    with ``logit_adjustment=1`` has done so already: its τ is 0.

    Args:
        logits: float (..., C), nats: an array or tensor of any framework, or a list.
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        tau: τ, a number.
        axis: the class axis of ``logits``.

    Returns:
        The logits' kind, shape and dtype; float64 for lists.

    Raises:
        ValueError: another number of classes, or a value that breaks its rule.
        TypeError: a value is not of the right kind.

    Source: Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation 9.

    >>> adjust_logits([[1.0, 0.0], [4.0, 0.0]], [90, 10]).argmax(-1)
    array([1, 0])
    """
    check_parameters(tau=tau)
    if not hasattr(logits, "shape") or (
        isinstance(logits, np.ndarray) and logits.dtype.kind in "iu"
    ):
        logits = np.asarray(logits, np.float64)
    shift = _along(tau * log_priors(class_counts), logits.shape, axis)
    if hasattr(logits, "new_tensor"):  # PyTorch's, perhaps on a GPU
        return logits - logits.new_tensor(shift)
    return logits - shift.astype(getattr(logits.dtype, "as_numpy_dtype", logits.dtype))


def tune_adjustment(
    logits: Any, labels: Any, class_counts: Counts, metric: Metric = "macro_f1"
) -> float:
    """The τ with which ``adjust_logits`` scores best, of validation examples.

    Args:
        logits: float (N, C), nats, of validation examples, not of those trained on.
        labels: integer (N,), each in [0, C).
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        metric: ``"macro_f1"``, the mean of the C classes' F1, of which a class that is never found
            has 0; ``"balanced_accuracy"``, the mean recall of the classes that occur; or a function
            of labels (N,) and decisions (N,), larger for better.

    Returns:
        τ, from -2 to 3 in steps of 0.05; of equal scores the one nearest to 0.

    Raises:
        ValueError: shapes disagree, a label is out of range, a logit is NaN, or there is none.
        TypeError: labels that are not integers.

    >>> logits, labels = [[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.5, 0.0]], [0, 0, 1, 1]
    >>> tune_adjustment(logits, labels, class_counts=[90, 10])
    0.5
    """
    z, y = as_numpy(logits).astype(np.float64), as_numpy(labels)
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y):
        raise ValueError(
            f"logits must be (N, C) and labels (N,), N at least 1, got {z.shape} and {y.shape}"
        )
    if y.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {y.dtype}; take argmax of one-hot labels")
    if np.isnan(z).any():
        raise ValueError("logits must be numbers, got NaN; look for where training diverged")
    check_label_range(int(y.min()), int(y.max()), z.shape[1], "where")
    if not callable(metric) and metric not in _METRICS:
        raise ValueError(f"metric must be {', '.join(_METRICS)} or a function, got {metric!r}")
    score = metric if callable(metric) else partial(_METRICS[metric], z.shape[1])
    priors = _along(log_priors(class_counts), z.shape, -1)
    taus = sorted(_TAUS.tolist(), key=abs)  # of equal scores max() takes the first
    return float(max(taus, key=lambda tau: score(y, (z - tau * priors).argmax(1))))


def _along(values: Floats, shape: tuple[int, ...], axis: int) -> Floats:
    """(C,) along the class axis of logits of this shape."""
    if not -len(shape) <= axis < len(shape) or shape[axis] != len(values):
        raise ValueError(
            f"logits must have the {len(values)} classes of class_counts along axis {axis}, "
            f"got shape {tuple(shape)}"
        )
    return values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _macro_f1(C: int, labels: NDArray[Any], decisions: NDArray[Any]) -> float:
    found, of_label, of_decision = _counts(C, labels, decisions)
    return float(np.mean(2 * found / np.maximum(of_label + of_decision, 1)))


def _balanced_accuracy(C: int, labels: NDArray[Any], decisions: NDArray[Any]) -> float:
    found, of_label, _ = _counts(C, labels, decisions)
    return float(np.mean(found[of_label > 0] / of_label[of_label > 0]))


def _counts(C: int, labels: NDArray[Any], decisions: NDArray[Any]) -> list[NDArray[Any]]:
    """Of each class (C,): examples that were found, that there are, and that were said to be it."""
    kinds = (labels[labels == decisions], labels, decisions)
    return [np.bincount(kind.astype(np.int64), minlength=C) for kind in kinds]


_METRICS = {"macro_f1": _macro_f1, "balanced_accuracy": _balanced_accuracy}
