"""The cosine head: its definition in float64 NumPy, and the checks of every framework's layer."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEATURE_DTYPES = ("float16", "bfloat16", "float32", "float64")


def cosine_logits(features: ArrayLike, weight: ArrayLike) -> NDArray[np.float64]:
    r"""Cosine of the angle between each feature vector and each class's weight vector.

    .. math:: z_j = \frac{x}{\lVert x \rVert} \cdot \frac{v_j}{\lVert v_j \rVert}

    x is one row of ``features``, v_j of ``weight``; D features, C classes. A vector of zeros has
    no direction: its cosines are 0, and the layers give it the gradient of a vector of length 1,
    so that training can leave it. Entries below the dtype's smallest normal number count as 0.

    Args:
        features: float (..., D), of any size.
        weight: float (C, D), one row for each class, of any size.

    Returns:
        float64 (..., C), in [-1, 1] up to rounding.

    Raises:
        ValueError: shapes disagree.
        TypeError: features that are not in floating point.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
    arXiv 1906.07413, whose last layer this is. The scale stays in the loss, where it multiplies the
    margins too.

    >>> cosine_logits([[3.0, 4.0], [0.0, 0.0]], [[2.0, 0.0], [-6.0, -8.0]])
    array([[ 0.6, -1. ],
           [ 0. ,  0. ]])
    """
    x, v = np.asarray(features), np.asarray(weight)
    if v.ndim != 2 or 0 in v.shape:
        raise ValueError(
            f"weight must have shape (C, D), one row for each class, got shape {v.shape}"
        )
    check_features(x.shape, x.dtype, v.shape[1])
    cosines: NDArray[np.float64] = _unit(x.astype(np.float64)) @ _unit(v.astype(np.float64)).T
    return cosines


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; squares neither overflow nor vanish once the largest entry is 1."""
    size = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(size < np.finfo(x.dtype).tiny, 1, size)
    squares = (x * x).sum(-1, keepdims=True)
    unit: NDArray[np.float64] = x / np.sqrt(np.where(squares == 0, 1, squares))
    return unit


def check_features(shape: tuple[int | None, ...], dtype: Any, in_features: int) -> None:
    """Refuse features of another size or kind; shapes cost nothing under a compiler."""
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if name not in FEATURE_DTYPES:
        raise TypeError(f"features must be one of {', '.join(FEATURE_DTYPES)}, got {name}")
    if not shape or shape[-1] != in_features:
        raise ValueError(
            f"features must have shape (..., {in_features}), got {shape}; "
            "the last axis holds in_features"
        )
