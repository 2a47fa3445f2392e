"""The terms in JAX, with the gradient's closed form computed together with the value.

As a ``custom_jvp``: reverse mode keeps one array of the logits' size, and forward mode and Hessians
differentiate the closed form.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmf_multi.jax._cpu import by_kernel, has_kernel_for


def is_class(y: Array, C: int, axis: int) -> Array:
    """Boolean one-hot of the class indices along the class axis."""
    shape = (*y.shape[:axis], C, *y.shape[axis:])
    return jax.lax.broadcasted_iota(y.dtype, shape, axis) == jnp.expand_dims(y, axis)


# Up to so many classes XLA's own loops are faster on a CPU than the library, YNNPACK, that it hands
# single sums and maxima to: several times over short rows (JAX 0.10, x86).
_FEW = 32


def at_label(x: Array, y: Array, axis: int) -> Array:
    """x_y of an array of the logits' shape.

    A gather on CPU only, where XLA would write the selected entries out before it sums them;
    elsewhere it does not, and shards of the class axis can share the sum.
    """

    def gather(x: Array, y: Array) -> Array:
        dimensions = jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
            operand_batching_dims=tuple(i for i in range(x.ndim) if i != axis),
            start_indices_batching_dims=tuple(range(y.ndim)),
        )
        i = jnp.expand_dims(y, y.ndim)
        return jax.lax.gather(x, i, dimensions, (1,) * x.ndim, mode="promise_in_bounds")

    def select(x: Array, y: Array) -> Array:
        return jnp.where(is_class(y, x.shape[axis], axis), x, 0).sum(axis)

    if y.size == 0:  # of which JAX 0.4 refuses to gather
        return select(x, y)
    x_y: Array = jax.lax.platform_dependent(x, y, cpu=gather, default=select)
    return x_y


def by_class(vector: Array, ndim: int, axis: int) -> Array:
    """(C,) along the class axis of ``ndim``, which users may forbid to be added silently."""
    return jnp.expand_dims(vector, [i for i in range(ndim) if i != axis])


def at_class(vector: Array, y: Array, axis: int) -> Array:
    """``vector[y]``; a gather from the vector itself refuses explicitly sharded labels."""
    shape = (*y.shape[:axis], len(vector), *y.shape[axis:])
    return at_label(jnp.broadcast_to(by_class(vector, y.ndim + 1, axis), shape), y, axis)


def nan_where(bad: Array, x: Array) -> Array:
    """x, or NaN: computed, since users may have NaN constants found that nobody selects."""
    return x * jnp.sqrt(jnp.where(bad, -1, 1).astype(x.dtype))


def weights(y: Array, masked: Array | None, w: Array | None, axis: int, dtype: Any) -> Array:
    """Each example's class weight: 0 for a masked one, NaN for an unknown label."""
    W = jnp.ones(y.shape, dtype) if w is None else at_class(w, jnp.maximum(y, 0), axis)
    if masked is None:
        return nan_where(y < 0, W)
    return jnp.where(masked, 0, nan_where((y < 0) & ~masked, W))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(axis: int, *arrays: Array) -> list[Array]:
    """Each one's sum over the classes."""
    if arrays[0].shape[axis] > _FEW:
        return [x.sum(axis) for x in arrays]
    return _reduce(arrays, [0.0] * len(arrays), [jax.lax.add] * len(arrays), axis)


@_sums.defjvp
def _sums_jvp(axis: int, arrays: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    return _sums(axis, *arrays), [x.sum(axis) for x in tangents]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _max_and_sum(x: Array, y: Array, axis: int) -> tuple[Array, Array]:
    """The maximum of x, whose gradient is stopped, and the sum of y over the classes."""
    largest, total = _reduce((x, y), [_IMPOSSIBLE, 0.0], [jax.lax.max, jax.lax.add], axis)
    return largest, total


@_max_and_sum.defjvp
def _max_and_sum_jvp(axis: int, arrays: Any, tangents: Any) -> tuple[Any, Any]:
    largest, total = _max_and_sum(*arrays, axis)
    return (largest, total), (jnp.zeros_like(largest), tangents[1].sum(axis))


def _reduce(arrays: Any, inits: list[float], operations: list[Any], axis: int) -> list[Array]:
    """Reductions over the classes, each array's by its own operation, in one pass.

    Its callers say what the derivative is: JAX's own would go through the classes one by one.
    """

    def combine(p: Any, q: Any) -> list[Array]:
        return [f(*each) for f, *each in zip(operations, p, q, strict=True)]

    starts = [jnp.array(init, x.dtype) for init, x in zip(inits, arrays, strict=True)]
    reduced: list[Array] = jax.lax.reduce(list(arrays), starts, combine, (axis,))
    return reduced


@partial(jax.custom_jvp, nondiff_argnums=(9,))
def mixture(
    z: Array,
    y: Array | None,
    masked: Array | None,
    Δ: Array | None,
    w: Array | None,
    a: Any,
    b: Any,
    γ: Any,
    s: Any,
    axis: int | None,
) -> Array:
    """w_y (a LDAM_y + b Focal_y) of each example, of vectors Δ and w and numbers a and b.

    ``masked`` tells the examples that do not count, if some do not; -1 is an unknown label. With
    ``y=None`` it is the sum over the classes, with a and b of the logits' shape, and Δ for each
    class. Without a class axis it is the sigmoid form: y tells the positive elements, of which a,
    b and Δ are, and with ``y=None`` those hold negative and positive along a first axis.
    """
    return _value_and_grad(z, y, masked, Δ, w, a, b, γ, s, axis, False)[0]


@partial(mixture.defjvp, symbolic_zeros=True)
def _mixture_jvp(axis: int | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, y, masked, Δ, w, a, b, γ, s = primals
    dz, _, _, *dparameters = tangents
    loss, grad = _value_and_grad(z, y, masked, Δ, w, a, b, γ, s, axis)
    dloss = jnp.zeros_like(loss)
    if not is_symbolic_zero(dz):
        change = grad * dz.astype(grad.dtype)
        dloss += change if axis is None else change.sum(axis)
    if not all(is_symbolic_zero(d) for d in dparameters):

        def value(Δ: Any, w: Any, a: Any, b: Any, γ: Any, s: Any) -> Array:
            return _value_and_grad(z, y, masked, Δ, w, a, b, γ, s, axis, False)[0]

        changes = jax.tree.map(_instantiate, tuple(dparameters), is_leaf=is_symbolic_zero)
        _, d = jax.jvp(value, (Δ, w, a, b, γ, s), changes)
        dloss += d
    return loss, dloss


def is_symbolic_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _instantiate(tangent: Any) -> Any:
    zero = tangent is not None and is_symbolic_zero(tangent)
    return jnp.zeros(tangent.shape, tangent.dtype) if zero else tangent


def _value_and_grad(
    z: Array,
    y: Array | None,
    masked: Array | None,
    Δ: Array | None,
    w: Array | None,
    a: Any,
    b: Any,
    γ: Any,
    s: Any,
    axis: int | None,
    with_grad: bool = True,
) -> tuple[Array, Any]:
    if axis is not None and y is not None and has_kernel_for(z):
        loss, *grad = by_kernel(_one_class, z, y, masked, Δ, w, a, b, γ, s, axis, with_grad)
        return loss, grad[0] if with_grad else None
    if axis is not None and y is not None:
        return _one_class(z, y, masked, Δ, w, a, b, γ, s, axis)
    z = _widened(z)
    if axis is None:
        return _sigmoid(z, y, Δ, a, b, γ, s)
    return _all_classes(z, Δ, a, b, γ, s, axis)


def _widened(z: Array) -> Array:
    return z if z.dtype == jnp.float64 else z.astype(jnp.float32)


def _one_class(
    z: Array,
    y: Array,
    masked: Array | None,
    Δ: Array | None,
    w: Array | None,
    a: Any,
    b: Any,
    γ: Any,
    s: Any,
    axis: int,
) -> tuple[Array, Array]:
    """Loss of the labelled class alone, and its gradient."""
    z = _widened(z)
    W, y = weights(y, masked, w, axis, z.dtype), jnp.maximum(y, 0)
    is_y = is_class(y, z.shape[axis], axis)
    # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
    left_out = is_y if masked is None else is_y | jnp.expand_dims(masked, axis)
    others = jnp.where(left_out, _IMPOSSIBLE, z)
    M, z_y = _largest_and_labelled(others, z, y, axis)
    if masked is not None:
        z_y = jnp.where(masked, 0, z_y)
    x = jnp.maximum(others - jnp.expand_dims(M, axis), -_LARGE)

    has_ldam, has_focal = a is not None and Δ is not None, b is not None
    exponentials = [jnp.exp(s * x)] * has_ldam + [jnp.exp(x)] * has_focal
    sums = [_at_least_1(S) for S in _sums(axis, *exponentials)]
    terms = []
    if a is not None and Δ is not None:
        Δ_y = at_class(Δ, y, axis)
        terms.append((W * a, *_ldam(_log_odds(z_y, M, sums[0], s, Δ_y), s)))
    if b is not None:
        terms.append((W * b, *_focal(_log_odds(z_y, M, sums[-1]), γ)))
    if not terms:
        return jnp.zeros_like(z_y), jnp.zeros_like(z)
    losses = [_times(c, loss) for c, loss, _ in terms]
    slopes = [c * slope for c, _, slope in terms]
    grads = [
        e * jnp.expand_dims(-slope / S, axis)
        for e, slope, S in zip(exponentials, slopes, sums, strict=True)
    ]
    return _sum(losses), jnp.where(is_y, jnp.expand_dims(_sum(slopes), axis), _sum(grads))


def _largest_and_labelled(others: Array, z: Array, y: Array, axis: int) -> tuple[Array, Array]:
    """M = max_{k≠y} z_k, at least -_LARGE, and z_y."""
    if z.shape[axis] > _FEW:
        M, z_y = jax.lax.stop_gradient(others).max(axis), at_label(z, y, axis)
    else:
        z_y_alone = jnp.where(is_class(y, z.shape[axis], axis), z, 0)
        M, z_y = _max_and_sum(others, z_y_alone, axis)
    return jnp.maximum(M, -_LARGE), z_y


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
    others = jnp.where(is_top, _IMPOSSIBLE, z)
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
        ω = sign * x[None]
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
    root, e, rest = _tail(τ)
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    r = jnp.where(τ >= 0, root, 1)
    return jnp.where(τ >= 0, 0, -τ) + rest, -(s * r) * r / (1 + e)


def _focal(ω: Array, γ: Any) -> tuple[Array, Array]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    _, e, rest = _tail(ω)
    ce, modulation = jnp.where(ω >= 0, 0, -ω) + rest, jnp.exp(-γ * (jnp.where(ω >= 0, ω, 0) + rest))
    p, miss = jnp.where(ω >= 0, 1, e), jnp.where(ω >= 0, e, 1)  # times 1 + e
    slope = -modulation * (γ * p * jnp.minimum(ce, _LARGE) + miss) / (1 + e)
    return modulation * ce, slope


def _tail(x: Array) -> tuple[Array, Array, Array]:
    """e^{-|x|/2}, its square and log(1 + e^{-|x|}), of which sigmoid and softplus are made.

    ``where`` takes the same side at 0 throughout, so that the derivatives there are right.
    """
    root = jnp.exp(jnp.where(x >= 0, -x, x) / 2)
    e = root * root
    return root, e, jnp.log1p(e)


# Beyond every log-odds that matters, and small enough for products with it to stay finite.
_LARGE = 1e18
# Less than any maximum by as much, as -inf is, which users may have found where they gave none.
_IMPOSSIBLE = -2 * _LARGE


def _times(coefficient: Array, term: Array) -> Array:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term > np.finfo(term.dtype).max)
    return jnp.where(nothing, 0, coefficient * term)


def _sum(terms: list[Array]) -> Array:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
