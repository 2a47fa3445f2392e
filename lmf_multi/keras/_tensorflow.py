"""The steps of ``lmf_multi.reference`` in TensorFlow; what is said here is only what differs.

The gradient's closed form is computed together with the value, as a ``custom_gradient``. Eager,
``tf.function`` and XLA; sizes may be unknown while a graph is traced.
"""

from typing import Any

import tensorflow as tf

from lmf_multi.keras._tensorflow_cpu import by_kernel, has_kernel_for
from lmf_multi.spec import (
    PROBABILITY_SLACK,
    Reduction,
    check_inputs,
    check_label_range,
    check_parameters,
    check_probability_range,
    check_sigmoid_inputs,
    check_vectors,
)


def compute_loss(
    z: tf.Tensor,
    y: tf.Tensor,
    margins: Any,
    class_weight: Any,
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    label_smoothing: float,
    *,
    axis: int,
    where: tf.Tensor | None,
    mask_name: str,
    reduction: Reduction,
) -> tf.Tensor:
    """What each example contributes to the reduced loss; ``reduction`` is their sum."""
    check_parameters(
        alpha=alpha, beta=beta, gamma=gamma, scale=scale, label_smoothing=label_smoothing
    )
    check_vectors(margins=_on_host(margins), class_weight=_on_host(class_weight))
    dtype = tf.float64 if z.dtype == tf.float64 else tf.float32
    Δ = None if margins is None else tf.cast(margins, dtype)
    w = None if class_weight is None else tf.cast(class_weight, dtype)
    soft = check_inputs(
        (tuple(z.shape), z.dtype),
        (tuple(y.shape), y.dtype),
        axis,
        {
            "margins": None if Δ is None else tuple(Δ.shape),
            "class_weight": None if w is None else tuple(w.shape),
        },
        None if where is None else (tuple(where.shape), where.dtype),
    )

    axis = axis % len(z.shape)
    z = _of_classes(z, axis, [v.shape[0] for v in (Δ, w) if v is not None])
    y = _agreeing("labels", y, z, None if soft else axis)
    where = None if where is None else _agreeing("where", where, z, axis)
    shape = _sizes(z)
    C = shape.pop(axis)
    if axis == len(shape):  # all examples along one axis: XLA's loops over several are slower
        z, y = tf.reshape(z, [-1, C]), tf.reshape(y, [-1, C] if soft else [-1])
        where, axis = None if where is None else tf.reshape(where, [-1]), 1
    by_class = [-1] + [1] * (len(z.shape) - 1 - axis)
    masked = None if where is None else ~where
    if soft:
        presence = tf.ones_like(tf.reduce_sum(y, axis), dtype)
        presence = presence if where is None else tf.cast(where, dtype)
        present = tf.expand_dims(presence, axis)
        q = tf.where(present != 0, tf.cast(y, dtype), 0.0)
        W = tf.reduce_sum(q if w is None else q * tf.reshape(w, by_class), axis)
    else:
        y = _targets(y, C, where, mask_name)
        presence = _weights(y, masked, None, dtype)
        W = presence if w is None else _weights(y, masked, w, dtype)
    by_weight, by_examples = _normalizers(W, where, reduction)

    if not soft and label_smoothing == 0:
        a = None if alpha == 0 else alpha / by_weight
        b = None if beta == 0 else beta / by_examples
        return tf.reshape(_mixture(z, y, masked, Δ, w, a, b, gamma, scale, axis), shape)

    if not soft:
        present = tf.expand_dims(presence, axis)
        q = tf.where(_is_class(y, C, axis), present, 0.0)
    q = (1 - label_smoothing) * q + label_smoothing / tf.cast(C, dtype) * present
    share = q if w is None else q * tf.reshape(w, by_class)
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    z, Δ = tf.where(present != 0, z, 0.0), None if Δ is None else tf.reshape(Δ, by_class)
    return tf.reshape(_mixture(z, None, None, Δ, None, a, b, gamma, scale, axis), shape)


def compute_sigmoid_loss(
    x: tf.Tensor,
    t: tf.Tensor,
    margins: Any,
    class_weight: Any,
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    label_smoothing: float,
    *,
    axis: int,
    where: tf.Tensor | None,
    mask_name: str,
    reduction: Reduction,
) -> tf.Tensor:
    """What each element contributes to the reduced loss, as ``compute_loss``."""
    check_parameters(
        alpha=alpha, beta=beta, gamma=gamma, scale=scale, label_smoothing=label_smoothing
    )
    check_vectors(margins=_on_host(margins), class_weight=_on_host(class_weight))
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32
    Δ = None if margins is None else tf.cast(margins, dtype)
    w = None if class_weight is None else tf.cast(class_weight, dtype)
    soft = check_sigmoid_inputs(
        (tuple(x.shape), x.dtype),
        (tuple(t.shape), t.dtype),
        axis,
        {
            "margins": None if Δ is None else tuple(Δ.shape),
            "class_weight": None if w is None else tuple(w.shape),
        },
        None if where is None else (tuple(where.shape), where.dtype),
    )

    x = _of_classes(x, axis, [v.shape[0] for v in (Δ, w) if v is not None and len(v.shape) == 2])
    t = _agreeing("labels", t, x)
    where = None if where is None else _agreeing("where", where, x)
    Δ, w = (None if v is None else _by_label(v, len(x.shape), axis) for v in (Δ, w))
    t, presence = _sigmoid_targets(t, where, mask_name, dtype)
    W = presence if w is None else presence * ((1 - t) * w[0] + t * w[1])
    by_weight, by_examples = _normalizers(W, where, reduction)
    x = x if where is None else tf.where(where, x, tf.zeros_like(x))

    if not soft and label_smoothing == 0:
        positive = t == 1
        a = None if alpha == 0 else W * (alpha / by_weight)
        b = None if beta == 0 else W * (beta / by_examples)
        Δ = None if Δ is None else tf.where(positive, Δ[1], Δ[0])
        return _mixture(x, positive, None, Δ, None, a, b, gamma, scale, None)

    q = ((1 - label_smoothing) * tf.stack([1 - t, t]) + label_smoothing / 2) * presence
    share = q if w is None else q * w
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    return _mixture(x, None, None, Δ, None, a, b, gamma, scale, None)


def _on_host(vector: Any) -> Any:
    """A CPU's eager tensor as NumPy's, whose numbers can be checked."""
    readable = isinstance(vector, tf.Tensor) and hasattr(vector, "numpy")
    return vector.numpy() if readable and "CPU" in vector.device else vector


def squeeze(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Without an axis of 1, told when a graph runs if that is not known; Keras' refuses that."""
    return tf.squeeze(x, [axis])


def sparse_or_soft(y: tf.Tensor, z: tf.Tensor, axis: int) -> tf.Tensor:
    """Distributions for labels of the logits' rank, of which no one knows yet if they are sparse.

    By broadcasting, because XLA compiles both branches of a condition, of which one cannot be.
    """
    dtype = tf.float64 if y.dtype == tf.float64 else tf.float32
    sizes = [1] * len(z.shape)
    sizes[axis] = tf.shape(z)[axis]
    is_sparse, y = tf.shape(y)[axis] == 1, tf.cast(y, dtype)
    is_y = y == tf.cast(tf.reshape(tf.range(sizes[axis]), sizes), dtype)
    is_label = tf.reduce_any(is_y, axis, keepdims=True) | ~is_sparse
    return tf.where(is_sparse, tf.cast(is_y, dtype), y) / _one_or_nan(is_label, dtype)


def _of_classes(z: tf.Tensor, axis: int, counts: list[int | None]) -> tf.Tensor:
    """The logits, with the number of classes that the vectors tell where a trace does not."""
    if not counts or z.shape[axis] is not None:
        return z
    sizes = z.shape.as_list()
    sizes[axis] = counts[0]
    return tf.ensure_shape(z, sizes)


def _agreeing(name: str, x: tf.Tensor, z: tf.Tensor, without: int | None = None) -> tf.Tensor:
    """``x``, of the logits' shape without an axis: if tracing cannot tell, told when a graph runs.

    An assertion has the words; XLA leaves it out, but not a shape that cannot be.
    """
    static = [n for i, n in enumerate(z.shape) if i != without]
    if None not in (*static, *x.shape):
        return x  # the checks have seen them
    expected = tf.stack([n for i, n in enumerate(_sizes(z)) if i != without])
    agrees = tf.reduce_all(tf.shape(x) == expected)
    rule = f"{name} must have shape"
    said = tf.raw_ops.Assert(condition=agrees, data=[rule, expected, "got", tf.shape(x)])
    with tf.control_dependencies([said]), tf.name_scope(rule.replace(" ", "_")):
        x, shape = tf.reshape(x, tf.where(agrees, expected, -2)), x.shape
    x.set_shape(shape.merge_with(static))
    return x


def _by_label(vector: tf.Tensor, ndim: int, axis: int) -> tf.Tensor:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if len(vector.shape) == 1:
        return tf.reshape(vector, [2] + [1] * ndim)
    sizes = [-1 if i == axis % ndim else 1 for i in range(ndim)]
    return tf.reshape(tf.transpose(vector), [2, *sizes])


def _sigmoid_targets(
    t: tf.Tensor, where: tf.Tensor | None, mask_name: str, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """Probabilities; each element's presence, 1, 0 for a masked one, NaN out of range."""
    t = tf.cast(t, dtype)
    t = t if where is None else tf.where(where, t, 0.0)
    presence = tf.ones_like(t) if where is None else tf.cast(where, dtype)
    if tf.executing_eagerly() and tf.size(t) > 0:
        smallest, largest = float(tf.reduce_min(t)), float(tf.reduce_max(t))
        check_probability_range(smallest, largest, mask_name)
    inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
    return t, presence / _one_or_nan(inside, dtype)


def _is_class(y: tf.Tensor, C: Any, axis: int) -> tf.Tensor:
    """Boolean one-hot of the class indices along the class axis."""
    return tf.one_hot(y, C, on_value=True, off_value=False, axis=axis, dtype=tf.bool)


def _targets(y: tf.Tensor, C: Any, where: tf.Tensor | None, mask_name: str) -> tf.Tensor:
    """Class indices, 0 for a masked example, -1 for one out of range."""
    y = y if y.dtype == tf.int32 else tf.cast(y, tf.int64)
    y, C = y if where is None else tf.where(where, y, 0), tf.cast(C, y.dtype)
    if tf.executing_eagerly() and tf.size(y) > 0:
        smallest, largest = tf.reduce_min(y), tf.reduce_max(y)
        check_label_range(int(smallest), int(largest), int(C), mask_name)
    return tf.cast(tf.where((y >= 0) & (y < C), y, -1), tf.int32)


def _weights(
    y: tf.Tensor, masked: tf.Tensor | None, w: tf.Tensor | None, dtype: tf.DType
) -> tf.Tensor:
    """Each example's class weight: 0 for a masked one, NaN for an unknown label."""
    W = tf.ones_like(y, dtype) if w is None else tf.gather(w, tf.maximum(y, 0))
    W = W / _one_or_nan(y >= 0, dtype)
    return W if masked is None else tf.where(masked, _constant(0, dtype), W)


def _normalizers(
    W: tf.Tensor, where: tf.Tensor | None, reduction: Reduction
) -> tuple[tf.Tensor | float, tf.Tensor | float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    N = tf.size(W) if where is None else tf.math.count_nonzero(where)
    total, N = over_replicas([tf.reduce_sum(W), tf.cast(N, W.dtype)])
    N = _at_least(N, 1)
    if reduction == "batch_mean":
        return N, N
    return tf.where(total == 0, tf.ones_like(total), total), N


def over_replicas(totals: list[tf.Tensor]) -> list[tf.Tensor]:
    """Totals of the whole batch where a ``tf.distribute`` strategy has split it."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return totals
    both: list[tf.Tensor] = replica.all_reduce(tf.distribute.ReduceOp.SUM, totals)
    return both


def of_whole_batch(total: tf.Tensor) -> tf.Tensor:
    """A replica's share of the sum over all, with the gradient of its own part.

    Keras weights the values of replicas by their examples and multiplies them by their number: of
    equal shares it makes the sum, whatever the sizes.
    """
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return total
    (everything,) = over_replicas([tf.stop_gradient(total)])
    share = everything / replica.num_replicas_in_sync

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def shared(total: tf.Tensor) -> Any:
        return tf.identity(share), lambda upstream: upstream

    return shared(total)


def _mixture(
    z: tf.Tensor,
    y: tf.Tensor | None,
    masked: tf.Tensor | None,
    Δ: tf.Tensor | None,
    w: tf.Tensor | None,
    a: Any,
    b: Any,
    γ: float,
    s: float,
    axis: int | None,
) -> tf.Tensor:
    """w_y (a LDAM_y + b Focal_y) of each example, of vectors Δ and w and numbers a and b.

    ``masked`` tells the examples that do not count, if some do not; -1 is an unknown label. With
    ``y=None`` it is the sum over the classes, with a and b of the logits' shape, and Δ for each
    class. Without a class axis it is the sigmoid form: y tells the positive elements, of which a,
    b and Δ are, and with ``y=None`` those hold negative and positive along a first axis.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def closed_form(z: tf.Tensor) -> Any:
        loss, grad = _value_and_grad(z, y, masked, Δ, w, a, b, γ, s, axis)

        def pull(upstream: tf.Tensor) -> tf.Tensor:
            upstream = upstream if axis is None else tf.expand_dims(upstream, axis)
            return tf.cast(upstream * grad, z.dtype)

        return loss, pull

    return closed_form(z)


def _value_and_grad(
    z: tf.Tensor,
    y: tf.Tensor | None,
    masked: tf.Tensor | None,
    Δ: tf.Tensor | None,
    w: tf.Tensor | None,
    a: Any,
    b: Any,
    γ: float,
    s: float,
    axis: int | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    if axis is not None and y is not None:

        def operations(z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return _one_class(_widened(z), y, masked, Δ, w, a, b, γ, s, axis)

        if has_kernel_for(z, axis):
            return by_kernel(operations, z, y, masked, Δ, w, a, b, γ, s, axis)
        return operations(z)
    z = _widened(z)
    if axis is None:
        return _sigmoid(z, y, Δ, a, b, γ, s)
    return _all_classes(z, Δ, a, b, γ, s, axis)


def _widened(z: tf.Tensor) -> tf.Tensor:
    return z if z.dtype == tf.float64 else tf.cast(z, tf.float32)


def _one_class(
    z: tf.Tensor,
    y: tf.Tensor,
    masked: tf.Tensor | None,
    Δ: tf.Tensor | None,
    w: tf.Tensor | None,
    a: Any,
    b: Any,
    γ: float,
    s: float,
    axis: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of the labelled class alone, and its gradient."""
    W, y = _weights(y, masked, w, z.dtype), tf.maximum(y, 0)
    is_y, z_y = _is_class(y, tf.shape(z)[axis], axis), _at_class(z, y, axis)
    M, left_out = _max_of_others(z, is_y, axis), is_y
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y, M = (tf.where(masked, _constant(0, z.dtype), v) for v in (z_y, M))
        left_out = is_y | tf.expand_dims(masked, axis)
    x = tf.where(left_out, _constant(-_LARGE, z.dtype), z - tf.expand_dims(M, axis))

    losses, slopes, grads = [], [], []
    if a is not None and Δ is not None:
        e = tf.exp(s * x)
        S = _at_least(_total(e, axis), 1)  # 1 or more unless no other class is possible
        ldam, slope = _ldam(_log_odds(z_y, M, S, s, tf.gather(Δ, y)), s)
        losses.append(_times(W * a, ldam))
        slopes.append(W * a * slope)
        grads.append(e * tf.expand_dims(-slopes[-1] / S, axis))
    if b is not None:
        e = tf.exp(x)
        S = _at_least(_total(e, axis), 1)
        focal, slope = _focal(_log_odds(z_y, M, S), γ)
        losses.append(_times(W * b, focal))
        slopes.append(W * b * slope)
        grads.append(e * tf.expand_dims(-slopes[-1] / S, axis))
    if not losses:
        return tf.zeros_like(z_y), tf.zeros_like(z)
    return _sum(losses), tf.where(is_y, tf.expand_dims(_sum(slopes), axis), _sum(grads))


def _at_class(z: tf.Tensor, y: tf.Tensor, axis: int) -> tf.Tensor:
    """The labelled class's entry of each row."""
    if axis == len(z.shape) - 1:
        return tf.gather(z, y, batch_dims=axis)
    return tf.reduce_sum(tf.where(_is_class(y, tf.shape(z)[axis], axis), z, 0.0), axis)


def _max_of_others(z: tf.Tensor, is_y: tf.Tensor, axis: int) -> tf.Tensor:
    """The largest logit beside the labelled one, -_LARGE if no other class is possible."""
    z, nothing = tf.stop_gradient(z), _constant(-_LARGE, z.dtype)
    if not _few(z, axis):
        return tf.reduce_max(tf.where(is_y, nothing, z), axis)
    integers = tf.int64 if z.dtype == tf.float64 else tf.int32

    def flipped(bits: tf.Tensor) -> tf.Tensor:  # floats, as integers, in the order of integers
        return tf.where(bits < 0, bits ^ integers.max, bits)

    bits = tf.where(is_y, flipped(tf.bitcast(nothing, integers)), flipped(tf.bitcast(z, integers)))
    return tf.bitcast(flipped(tf.reduce_max(bits, axis)), z.dtype)


def _total(e: tf.Tensor, axis: int) -> tf.Tensor:
    """The sum over the classes."""
    return tf.add_n(tf.unstack(e, axis=axis)) if _few(e, axis) else tf.reduce_sum(e, axis)


def _few(z: tf.Tensor, axis: int) -> bool:
    """Whether rows are short and in a graph.

    XLA hands sums and maxima of floats to a library on CPUs, which takes several times as long for
    short rows as XLA's own loops do. A chain of additions and a maximum of integers it keeps.
    """
    C = z.shape[axis]
    return C is not None and 0 < C <= 8 and not tf.executing_eagerly()


def _all_classes(
    z: tf.Tensor,
    Δ: tf.Tensor | None,
    a: tf.Tensor | None,
    b: tf.Tensor | None,
    γ: float,
    s: float,
    axis: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of every class, summed, and its gradient.

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    top = tf.argmax(tf.stop_gradient(z), axis)
    is_top = _is_class(top, tf.shape(z)[axis], axis)
    nothing = _constant(-_LARGE, z.dtype)
    M = tf.reduce_max(tf.stop_gradient(z), axis, keepdims=True)
    others = tf.where(is_top, nothing, tf.stop_gradient(z))
    M_others = tf.reduce_max(others, axis, keepdims=True)
    x, x_others = z - M, tf.where(is_top, nothing, z - M_others)
    M_j = tf.where(is_top, M_others, M)

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = tf.exp(s * x), tf.exp(s * x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        ldam, slope = _ldam(_log_odds(z, M_j, S, s, Δ), s)
        losses.append(_times(a, ldam))
        grads.append(_chain(a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = tf.exp(x), tf.exp(x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        focal, slope = _focal(_log_odds(z, M_j, S), γ)
        losses.append(_times(b, focal))
        grads.append(_chain(b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return tf.reduce_sum(tf.zeros_like(z), axis), tf.zeros_like(z)
    return tf.reduce_sum(_sum(losses), axis), _sum(grads)


def _sigmoid(
    x: tf.Tensor,
    positive: tf.Tensor | None,
    Δ: tf.Tensor | None,
    a: tf.Tensor | None,
    b: tf.Tensor | None,
    γ: float,
    s: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of each element as a positive or a negative, or of both summed, and its gradient."""
    if positive is None:
        sign = tf.reshape(tf.constant([-1.0, 1.0], x.dtype), [2] + [1] * len(x.shape))
    else:
        sign = tf.where(positive, _constant(1, x.dtype), _constant(-1, x.dtype))
    ω = sign * x

    losses, slopes = [], []
    if a is not None and Δ is not None:
        ldam, slope = _ldam(_log_odds(ω, 0.0, tf.ones_like(ω), s, Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
    if b is not None:
        focal, slope = _focal(ω, γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
    if not losses:
        return tf.zeros_like(x), tf.zeros_like(x)
    loss, grad = _sum(losses), sign * _sum(slopes)
    if positive is None:
        loss, grad = tf.reduce_sum(loss, 0), tf.reduce_sum(grad, 0)
    return loss, grad


def _sums_of_others(
    e: tf.Tensor, e_others: tf.Tensor, is_top: tf.Tensor, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = _at_least(tf.reduce_sum(e_others, axis, keepdims=True), 1)
    return tf.where(is_top, S_others, tf.reduce_sum(e, axis, keepdims=True) - e), S_others


def _chain(
    G: tf.Tensor, e: tf.Tensor, S: tf.Tensor, r_top: tf.Tensor, is_top: tf.Tensor, axis: int
) -> tf.Tensor:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = tf.where(is_top, _constant(0, G.dtype), G / S)
    G_top = tf.reduce_sum(tf.where(is_top, G, 0.0), axis, keepdims=True)
    return G - e * (tf.reduce_sum(t, axis, keepdims=True) - t) - r_top * G_top


def _log_odds(
    z: tf.Tensor, M: tf.Tensor | float, S: tf.Tensor, s: float = 1.0, Δ: tf.Tensor | float = 0.0
) -> tf.Tensor:
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back."""
    d, lost = _difference(z, M)
    h, also_lost = _difference(d, Δ)
    return s * h + (s * (lost + also_lost) - tf.math.log(S))


def _difference(a: tf.Tensor, b: tf.Tensor | float) -> tuple[tf.Tensor, tf.Tensor]:
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    lost = tf.where(tf.math.is_finite(lost), lost, _constant(0, lost.dtype))
    return c, tf.stop_gradient(lost)


def _ldam(τ: tf.Tensor, s: float) -> tuple[tf.Tensor, tf.Tensor]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    ahead, root, u, log = _tail(τ)
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    root = tf.where(ahead, root, 1.0)
    return tf.where(ahead, log, log - τ), -(s * root) * root / (1 + u)


def _focal(ω: tf.Tensor, γ: float) -> tuple[tf.Tensor, tf.Tensor]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    ahead, _, u, log = _tail(ω)
    ce, modulation = tf.where(ahead, log, log - ω), tf.exp(-γ * tf.where(ahead, log + ω, log))
    finite_ce = tf.where(ce > _LARGE, _constant(_LARGE, ce.dtype), ce)
    p, miss = tf.where(ahead, _constant(1, u.dtype), u), tf.where(ahead, u, 1.0)
    return modulation * ce, -modulation * (γ * p * finite_ce + miss) / (1 + u)


def _tail(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Whether x > 0, e^{-|x|/2}, its square u, log(1 + u): of them are sigmoid and softplus made.

    ``where`` takes one side at 0 throughout, so that the derivatives there are right.
    """
    ahead = x > 0
    root = tf.exp(tf.where(ahead, -x, x) / 2)
    u = root * root
    return ahead, root, u, tf.math.log1p(u)


# Beyond every log-odds that matters, and small enough for products with it to stay finite; it is
# what -inf would be, which sets off TensorFlow's alarms.
_LARGE = 1e18


def _times(coefficient: tf.Tensor, term: tf.Tensor) -> tf.Tensor:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & tf.math.is_inf(term)
    return tf.where(nothing, _constant(0, term.dtype), coefficient * term)


def _sizes(x: tf.Tensor) -> list[Any]:
    """The shape, in numbers where they are known."""
    return [tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape)]


def _sum(terms: list[tf.Tensor]) -> tf.Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _constant(value: Any, dtype: tf.DType) -> tf.Tensor:
    return tf.constant(float(value), dtype)


def _one_or_nan(holds: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """1, or NaN where something does not hold: a constant would set off alarms where all does."""
    one = tf.cast(holds, dtype)
    return one / one


def _at_least(x: tf.Tensor, bound: float) -> tf.Tensor:
    """``maximum``, which need not keep NaN in TensorFlow."""
    return tf.where(x < bound, _constant(bound, x.dtype), x)
