"""The steps of ``lmf_multi.reference`` in JAX; what is said here is only what differs.

The gradient's closed form is computed together with the value, as a ``custom_jvp``: reverse mode
keeps one array of the logits' size, and forward mode and Hessians differentiate the closed form.
Hyper-parameters may be tracers; what cannot raise there gives NaN.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from lmf_multi.spec import (
    RULES,
    Reduction,
    check_inputs,
    check_label_range,
    check_parameters,
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

    >>> lmf_loss(jnp.array([[2.0, 0.0], [0.5, 1.0]]), jnp.array([0, 1]), jnp.array([0.1, 0.5]))
    Array([0.00527805, 1.1496416 ], dtype=float32)
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

    >>> ldam_loss(jnp.array([[0.2, 0.0]]), jnp.array([0]), jnp.array([0.2, 0.5]), scale=2.0)
    Array([0.6931472], dtype=float32)
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

    >>> focal_loss(jnp.zeros((1, 2)), jnp.array([0]), gamma=2.0)
    Array([0.17328681], dtype=float32)
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
        q = jnp.where(_is_class(y, C, axis), present, 0)
        W = presence if w is None else presence * w[y]
    by_weight, by_examples = _normalisers(W, presence, reduction)

    def of_one_class() -> Array:
        a = None if _is_zero(α) else W * (α / by_weight)
        b = None if _is_zero(β) else W * (β / by_examples)
        return _mixture(z, y, presence, None if Δ is None else Δ[y], a, b, γ, s, axis)

    def of_all_classes() -> Array:
        p = (1 - ε) * q + ε / C * present
        share = p if w is None else p * w.reshape(by_class)
        a = None if _is_zero(α) else share * (α / by_weight)
        b = None if _is_zero(β) else share * (β / by_examples)
        margins = None if Δ is None else Δ.reshape(by_class)
        return _mixture(jnp.where(present == 0, 0, z), None, None, margins, a, b, γ, s, axis)

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


def _is_class(y: Array, C: int, axis: int) -> Array:
    """Boolean one-hot of the class indices along the class axis."""
    shape = (*y.shape[:axis], C, *y.shape[axis:])
    return jax.lax.broadcasted_iota(y.dtype, shape, axis) == jnp.expand_dims(y, axis)


def _targets(
    y: Array, C: int, where: Array | None, mask_name: str, dtype: Any
) -> tuple[Array, Array]:
    """Class indices, and each example's presence: 1, 0 for a masked one, NaN out of range."""
    valid = jnp.ones(y.shape, bool) if where is None else where
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


@partial(jax.custom_jvp, nondiff_argnums=(8,))
def _mixture(
    z: Array,
    y: Array | None,
    presence: Array | None,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
    axis: int,
) -> Array:
    """a LDAM_y + b Focal_y of each example, or with ``y=None`` the sum of it over the classes."""
    return _value_and_grad(z, y, presence, Δ, a, b, γ, s, axis)[0]


@partial(_mixture.defjvp, symbolic_zeros=True)
def _mixture_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, y, presence, Δ, a, b, γ, s = primals
    dz, _, _, *dparameters = tangents
    loss, grad = _value_and_grad(z, y, presence, Δ, a, b, γ, s, axis)
    dloss = jnp.zeros_like(loss)
    if not _is_symbolic_zero(dz):
        dloss += (grad * dz.astype(grad.dtype)).sum(axis)
    if not all(_is_symbolic_zero(d) for d in dparameters):
        _, d = jax.jvp(
            lambda Δ, a, b, γ, s: _value_and_grad(z, y, presence, Δ, a, b, γ, s, axis)[0],
            (Δ, a, b, γ, s),
            jax.tree.map(_instantiate, tuple(dparameters), is_leaf=_is_symbolic_zero),
        )
        dloss += d
    return loss, dloss


def _is_symbolic_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _instantiate(tangent: Any) -> Any:
    zero = tangent is not None and _is_symbolic_zero(tangent)
    return jnp.zeros(tangent.shape, tangent.dtype) if zero else tangent


def _value_and_grad(
    z: Array,
    y: Array | None,
    presence: Array | None,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
    axis: int,
) -> tuple[Array, Array]:
    z = z if z.dtype == jnp.float64 else z.astype(jnp.float32)
    if y is None or presence is None:
        return _all_classes(z, Δ, a, b, γ, s, axis)
    return _one_class(z, y, presence, Δ, a, b, γ, s, axis)


def _one_class(
    z: Array,
    y: Array,
    presence: Array,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
    axis: int,
) -> tuple[Array, Array]:
    """Loss of the labelled class alone, and its gradient."""
    is_y, masked = _is_class(y, z.shape[axis], axis), presence == 0
    z_y = jnp.where(masked, 0, jnp.where(is_y, z, 0).sum(axis))
    # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
    others = jnp.where(is_y | jnp.expand_dims(masked, axis), -jnp.inf, z)
    M = jnp.maximum(jax.lax.stop_gradient(others).max(axis), -_LARGE)
    x = jnp.maximum(others - jnp.expand_dims(M, axis), -_LARGE)

    losses, slopes, grads = [], [], []
    if a is not None and Δ is not None:
        e = jnp.exp(s * x)
        S = jnp.maximum(e.sum(axis), 1)  # it is 1 or more unless no other class is possible
        ldam, slope = _ldam(_log_odds(z_y, M, S, s, Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
        grads.append(e * jnp.expand_dims(-a * slope / S, axis))
    if b is not None:
        e = jnp.exp(x)
        S = jnp.maximum(e.sum(axis), 1)
        focal, slope = _focal(_log_odds(z_y, M, S), γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
        grads.append(e * jnp.expand_dims(-b * slope / S, axis))
    if not losses:
        return jnp.zeros_like(z_y), jnp.zeros_like(z)
    return _sum(losses), jnp.where(is_y, jnp.expand_dims(_sum(slopes), axis), _sum(grads))


def _all_classes(
    z: Array,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
    axis: int,
) -> tuple[Array, Array]:
    """Loss of every class, summed, and its gradient.

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    top = jnp.argmax(jax.lax.stop_gradient(z), axis)
    is_top = _is_class(top, z.shape[axis], axis)
    others = jnp.where(is_top, -jnp.inf, z)
    M = jax.lax.stop_gradient(z).max(axis, keepdims=True)
    M_others = jnp.maximum(jax.lax.stop_gradient(others).max(axis, keepdims=True), -_LARGE)
    M_j = jnp.where(is_top, M_others, M)
    x, x_others = jnp.maximum(z - M, -_LARGE), jnp.maximum(others - M_others, -_LARGE)

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = jnp.exp(s * x), jnp.exp(s * x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        ldam, slope = _ldam(_log_odds(z, M_j, S, s, Δ), s)
        losses.append(_times(a, ldam))
        grads.append(_chain(a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = jnp.exp(x), jnp.exp(x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        focal, slope = _focal(_log_odds(z, M_j, S), γ)
        losses.append(_times(b, focal))
        grads.append(_chain(b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return jnp.zeros_like(z).sum(axis), jnp.zeros_like(z)
    return _sum(losses).sum(axis), _sum(grads)


def _sums_of_others(e: Array, e_others: Array, is_top: Array, axis: int) -> tuple[Array, Array]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = jnp.maximum(e_others.sum(axis, keepdims=True), 1)
    return jnp.where(is_top, S_others, e.sum(axis, keepdims=True) - e), S_others


def _chain(G: Array, e: Array, S: Array, r_top: Array, is_top: Array, axis: int) -> Array:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = jnp.where(is_top, 0, G / S)
    G_top = jnp.where(is_top, G, 0).sum(axis, keepdims=True)
    return G - e * (t.sum(axis, keepdims=True) - t) - r_top * G_top


def _log_odds(z: Array, M: Array, S: Array, s: Any = 1.0, Δ: Any = 0.0) -> Array:
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back."""
    d, lost = _difference(z, M)
    h, also_lost = _difference(d, Δ)
    log_odds: Array = s * h + (s * (lost + also_lost) - jnp.log(S))
    return log_odds


def _difference(a: Array, b: Any) -> tuple[Array, Array]:
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    return c, jax.lax.stop_gradient(jnp.where(jnp.isfinite(lost), lost, 0))


def _ldam(τ: Array, s: Any) -> tuple[Array, Array]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    root = jnp.exp(log_sigmoid(-τ) / 2)
    return -log_sigmoid(τ), -(s * root) * root


def _focal(ω: Array, γ: Any) -> tuple[Array, Array]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    ce, modulation = -log_sigmoid(ω), jnp.exp(γ * log_sigmoid(-ω))
    slope = -modulation * (γ * sigmoid(ω) * jnp.minimum(ce, _LARGE) + sigmoid(-ω))
    return modulation * ce, slope


# Beyond every log-odds that matters, and small enough for products with it to stay finite.
_LARGE = 1e18


def _times(coefficient: Array, term: Array) -> Array:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term == jnp.inf)
    return jnp.where(nothing, 0, coefficient * term)


def _sum(terms: list[Array]) -> Array:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
