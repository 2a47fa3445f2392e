"""The arithmetic in TensorFlow: the terms, and the gradient's closed form computed with the value.

Symbols and shapes are those of ``lmf_multi._terms``, steps and names those of
``lmf_multi.reference``. The class axis stays where it is.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from lmf_multi._terms import Labels, Terms


def value_and_grad(
    z: tf.Tensor, labels: Labels, terms: Terms, axis: int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) and its gradient (N, C), in float32 at least; the sigmoid form has no axis."""
    z = z if z.dtype == tf.float64 else tf.cast(z, tf.float32)
    if axis is None:
        return sigmoid(z, labels, terms)
    if labels.q is not None:
        return all_classes(z, labels, terms, axis)
    return one_class(z, labels, terms, axis)


def one_class(z: tf.Tensor, labels: Labels, terms: Terms, axis: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of the labelled class alone (N,), and its gradient (N, C)."""
    masked, y, (Δ, w, a, b, γ, s, o, _) = labels.masked, tf.maximum(labels.y, 0), terms
    z, lost = adjusted(z, None if o is None else by_class(o, len(z.shape), axis))
    W, is_y = weights(labels, w, axis, z.dtype), is_class(y, tf.shape(z)[axis], axis)
    z_y, M, left_out = _at_label(z, y, axis), _max_of_others(z, is_y, axis), is_y
    lost_y = None
    if lost is not None:
        M, lost_y = below(M), _at_label(lost, y, axis)
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y, M = (tf.where(masked, constant(0, z.dtype), v) for v in (z_y, M))
        left_out = is_y | tf.expand_dims(masked, axis)
    x = tf.where(left_out, constant(-LARGE, z.dtype), above(z, tf.expand_dims(M, axis), lost))

    losses, slopes, grads = [], [], []
    if a is not None:
        e = tf.exp(s * x)
        S = at_least_1(_total(e, axis))
        loss, slope = ldam(log_odds(z_y, M, S, s, tf.gather(Δ, y), lost_y), s)
        losses.append(times(W * a, loss))
        slopes.append(W * a * slope)
        grads.append(e * tf.expand_dims(-slopes[-1] / S, axis))
    if b is not None:
        e = tf.exp(x)
        S = at_least_1(_total(e, axis))
        loss, slope = focal(log_odds(z_y, M, S, lost=lost_y), γ)
        losses.append(times(W * b, loss))
        slopes.append(W * b * slope)
        grads.append(e * tf.expand_dims(-slopes[-1] / S, axis))
    if not losses:
        return tf.zeros_like(z_y), tf.zeros_like(z)
    return _sum(losses), tf.where(is_y, tf.expand_dims(_sum(slopes), axis), _sum(grads))


def all_classes(
    z: tf.Tensor, labels: Labels, terms: Terms, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of every class by its share q_j w_j, summed (N,), and its gradient (N, C).

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    share, (Δ, _, a, b, γ, s, o, _) = shares(labels.q, terms.w, axis), terms
    z, lost = adjusted(z, None if o is None else by_class(o, len(z.shape), axis))
    top = tf.argmax(tf.stop_gradient(z), axis)
    is_top = is_class(top, tf.shape(z)[axis], axis)
    nothing = constant(-LARGE, z.dtype)
    M = tf.reduce_max(tf.stop_gradient(z), axis, keepdims=True)
    others = tf.where(is_top, nothing, tf.stop_gradient(z))
    M_others = tf.reduce_max(others, axis, keepdims=True)
    if lost is not None:
        M, M_others = below(M), below(M_others)
    x, x_others = above(z, M, lost), tf.where(is_top, nothing, above(z, M_others, lost))
    M_j = tf.where(is_top, M_others, M)

    losses, grads = [], []
    if a is not None:
        e, e_others = tf.exp(s * x), tf.exp(s * x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = ldam(log_odds(z, M_j, S, s, by_class(Δ, len(z.shape), axis), lost), s)
        losses.append(times(share * a, loss))
        grads.append(chain(share * a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = tf.exp(x), tf.exp(x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = focal(log_odds(z, M_j, S, lost=lost), γ)
        losses.append(times(share * b, loss))
        grads.append(chain(share * b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return tf.reduce_sum(tf.zeros_like(z), axis), tf.zeros_like(z)
    return tf.reduce_sum(_sum(losses), axis), _sum(grads)


def sigmoid(x: tf.Tensor, labels: Labels, terms: Terms) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) of each element as what its label is, or as both by their shares, and its gradient.

    What is of negative and positive lies along a first axis, (2, N).
    """
    q, (Δ, w, a, b, γ, s, o, ε) = labels.q, terms
    x, lost = adjusted(x, o)
    if q is None:
        share, positive = weights(labels, w, None, x.dtype), labels.y == 1
        sign = tf.where(positive, constant(1, x.dtype), constant(-1, x.dtype))
        Δ = None if Δ is None else tf.where(positive, Δ[1], Δ[0])
    else:
        share = shares((1 - ε) * q + ε / 2 * (q[0] + q[1]), w, None)
        sign = tf.reshape(tf.constant([-1.0, 1.0], x.dtype), [2] + [1] * len(x.shape))
    ω, lost = sign * x, None if lost is None else sign * lost

    losses, slopes = [], []
    if a is not None:
        loss, slope = ldam(log_odds(ω, 0.0, tf.ones_like(ω), s, Δ, lost), s)
        losses.append(times(share * a, loss))
        slopes.append(share * a * slope)
    if b is not None:
        loss, slope = focal(ω, γ)
        losses.append(times(share * b, loss))
        slopes.append(share * b * slope)
    if not losses:
        return tf.zeros_like(x), tf.zeros_like(x)
    loss, grad = _sum(losses), sign * _sum(slopes)
    return (loss, grad) if q is None else (tf.reduce_sum(loss, 0), tf.reduce_sum(grad, 0))


def weights(labels: Labels, w: tf.Tensor | None, axis: int | None, dtype: tf.DType) -> tf.Tensor:
    """Each example's class weight W (N,): 0 for a masked one, NaN for an unknown label."""
    y, masked, q = labels
    if q is not None and axis is None:  # which XLA does not add up in an array of its own
        return q[0] + q[1] if w is None else q[0] * w[0] + q[1] * w[1]
    if q is not None:
        return tf.reduce_sum(shares(q, w, axis), axis)
    if w is None:
        W = tf.ones_like(y, dtype)
    elif axis is None:
        W = tf.where(y == 1, w[1], w[0])
    else:
        W = tf.gather(w, tf.maximum(y, 0))
    W = W / one_or_nan(y >= 0, dtype)
    return W if masked is None else tf.where(masked, constant(0, dtype), W)


def shares(q: tf.Tensor, w: tf.Tensor | None, axis: int | None) -> tf.Tensor:
    """What every class counts for, q w (N, C), in the sigmoid form (2, N)."""
    return q if w is None else q * by_class(w, len(q.shape), axis)


def sums_of_others(
    e: tf.Tensor, e_others: tf.Tensor, is_top: tf.Tensor, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Σ_{k≠j} of the exponentials for every j (N, C), and the largest class's by itself (N, 1)."""
    S_others = at_least_1(tf.reduce_sum(e_others, axis, keepdims=True))
    return tf.where(is_top, S_others, tf.reduce_sum(e, axis, keepdims=True) - e), S_others


def chain(
    G: tf.Tensor, e: tf.Tensor, S: tf.Tensor, r_top: tf.Tensor, is_top: tf.Tensor, axis: int
) -> tf.Tensor:
    """Gradient (N, C) for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = tf.where(is_top, constant(0, G.dtype), G / S)
    G_top = tf.reduce_sum(tf.where(is_top, G, 0.0), axis, keepdims=True)
    return G - e * (tf.reduce_sum(t, axis, keepdims=True) - t) - r_top * G_top


def log_odds(
    z: tf.Tensor,
    M: tf.Tensor | float,
    S: tf.Tensor,
    s: float = 1.0,
    Δ: tf.Tensor | float = 0.0,
    lost: tf.Tensor | None = None,
) -> tf.Tensor:
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back.

    ``lost`` is one of z already.
    """
    d, of_M = difference(z, M)
    h, of_Δ = difference(d, Δ)
    errors = of_M + of_Δ if lost is None else of_M + of_Δ + lost
    return s * h + (s * errors - tf.math.log(S))


def difference(a: tf.Tensor, b: tf.Tensor | float) -> tuple[tf.Tensor, tf.Tensor]:
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    lost = tf.where(tf.math.is_finite(lost), lost, constant(0, lost.dtype))
    return c, tf.stop_gradient(lost)


def adjusted(z: tf.Tensor, o: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor | None]:
    """z + o, rounded, and what the rounding lost; z itself without an adjustment."""
    return (z, None) if o is None else difference(z, -o)


def ldam(τ: tf.Tensor, s: float) -> tuple[tf.Tensor, tf.Tensor]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    ahead, root, u, log = tail(τ)
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    root = tf.where(ahead, root, 1.0)
    return tf.where(ahead, log, log - τ), -(s * root) * root / (1 + u)


def focal(ω: tf.Tensor, γ: float) -> tuple[tf.Tensor, tf.Tensor]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    ahead, _, u, log = tail(ω)
    ce, modulation = tf.where(ahead, log, log - ω), tf.exp(-γ * tf.where(ahead, log + ω, log))
    finite_ce = tf.where(ce > LARGE, constant(LARGE, ce.dtype), ce)
    p, miss = tf.where(ahead, constant(1, u.dtype), u), tf.where(ahead, u, 1.0)
    return modulation * ce, -modulation * (γ * p * finite_ce + miss) / (1 + u)


def tail(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Whether x > 0, e^{-|x|/2}, its square u, log(1 + u): of them are sigmoid and softplus made.

    ``where`` takes one side at 0 throughout, so that the derivatives there are right.
    """
    ahead = x > 0
    root = tf.exp(tf.where(ahead, -x, x) / 2)
    u = root * root
    return ahead, root, u, tf.math.log1p(u)


def times(coefficient: tf.Tensor, term: tf.Tensor) -> tf.Tensor:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & tf.math.is_inf(term)
    return tf.where(nothing, constant(0, term.dtype), coefficient * term)


# Beyond every log-odds that matters, and small enough for products with it to stay finite; it is
# what -inf would be, which sets off TensorFlow's alarms.
LARGE = 1e18


# --- TensorFlow's own: short rows that XLA makes fast, NaN that sets off no alarm where all is well


def is_class(y: tf.Tensor, C: Any, axis: int) -> tf.Tensor:
    """Boolean one-hot (N, C) of the class indices along the class axis."""
    return tf.one_hot(y, C, on_value=True, off_value=False, axis=axis, dtype=tf.bool)


def by_class(vector: tf.Tensor, ndim: int, axis: int | None) -> tf.Tensor:
    """(C,) along the class axis of ``ndim``; the sigmoid form's (2, …) lies as it should."""
    return vector if axis is None else tf.reshape(vector, [-1] + [1] * (ndim - 1 - axis))


def _at_label(z: tf.Tensor, y: tf.Tensor, axis: int) -> tf.Tensor:
    """The labelled class's entry (N,) of each row."""
    if axis == len(z.shape) - 1:
        return tf.gather(z, y, batch_dims=axis)
    return tf.reduce_sum(tf.where(is_class(y, tf.shape(z)[axis], axis), z, 0.0), axis)


def below(M: tf.Tensor) -> tf.Tensor:
    """A little less than the largest of adjusted logits, which was rounded: without rounding it is
    above, so that its exponential is 1 or more."""
    return M - tf.abs(M) * np.finfo(M.dtype.as_numpy_dtype).eps


def above(z: tf.Tensor, M: tf.Tensor, lost: tf.Tensor | None) -> tf.Tensor:
    """z - M, with what z has lost: M is about as large as z, the difference need not be."""
    return z - M if lost is None else (z - M) + lost


def _max_of_others(z: tf.Tensor, is_y: tf.Tensor, axis: int) -> tf.Tensor:
    """M (N,), the largest logit beside the labelled one, -LARGE if no other class is possible."""
    z, nothing = tf.stop_gradient(z), constant(-LARGE, z.dtype)
    if not _few(z, axis):
        return tf.reduce_max(tf.where(is_y, nothing, z), axis)
    integers = tf.int64 if z.dtype == tf.float64 else tf.int32

    def flipped(bits: tf.Tensor) -> tf.Tensor:  # floats, as integers, in the order of integers
        return tf.where(bits < 0, bits ^ integers.max, bits)

    bits = tf.where(is_y, flipped(tf.bitcast(nothing, integers)), flipped(tf.bitcast(z, integers)))
    return tf.bitcast(flipped(tf.reduce_max(bits, axis)), z.dtype)


def _total(e: tf.Tensor, axis: int) -> tf.Tensor:
    """The sum (N,) over the classes."""
    return tf.add_n(tf.unstack(e, axis=axis)) if _few(e, axis) else tf.reduce_sum(e, axis)


def _few(z: tf.Tensor, axis: int) -> bool:
    """Whether rows are short and in a graph.

    XLA hands sums and maxima of floats to a library on CPUs, which takes several times as long for
    short rows as XLA's own loops do. A chain of additions and a maximum of integers it keeps.
    """
    C = z.shape[axis]
    return C is not None and 0 < C <= 8 and not tf.executing_eagerly()


def at_least_1(S: tf.Tensor) -> tf.Tensor:
    """A sum of exponentials, 1 or more unless no other class is possible; or a number of examples.

    ``maximum`` need not keep NaN in TensorFlow.
    """
    return tf.where(S < 1, constant(1, S.dtype), S)


def constant(value: float, dtype: tf.DType) -> tf.Tensor:
    """A number () of a dtype."""
    return tf.constant(float(value), dtype)


def one_or_nan(holds: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """1, or NaN where something does not hold: a constant would set off alarms where all does."""
    one = tf.cast(holds, dtype)
    return one / one


def _sum(terms: list[tf.Tensor]) -> tf.Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
