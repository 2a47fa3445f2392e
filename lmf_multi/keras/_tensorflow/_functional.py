"""The steps of ``lmf_multi.reference`` in TensorFlow, as Keras' functions and classes call them.

Eager, ``tf.function`` and XLA; sizes may be unknown while a graph is traced. Labels and vectors
get no gradient.
"""

import tensorflow as tf

from lmf_multi._terms import Numbers, Options, Terms, Vectors
from lmf_multi.keras._tensorflow._closed_form import one_or_nan, weights
from lmf_multi.keras._tensorflow._mixture import mixture
from lmf_multi.keras._tensorflow._preparation import (
    agreeing,
    along,
    by_label,
    constants,
    normalizers,
    of_classes,
    sigmoid_targets,
    sizes,
    smoothed,
    soft_targets,
    targets,
)
from lmf_multi.spec import (
    check_inputs,
    check_parameters,
    check_sigmoid_inputs,
    described,
    shapes_of,
)


def compute_loss(
    logits: tf.Tensor, labels: tf.Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> tf.Tensor:
    """What each example contributes to the reduced loss (N,); the reduction is their sum."""
    (Δ, w, o), dtype, soft = _checked((logits, labels), vectors, numbers, options, False)
    (α, β, γ, s, ε), z, where = numbers, logits, options.where
    axis = options.axis % len(z.shape)
    z = of_classes(z, axis, [v.shape[0] for v in (Δ, w, o) if v is not None])
    y = agreeing("labels", labels, z, None if soft else axis)
    where = None if where is None else agreeing("where", where, z, axis)
    shape = sizes(z)
    C = shape.pop(axis)
    if axis == len(shape):  # all examples along one axis: XLA's loops over several are slower
        z, y = tf.reshape(z, [-1, C]), tf.reshape(y, [-1, C] if soft else [-1])
        where, axis = None if where is None else tf.reshape(where, [-1]), 1

    if soft:
        labels = soft_targets(y, where, axis, dtype)
    else:
        labels = targets(y, where, C, options.mask_name)
    W = weights(labels, w, axis, dtype)
    by_weight, by_examples = normalizers(W, where, options.reduction)
    a = None if α == 0 or Δ is None else α / by_weight
    b = None if β == 0 else β / by_examples
    if soft or ε != 0:
        labels = smoothed(labels, ε, C, axis, dtype)
        z = z if where is None else tf.where(tf.expand_dims(where, axis), z, 0.0)
    terms = Terms(Δ=Δ, w=w, a=a, b=b, γ=γ, s=s, o=o)
    return tf.reshape(mixture(z, labels, terms, axis), shape)


def compute_sigmoid_loss(
    logits: tf.Tensor, labels: tf.Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> tf.Tensor:
    """What each element contributes to the reduced loss (N,), as ``compute_loss``."""
    (Δ, w, o), dtype, soft = _checked((logits, labels), vectors, numbers, options, True)
    (α, β, γ, s, ε), x, axis, where = numbers, logits, options.axis, options.where
    by_labels = [
        v for v, rank in ((Δ, 2), (w, 2), (o, 1)) if v is not None and len(v.shape) == rank
    ]
    x = of_classes(x, axis, [v.shape[0] for v in by_labels])
    t = agreeing("labels", labels, x)
    where = None if where is None else agreeing("where", where, x)
    Δ, w = (None if v is None else by_label(v, len(x.shape), axis) for v in (Δ, w))
    o = None if o is None else along(o, len(x.shape), axis)

    hard = not soft and ε == 0
    labels = sigmoid_targets(t, where, hard, dtype, options.mask_name)
    W = weights(labels, w, None, dtype)
    by_weight, by_examples = normalizers(W, where, options.reduction)
    a = None if α == 0 or Δ is None else α / by_weight
    b = None if β == 0 else β / by_examples
    x = x if where is None else tf.where(where, x, 0.0)
    return mixture(x, labels, Terms(Δ=Δ, w=w, a=a, b=b, γ=γ, s=s, o=o, ε=ε), None)


def _checked(
    arrays: tuple[tf.Tensor, tf.Tensor],
    vectors: Vectors,
    numbers: Numbers,
    options: Options,
    is_sigmoid: bool,
) -> tuple[Vectors, tf.DType, bool]:
    """The vectors as constants, their dtype, and whether labels are distributions."""
    check_parameters(**numbers._asdict())
    z, y = arrays
    dtype = tf.float64 if z.dtype == tf.float64 else tf.float32
    vectors = constants(vectors, dtype)
    check, where = check_sigmoid_inputs if is_sigmoid else check_inputs, described(options.where)
    soft = check(described(z), described(y), options.axis, shapes_of(*vectors), where)
    return vectors, dtype, soft


def squeeze(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Without an axis of 1, told when a graph runs if that is not known; Keras' refuses that."""
    return tf.squeeze(x, [axis])


def sparse_or_soft(y: tf.Tensor, z: tf.Tensor, axis: int) -> tf.Tensor:
    """Distributions (N, C) for labels of the logits' rank, which may turn out to be sparse, (N, 1).

    By broadcasting, because XLA compiles both branches of a condition, of which one cannot be.
    """
    dtype = tf.float64 if y.dtype == tf.float64 else tf.float32
    along_axis = [1] * len(z.shape)
    along_axis[axis] = tf.shape(z)[axis]
    is_sparse, y = tf.shape(y)[axis] == 1, tf.cast(y, dtype)
    is_y = y == tf.cast(tf.reshape(tf.range(along_axis[axis]), along_axis), dtype)
    is_label = tf.reduce_any(is_y, axis, keepdims=True) | ~is_sparse
    return tf.where(is_sparse, tf.cast(is_y, dtype), y) / one_or_nan(is_label, dtype)
