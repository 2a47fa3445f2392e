"""Labels, masks and vectors as the arithmetic takes them, in TensorFlow."""

from typing import Any

import tensorflow as tf

from lmf_multi._terms import Labels, Vectors
from lmf_multi.keras._tensorflow._closed_form import at_least_1, is_class, one_or_nan, weights
from lmf_multi.keras._tensorflow._replicas import over_replicas
from lmf_multi.spec import (
    PROBABILITY_SLACK,
    Reduction,
    check_label_range,
    check_probability_range,
    check_vectors,
)


def soft_targets(y: tf.Tensor, where: tf.Tensor | None, axis: int, dtype: tf.DType) -> Labels:
    """Distributions (N, C) before smoothing, rows of 0 for masked examples."""
    q = tf.cast(y, dtype)
    if where is None:
        return Labels(q=q)
    return Labels(q=tf.where(tf.expand_dims(where, axis), q, 0.0), masked=~where)


def targets(y: tf.Tensor, where: tf.Tensor | None, C: Any, mask_name: str) -> Labels:
    """Class indices (N,), 0 for a masked example, -1 for one out of range."""
    y = y if y.dtype == tf.int32 else tf.cast(y, tf.int64)
    y, C = y if where is None else tf.where(where, y, 0), tf.cast(C, y.dtype)
    if tf.executing_eagerly() and tf.size(y) > 0:
        smallest, largest = tf.reduce_min(y), tf.reduce_max(y)
        check_label_range(int(smallest), int(largest), int(C), mask_name)
    y = tf.cast(tf.where((y >= 0) & (y < C), y, -1), tf.int32)
    return Labels(y, None if where is None else ~where)


def sigmoid_targets(
    t: tf.Tensor, where: tf.Tensor | None, hard: bool, dtype: tf.DType, mask_name: str
) -> Labels:
    """Classes 0.0 and 1.0 (N,), -1.0 out of range, or distributions (2, N) before smoothing.

    Those are NaN for a probability out of range; masked elements are 0 in both.
    """
    t = tf.cast(t, dtype)
    t, masked = (t, None) if where is None else (tf.where(where, t, 0.0), ~where)
    if tf.executing_eagerly() and tf.size(t) > 0:
        smallest, largest = float(tf.reduce_min(t)), float(tf.reduce_max(t))
        check_probability_range(smallest, largest, mask_name)
    inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
    if hard:
        return Labels(tf.where(inside, t, -1.0), masked)
    t /= one_or_nan(inside, dtype)
    negative = 1 - t if where is None else tf.where(where, 1 - t, 0.0)
    return Labels(q=tf.stack([negative, t]), masked=masked)


def by_label(vector: tf.Tensor, ndim: int, axis: int) -> tf.Tensor:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if len(vector.shape) == 1:
        return tf.reshape(vector, [2] + [1] * ndim)
    return along(tf.transpose(vector), ndim, axis)


def along(vector: tf.Tensor, ndim: int, axis: int) -> tf.Tensor:
    """(…, L), or () for one of all labels, with L along the axis of the logits."""
    size = -1 if len(vector.shape) else 1
    shape = [size if i == axis % ndim else 1 for i in range(ndim)]
    return tf.reshape(vector, [*vector.shape[:-1], *shape])


def normalizers(
    W: tf.Tensor, where: tf.Tensor | None, reduction: Reduction
) -> tuple[tf.Tensor | float, tf.Tensor | float]:
    """What the sums over LDAM and over focal are divided by, () each; W and where are (N,)."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    N = tf.size(W) if where is None else tf.math.count_nonzero(where)
    total, N = over_replicas([tf.reduce_sum(W), tf.cast(N, W.dtype)])
    N = at_least_1(N)
    if reduction == "batch_mean":
        return N, N
    return tf.where(total == 0, tf.ones_like(total), total), N


def smoothed(labels: Labels, ε: float, C: Any, axis: int, dtype: tf.DType) -> Labels:
    """As distributions (N, C), after smoothing: NaN of an unknown label, 0 of a masked example."""
    y, masked, q = labels
    if q is None:
        present = tf.expand_dims(weights(labels, None, axis, dtype), axis)
        q = tf.where(is_class(y, C, axis), present, 0.0)
    else:
        present = 1.0 if masked is None else tf.expand_dims(tf.cast(~masked, dtype), axis)
    return Labels(q=(1 - ε) * q + ε / tf.cast(C, dtype) * present)


def constants(vectors: Vectors, dtype: tf.DType) -> Vectors:
    """Checked vectors, their numbers too where they can be read; shapes stay."""
    check_vectors(**{name: _on_host(vector) for name, vector in vectors._asdict().items()})
    return Vectors(*(None if vector is None else tf.cast(vector, dtype) for vector in vectors))


def _on_host(vector: Any) -> Any:
    """A CPU's eager tensor as NumPy's, whose numbers can be checked."""
    readable = isinstance(vector, tf.Tensor) and hasattr(vector, "numpy")
    return vector.numpy() if readable and "CPU" in vector.device else vector


def of_classes(z: tf.Tensor, axis: int, counts: list[int | None]) -> tf.Tensor:
    """The logits (N, C), with the C that the vectors tell where a trace does not."""
    if not counts or z.shape[axis] is not None:
        return z
    shape = z.shape.as_list()
    shape[axis] = counts[0]
    return tf.ensure_shape(z, shape)


def agreeing(name: str, x: tf.Tensor, z: tf.Tensor, without: int | None = None) -> tf.Tensor:
    """``x``, of the logits' shape without an axis: if tracing cannot tell, told when a graph runs.

    An assertion has the words; XLA leaves it out, but not a shape that cannot be.
    """
    static = [n for i, n in enumerate(z.shape) if i != without]
    if None not in (*static, *x.shape):
        return x  # the checks have seen them
    expected = tf.stack([n for i, n in enumerate(sizes(z)) if i != without])
    agrees = tf.reduce_all(tf.shape(x) == expected)
    rule = f"{name} must have shape"
    said = tf.raw_ops.Assert(condition=agrees, data=[rule, expected, "got", tf.shape(x)])
    with tf.control_dependencies([said]), tf.name_scope(rule.replace(" ", "_")):
        x, shape = tf.reshape(x, tf.where(agrees, expected, -2)), x.shape
    x.set_shape(shape.merge_with(static))
    return x


def sizes(x: tf.Tensor) -> list[Any]:
    """The shape, in numbers where they are known."""
    return [tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape)]
