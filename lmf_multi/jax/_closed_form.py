"""The terms in JAX, with the gradient's closed form computed together with the value.

As a ``custom_jvp``: reverse mode keeps one array of the logits' size, and forward mode and Hessians
differentiate the closed form.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid


def is_class(y: Array, C: int, axis: int) -> Array:
    """Boolean one-hot of the class indices along the class axis."""
    shape = (*y.shape[:axis], C, *y.shape[axis:])
    return jax.lax.broadcasted_iota(y.dtype, shape, axis) == jnp.expand_dims(y, axis)


@partial(jax.custom_jvp, nondiff_argnums=(8,))
def mixture(
    z: Array,
    y: Array | None,
    presence: Array | None,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
    axis: int | None,
) -> Array:
    """a LDAM_y + b Focal_y of each example, or with ``y=None`` the sum of it over the classes.

    Without a class axis it is the sigmoid form: y tells the positive elements, and with ``y=None``
    Δ, a and b hold negative and positive along a first axis.
    """
    return _value_and_grad(z, y, presence, Δ, a, b, γ, s, axis)[0]


@partial(mixture.defjvp, symbolic_zeros=True)
def _mixture_jvp(axis: int | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, y, presence, Δ, a, b, γ, s = primals
    dz, _, _, *dparameters = tangents
    loss, grad = _value_and_grad(z, y, presence, Δ, a, b, γ, s, axis)
    dloss = jnp.zeros_like(loss)
    if not _is_symbolic_zero(dz):
        change = grad * dz.astype(grad.dtype)
        dloss += change if axis is None else change.sum(axis)
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
    axis: int | None,
) -> tuple[Array, Array]:
    z = z if z.dtype == jnp.float64 else z.astype(jnp.float32)
    if axis is None:
        return _sigmoid(z, y, Δ, a, b, γ, s)
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
    is_y, masked = is_class(y, z.shape[axis], axis), presence == 0
    z_y = jnp.where(masked, 0, jnp.where(is_y, z, 0).sum(axis))
    # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
    others = jnp.where(is_y | jnp.expand_dims(masked, axis), -jnp.inf, z)
    M = jnp.maximum(jax.lax.stop_gradient(others).max(axis), -_LARGE)
    x = jnp.maximum(others - jnp.expand_dims(M, axis), -_LARGE)

    losses, slopes, grads = [], [], []
    if a is not None and Δ is not None:
        e = jnp.exp(s * x)
        S = _at_least_1(e.sum(axis))
        ldam, slope = _ldam(_log_odds(z_y, M, S, s, Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
        grads.append(e * jnp.expand_dims(-a * slope / S, axis))
    if b is not None:
        e = jnp.exp(x)
        S = _at_least_1(e.sum(axis))
        focal, slope = _focal(_log_odds(z_y, M, S), γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
        grads.append(e * jnp.expand_dims(-b * slope / S, axis))
    if not losses:
        return jnp.zeros_like(z_y), jnp.zeros_like(z)
    return _sum(losses), jnp.where(is_y, jnp.expand_dims(_sum(slopes), axis), _sum(grads))


def _at_least_1(S: Array) -> Array:
    """A sum of exponentials, which is 1 or more unless no other class is possible.

    ``maximum`` would halve the derivative where the sum rounds to 1.
    """
    return jnp.where(S < 1, 1, S)


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
    is_top = is_class(top, z.shape[axis], axis)
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


def _sigmoid(
    x: Array,
    positive: Array | None,
    Δ: Array | None,
    a: Array | None,
    b: Array | None,
    γ: Any,
    s: Any,
) -> tuple[Array, Array]:
    """Loss of each element as a positive or a negative, or of both summed, and its gradient."""
    if positive is None:
        sign = jnp.array([-1, 1], x.dtype).reshape(2, *[1] * x.ndim)
    else:
        sign = jnp.where(positive, 1, -1).astype(x.dtype)
    ω = sign * x

    losses, slopes = [], []
    if a is not None and Δ is not None:
        ldam, slope = _ldam(_log_odds(ω, 0.0, jnp.ones_like(ω), s, Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
    if b is not None:
        focal, slope = _focal(ω, γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
    if not losses:
        return jnp.zeros_like(x), jnp.zeros_like(x)
    loss, grad = _sum(losses), sign * _sum(slopes)
    return (loss.sum(0), grad.sum(0)) if positive is None else (loss, grad)


def _sums_of_others(e: Array, e_others: Array, is_top: Array, axis: int) -> tuple[Array, Array]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = _at_least_1(e_others.sum(axis, keepdims=True))
    return jnp.where(is_top, S_others, e.sum(axis, keepdims=True) - e), S_others


def _chain(G: Array, e: Array, S: Array, r_top: Array, is_top: Array, axis: int) -> Array:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = jnp.where(is_top, 0, G / S)
    G_top = jnp.where(is_top, G, 0).sum(axis, keepdims=True)
    return G - e * (t.sum(axis, keepdims=True) - t) - r_top * G_top


def _log_odds(z: Array, M: Any, S: Array, s: Any = 1.0, Δ: Any = 0.0) -> Array:
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
