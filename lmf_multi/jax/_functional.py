"""The steps of ``lmf_multi.reference`` in JAX; what is said here is only what differs.

Hyper-parameters may be tracers; what cannot raise there gives NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lmf_multi.jax._closed_form import is_class, mixture
from lmf_multi.spec import (
    RULES,
    Reduction,
    check_inputs,
    check_label_range,
    check_parameters,
    check_vectors,
)


def lmf_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    alpha: ArrayLike = 1.5,
    beta: ArrayLike = 1.0,
    gamma: ArrayLike = 1.5,
    scale: ArrayLike = 30.0,
    label_smoothing: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Large-margin and focal losses, mixed, as :func:`lmf_multi.reference.lmf_loss` defines them.

    Args:
        logits: float (..., C), nats; half types are computed in float32.
        labels: integer, the logits' shape without the class axis, each in [0, C); or float, the
            logits' shape, a distribution over the classes.
        margins: float (C,), logit units, before scaling.
        class_weight: float (C,), at least 0, or None for ones.
        alpha: share of the LDAM term; the number 0 leaves it out.
        beta: share of the focal term; the number 0 leaves it out.
        gamma: focusing exponent, at least 0.
        scale: factor on the logits inside the LDAM term, positive.
        label_smoothing: ε, in [0, 1].
        axis: the class axis of ``logits``.
        where: bool, one value for each example; False gives 0, whatever the logits and the label.

    Returns:
        float32, or float64 for float64 logits: one value for each example. The gradient with
        respect to the logits has the logits' dtype.

    Raises:
        ValueError: shapes disagree, a number breaks its rule, or a label outside a trace is out of
            range; inside a trace such a number or label gives NaN.
        TypeError: a dtype of the wrong kind.

    >>> logits, margins = jnp.array([[2.0, 0.0], [0.5, 1.0]]), jnp.array([0.1, 0.5])
    >>> [round(loss, 4) for loss in lmf_loss(logits, jnp.array([0, 1]), margins).tolist()]
    [0.0052, 1.1497]
    """
    return compute_loss(
        logits,
        labels,
        margins,
        class_weight,
        alpha,
        beta,
        gamma,
        scale,
        label_smoothing,
        axis=axis,
        where=where,
    )


def ldam_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    scale: ArrayLike = 30.0,
    label_smoothing: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> ldam_loss(jnp.array([[0.2, 0.0]]), jnp.array([0]), [0.2, 0.5], scale=2.0).round(4)
    Array([0.6931], dtype=float32)
    """
    return compute_loss(
        logits,
        labels,
        margins,
        class_weight,
        1.0,
        0.0,
        0.0,
        scale,
        label_smoothing,
        axis=axis,
        where=where,
    )


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    gamma: ArrayLike = 1.5,
    label_smoothing: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> focal_loss(jnp.zeros((1, 2)), jnp.array([0]), gamma=2.0).round(4)
    Array([0.1733], dtype=float32)
    """
    return compute_loss(
        logits,
        labels,
        None,
        class_weight,
        0.0,
        1.0,
        gamma,
        1.0,
        label_smoothing,
        axis=axis,
        where=where,
    )


def compute_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike | None,
    class_weight: ArrayLike | None,
    alpha: ArrayLike,
    beta: ArrayLike,
    gamma: ArrayLike,
    scale: ArrayLike,
    label_smoothing: ArrayLike,
    *,
    axis: int,
    where: ArrayLike | None,
    mask_name: str = "where",
    reduction: Reduction = "none",
) -> Array:
    """What each example contributes to the reduced loss; ``reduction`` is their sum."""
    check_vectors(margins=margins, class_weight=class_weight)
    z, y = jnp.asarray(logits), jnp.asarray(labels)
    dtype = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    Δ = None if margins is None else jnp.asarray(margins, dtype)
    w = None if class_weight is None else jnp.asarray(class_weight, dtype)
    mask = None if where is None else jnp.asarray(where)
    soft = check_inputs(
        (z.shape, z.dtype),
        (y.shape, y.dtype),
        axis,
        {
            "margins": None if Δ is None else Δ.shape,
            "class_weight": None if w is None else w.shape,
        },
        None if mask is None else (mask.shape, mask.dtype),
    )
    α, β = _number("alpha", alpha, dtype), _number("beta", beta, dtype)
    γ, s = _number("gamma", gamma, dtype), _number("scale", scale, dtype)
    ε = _number("label_smoothing", label_smoothing, dtype)

    axis = axis % z.ndim
    C, by_class = z.shape[axis], [-1] + [1] * (z.ndim - 1 - axis)
    if soft:
        presence = jnp.ones(z.shape[:axis] + z.shape[axis + 1 :], dtype)
        presence = presence if mask is None else mask.astype(dtype)
        present = jnp.expand_dims(presence, axis)
        q = jnp.where(present == 0, 0, y.astype(dtype))
        W = (q if w is None else q * w.reshape(by_class)).sum(axis)
    else:
        y, presence = _targets(y, C, mask, mask_name, dtype)
        present = jnp.expand_dims(presence, axis)
        q = jnp.where(is_class(y, C, axis), present, 0)
        W = presence if w is None else presence * w[y]
    by_weight, by_examples = _normalisers(W, presence, reduction)

    def of_one_class() -> Array:
        a = None if _is_zero(α) else W * (α / by_weight)
        b = None if _is_zero(β) else W * (β / by_examples)
        return mixture(z, y, presence, None if Δ is None else Δ[y], a, b, γ, s, axis)

    def of_all_classes() -> Array:
        p = (1 - ε) * q + ε / C * present
        share = p if w is None else p * w.reshape(by_class)
        a = None if _is_zero(α) else share * (α / by_weight)
        b = None if _is_zero(β) else share * (β / by_examples)
        margins = None if Δ is None else Δ.reshape(by_class)
        return mixture(jnp.where(present == 0, 0, z), None, None, margins, a, b, γ, s, axis)

    if soft or (not _is_zero(ε) and not isinstance(ε, Array)):
        return of_all_classes()
    if _is_zero(ε):
        return of_one_class()
    # known at run time only
    loss: Array = jax.lax.cond(ε == 0, of_one_class, of_all_classes)
    return loss


def _number(name: str, value: Any, dtype: Any) -> Any:
    """A checked number, or a scalar of a trace that is NaN where it breaks its rule."""
    if not isinstance(value, Array):
        check_parameters(**{name: value})
        return float(value)
    if value.ndim:
        raise ValueError(
            f"{name} must be a number, got shape {value.shape}; map over losses with jax.vmap"
        )
    value = value.astype(dtype)
    return jnp.where(RULES[name][1](value) & jnp.isfinite(value), value, jnp.nan)


def _is_zero(number: Any) -> bool:
    return not isinstance(number, Array) and number == 0


def _targets(
    y: Array, C: int, where: Array | None, mask_name: str, dtype: Any
) -> tuple[Array, Array]:
    """Class indices, and each example's presence: 1, 0 for a masked one, NaN out of range."""
    valid = jnp.ones(y.shape, bool) if where is None else where
    y = y if y.dtype.itemsize >= 4 else y.astype(jnp.int32)  # C may be too large for int8
    y = jnp.where(valid, y, 0)
    if y.size and not isinstance(y, jax.core.Tracer):
        check_label_range(int(y.min()), int(y.max()), C, mask_name)
    presence = jnp.where((y >= 0) & (y < C), valid.astype(dtype), jnp.nan)
    return jnp.clip(y, 0, C - 1).astype(jnp.int32), presence


def _normalisers(
    W: Array, presence: Array, reduction: Reduction
) -> tuple[Array | float, Array | float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    N = jnp.maximum(presence.sum(), 1)
    if reduction == "batch_mean":
        return N, N
    total = W.sum()
    return jnp.where(total == 0, 1, total), N
