"""The arithmetic in JAX: the loss, and the closed form of its gradient, as the reference has them.

Symbols as in ``lmf_multi._terms``; every array of the logits' shape has its classes along ``axis``.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmf_multi._terms import Labels, Terms


def value_and_grad(z: Array, labels: Labels, terms: Terms, axis: int | None) -> tuple[Array, Array]:
    """Loss (N,) and its gradient (N, C), in float32 at least; the sigmoid form has no axis."""
    z = z if z.dtype == jnp.float64 else z.astype(jnp.float32)
    if axis is None:
        return sigmoid(z, labels, terms)
    if labels.q is None:
        return one_class(z, labels, terms, axis)
    return all_classes(z, labels, terms, axis)


def one_class(z: Array, labels: Labels, terms: Terms, axis: int) -> tuple[Array, Array]:
    """Loss of the labelled class alone (N,), and its gradient (N, C)."""
    Δ, w, a, b, γ, s, o, _ = terms
    W, y = weights(labels, w, axis, z.dtype), jnp.maximum(labels.y, 0)
    is_y = is_class(y, z.shape[axis], axis)
    # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
    masked = labels.masked
    left_out = is_y if masked is None else is_y | jnp.expand_dims(masked, axis)
    added, lost = adjusted(z, None if o is None else by_class(o, z.ndim, axis))
    others = jnp.where(left_out, _IMPOSSIBLE, added)
    M, z_y = _largest_and_labelled(others, z, y, axis)
    z_y, lost_y = adjusted(z_y, None if o is None else at_class(o, y, axis))
    if lost is not None:
        M = below(M)
    if masked is not None:
        z_y = jnp.where(masked, 0, z_y)
    x = jnp.maximum(above(others, jnp.expand_dims(M, axis), lost), -LARGE)

    exponentials = [jnp.exp(s * x)] * (a is not None) + [jnp.exp(x)] * (b is not None)
    sums = [_at_least_1(S) for S in _sums(axis, *exponentials)]
    each = []
    if a is not None:
        Δ_y = at_class(Δ, y, axis)
        each.append((W * a, *ldam(log_odds(z_y, M, sums[0], s, Δ_y, lost_y), s)))
    if b is not None:
        each.append((W * b, *focal(log_odds(z_y, M, sums[-1], lost=lost_y), γ)))
    if not each:
        return jnp.zeros_like(z_y), jnp.zeros_like(z)
    losses = [times(c, loss) for c, loss, _ in each]
    slopes = [c * slope for c, _, slope in each]
    grads = [
        e * jnp.expand_dims(-slope / S, axis)
        for e, slope, S in zip(exponentials, slopes, sums, strict=True)
    ]
    return _sum(losses), jnp.where(is_y, jnp.expand_dims(_sum(slopes), axis), _sum(grads))


def all_classes(z: Array, labels: Labels, terms: Terms, axis: int) -> tuple[Array, Array]:
    """Loss of every class by its share, summed (N,), and its gradient (N, C).

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    Δ, w, a, b, γ, s, o, _ = terms
    z, lost = adjusted(z, None if o is None else by_class(o, z.ndim, axis))
    top = jnp.argmax(jax.lax.stop_gradient(z), axis)
    is_top = is_class(top, z.shape[axis], axis)
    others = jnp.where(is_top, _IMPOSSIBLE, z)
    M = jax.lax.stop_gradient(z).max(axis, keepdims=True)
    M_others = jnp.maximum(jax.lax.stop_gradient(others).max(axis, keepdims=True), -LARGE)
    if lost is not None:
        M, M_others = below(M), below(M_others)
    M_j = jnp.where(is_top, M_others, M)
    x = jnp.maximum(above(z, M, lost), -LARGE)
    x_others = jnp.maximum(above(others, M_others, lost), -LARGE)

    share, losses, grads = shares(labels.q, w, axis), [], []
    if a is not None:
        e, e_others = jnp.exp(s * x), jnp.exp(s * x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = ldam(log_odds(z, M_j, S, s, by_class(Δ, z.ndim, axis), lost), s)
        losses.append(times(share * a, loss))
        grads.append(chain(share * a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = jnp.exp(x), jnp.exp(x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = focal(log_odds(z, M_j, S, lost=lost), γ)
        losses.append(times(share * b, loss))
        grads.append(chain(share * b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return jnp.zeros_like(z).sum(axis), jnp.zeros_like(z)
    return _sum(losses).sum(axis), _sum(grads)


def sigmoid(x: Array, labels: Labels, terms: Terms) -> tuple[Array, Array]:
    """Loss (N,) of each element as what its label is, or as both by their shares, and its gradient.

    What is of negative and positive lies along a first axis, (2, N).
    """
    Δ, w, a, b, γ, s, o, ε = terms
    x, lost = adjusted(x, o)
    if labels.q is None:
        x = x if labels.masked is None else jnp.where(labels.masked, 0, x)
        sign = jnp.where(labels.y == 1, 1, -1).astype(x.dtype)
        W, Δ = weights(labels, w, None, x.dtype), None if Δ is None else at_class(Δ, labels.y, None)
    else:
        sign = jnp.array([-1, 1], x.dtype).reshape(2, *[1] * x.ndim)
        presence = labels.q[0] + labels.q[1]
        q = (1 - ε) * labels.q + ε / 2 * presence[None]
        W, x = shares(q, w, None), x[None]
        lost = None if lost is None else lost[None]
    ω, lost = sign * x, None if lost is None else sign * lost

    losses, slopes = [], []
    if a is not None:
        loss, slope = ldam(log_odds(ω, 0.0, jnp.ones_like(ω), s, Δ, lost), s)
        losses.append(times(W * a, loss))
        slopes.append(W * a * slope)
    if b is not None:
        loss, slope = focal(ω, γ)
        losses.append(times(W * b, loss))
        slopes.append(W * b * slope)
    if not losses:
        nothing = jnp.zeros_like(x if labels.q is None else x[0])
        return nothing, nothing
    loss, grad = _sum(losses), sign * _sum(slopes)
    return (loss, grad) if labels.q is None else (loss.sum(0), grad.sum(0))


def weights(labels: Labels, w: Array | None, axis: int | None, dtype: Any) -> Array:
    """Each example's class weight W (N,): 0 for a masked one, NaN for an unknown label."""
    y, masked, q = labels
    if q is not None and axis is None:  # which XLA does not add up in an array of its own
        both: Array = q[0] + q[1] if w is None else q[0] * w[0] + q[1] * w[1]
        return both
    if q is not None:
        return shares(q, w, axis).sum(axis)
    W = jnp.ones(y.shape, dtype) if w is None else at_class(w, y, axis)
    if masked is None:
        return nan_where(y < 0, W)
    return jnp.where(masked, 0, nan_where((y < 0) & ~masked, W))


def shares(q: Array, w: Array | None, axis: int | None) -> Array:
    """What every class counts for, q w (N, C), in the sigmoid form (2, N)."""
    return q if w is None else q * by_class(w, q.ndim, axis)


def sums_of_others(e: Array, e_others: Array, is_top: Array, axis: int) -> tuple[Array, Array]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = _at_least_1(e_others.sum(axis, keepdims=True))
    return jnp.where(is_top, S_others, e.sum(axis, keepdims=True) - e), S_others


def chain(G: Array, e: Array, S: Array, r_top: Array, is_top: Array, axis: int) -> Array:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = jnp.where(is_top, 0, G / S)
    G_top = jnp.where(is_top, G, 0).sum(axis, keepdims=True)
    return G - e * (t.sum(axis, keepdims=True) - t) - r_top * G_top


def log_odds(
    z: Array, M: Any, S: Array, s: Any = 1.0, Δ: Any = 0.0, lost: Array | None = None
) -> Array:
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back.

    ``lost`` is one of z already.
    """
    d, of_M = difference(z, M)
    h, of_Δ = difference(d, Δ)
    errors = of_M + of_Δ if lost is None else of_M + of_Δ + lost
    ω: Array = s * h + (s * errors - jnp.log(S))
    return ω


def difference(a: Array, b: Any) -> tuple[Array, Array]:
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    return c, jax.lax.stop_gradient(jnp.where(jnp.isfinite(lost), lost, 0))


def adjusted(z: Array, o: Array | None) -> tuple[Array, Array | None]:
    """z + o, rounded, and what the rounding lost; z itself without an adjustment."""
    return (z, None) if o is None else difference(z, -o)


def ldam(τ: Array, s: Any) -> tuple[Array, Array]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    root, e, rest = tail(τ)
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    r = jnp.where(τ >= 0, root, 1)
    return jnp.where(τ >= 0, 0, -τ) + rest, -(s * r) * r / (1 + e)


def focal(ω: Array, γ: Any) -> tuple[Array, Array]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    _, e, rest = tail(ω)
    ce, modulation = jnp.where(ω >= 0, 0, -ω) + rest, jnp.exp(-γ * (jnp.where(ω >= 0, ω, 0) + rest))
    p, miss = jnp.where(ω >= 0, 1, e), jnp.where(ω >= 0, e, 1)  # times 1 + e
    slope = -modulation * (γ * p * jnp.minimum(ce, LARGE) + miss) / (1 + e)
    return modulation * ce, slope


def tail(x: Array) -> tuple[Array, Array, Array]:
    """e^{-|x|/2}, its square and log(1 + e^{-|x|}), of which sigmoid and softplus are made.

    ``where`` takes the same side at 0 throughout, so that the derivatives there are right.
    """
    root = jnp.exp(jnp.where(x >= 0, -x, x) / 2)
    e = root * root
    return root, e, jnp.log1p(e)


def times(coefficient: Array, term: Array) -> Array:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term > np.finfo(term.dtype).max)
    return jnp.where(nothing, 0, coefficient * term)


# Beyond every log-odds that matters, and small enough for products with it to stay finite.
LARGE = 1e18
# Less than any maximum by as much, as -inf is, which users may have found where they gave none.
_IMPOSSIBLE = -2 * LARGE


# --- what JAX needs besides: gathers and sums that XLA makes fast, NaN that nobody finds too early


def is_class(y: Array, C: int, axis: int) -> Array:
    """Boolean one-hot of the class indices along the class axis."""
    shape = (*y.shape[:axis], C, *y.shape[axis:])
    return jax.lax.broadcasted_iota(y.dtype, shape, axis) == jnp.expand_dims(y, axis)


def by_class(vector: Array, ndim: int, axis: int | None) -> Array:
    """(C,) along the class axis of ``ndim``, which users may forbid to be added silently.

    The sigmoid form's (2, …) lies as it should.
    """
    if axis is None:
        return vector
    return jnp.expand_dims(vector, [i for i in range(ndim) if i != axis])


def at_class(vector: Array, y: Array, axis: int | None) -> Array:
    """``vector[y]`` (N,), some entry for -1.

    A gather from the vector itself refuses explicitly sharded labels.
    """
    if axis is None:
        return jnp.where(y == 1, vector[1], vector[0])
    shape = (*y.shape[:axis], len(vector), *y.shape[axis:])
    along = jnp.broadcast_to(by_class(vector, y.ndim + 1, axis), shape)
    return at_label(along, jnp.maximum(y, 0), axis)


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


def below(M: Array) -> Array:
    """A little less than the largest of adjusted logits, which was rounded: without rounding it is
    above, so that its exponential is 1 or more."""
    lower: Array = M - jnp.abs(M) * np.finfo(M.dtype).eps
    return lower


def above(z: Array, M: Array, lost: Array | None) -> Array:
    """z - M, with what z has lost: M is about as large as z, the difference need not be."""
    return z - M if lost is None else (z - M) + lost


def nan_where(bad: Array, x: Array) -> Array:
    """x, or NaN: computed, since users may have NaN constants found that nobody selects."""
    return x * jnp.sqrt(jnp.where(bad, -1, 1).astype(x.dtype))


# Up to so many classes XLA's own loops are faster on a CPU than the library, YNNPACK, that it hands
# single sums and maxima to: several times over short rows (JAX 0.10, x86).
_FEW = 32


def _largest_and_labelled(others: Array, z: Array, y: Array, axis: int) -> tuple[Array, Array]:
    """M = max_{k≠y} z_k, at least -LARGE, and z_y."""
    if z.shape[axis] > _FEW:
        M, z_y = jax.lax.stop_gradient(others).max(axis), at_label(z, y, axis)
    else:
        z_y_alone = jnp.where(is_class(y, z.shape[axis], axis), z, 0)
        M, z_y = _max_and_sum(others, z_y_alone, axis)
    return jnp.maximum(M, -LARGE), z_y


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


def _at_least_1(S: Array) -> Array:
    """A sum of exponentials, which is 1 or more unless no other class is possible.

    ``maximum`` would halve the derivative where the sum rounds to 1.
    """
    return jnp.where(S < 1, 1, S)


def _sum(terms: list[Array]) -> Array:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
