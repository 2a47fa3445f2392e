"""The steps of ``lmf_multi.reference`` in JAX; what is said here is only what differs.

Hyper-parameters may be tracers; what cannot raise there gives NaN.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from lmf_multi._terms import Labels, Numbers, Options, Terms, Vectors
from lmf_multi.jax._closed_form import is_class, nan_where
from lmf_multi.jax._mixture import mixture
from lmf_multi.jax._preparation import (
    along,
    by_label,
    normalizers,
    sigmoid_targets,
    soft_targets,
    targets,
    totals,
)
from lmf_multi.spec import (
    RULES,
    check_inputs,
    check_mask,
    check_parameters,
    check_sigmoid_inputs,
    check_vectors,
    described,
    shapes_of,
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
    logit_adjustment: ArrayLike | None = None,
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
        logit_adjustment: float (C,), nats, added to the logits before both terms, such as τ times
            ``lmf_multi.log_priors``; or None.
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
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return compute_loss(logits, labels, vectors, numbers, options)


def ldam_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    scale: ArrayLike = 30.0,
    label_smoothing: ArrayLike = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> ldam_loss(jnp.array([[0.2, 0.0]]), jnp.array([0]), [0.2, 0.5], scale=2.0).round(4)
    Array([0.6931], dtype=float32)
    """
    numbers = Numbers(1.0, 0.0, 0.0, scale, label_smoothing)
    options = Options(axis, where)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return compute_loss(logits, labels, vectors, numbers, options)


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    gamma: ArrayLike = 1.5,
    label_smoothing: ArrayLike = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> focal_loss(jnp.zeros((1, 2)), jnp.array([0]), gamma=2.0).round(4)
    Array([0.1733], dtype=float32)
    """
    numbers = Numbers(0.0, 1.0, gamma, 1.0, label_smoothing)
    options = Options(axis, where)
    vectors = Vectors(None, class_weight, logit_adjustment)
    return compute_loss(logits, labels, vectors, numbers, options)


def sigmoid_lmf_loss(
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
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """The sigmoid form, as :func:`lmf_multi.reference.sigmoid_lmf_loss` defines it.

    Args:
        logits: float, any shape, log-odds of the positive, nats.
        labels: the logits' shape: 0 and 1, bool, or float, the probability of the positive.
        margins: float (2,), or (L, 2) for the L labels along ``axis``: of the negative and of the
            positive.
        class_weight: float (2,) or (L, 2), at least 0, or None for ones.
        logit_adjustment: float () or (L,), nats, added to the logits, such as τ log(n⁺ / n⁻).
        axis: the label axis of ``logits``, for (L, 2) and (L,).
        where: bool, the logits' shape; False gives 0, whatever the logit and the label.

    The other arguments, results and errors as :func:`lmf_loss`; one value for each element.

    >>> loss = sigmoid_lmf_loss(jnp.array([-2.0, 0.5]), jnp.array([0, 1]), jnp.array([0.1, 0.5]))
    >>> [round(each, 4) for each in loss.tolist()]
    [0.0052, 1.1497]
    """
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return compute_sigmoid_loss(logits, labels, vectors, numbers, options)


def compute_loss(
    logits: ArrayLike, labels: ArrayLike, vectors: Vectors, numbers: Numbers, options: Options
) -> Array:
    """What each example contributes to the reduced loss (N,); that is their sum."""
    z = jnp.asarray(logits)
    dtype = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    y, vectors, options = _given(labels, vectors, options, dtype)
    where, shapes = described(options.where), shapes_of(*vectors)
    soft = check_inputs(described(z), described(y), options.axis, shapes, where)
    numbers, axis = _checked(numbers, dtype), options.axis % z.ndim
    if soft:
        given, presence = soft_targets(y, axis, options, dtype)
    else:
        given, presence = targets(y, z.shape[axis], axis, options, dtype)
    divisors = normalizers(given, presence, vectors.class_weight, axis, options)
    terms = _terms(vectors, numbers, divisors, axis)
    ε = numbers.label_smoothing
    if not soft and isinstance(ε, Array):
        return _smoothed_perhaps(z, given, presence, terms, ε, axis)
    if soft or ε > 0:
        z, given = _over_classes(z, given, presence, ε, axis)
    return mixture(z, given, terms, axis)


def compute_sigmoid_loss(
    logits: ArrayLike, labels: ArrayLike, vectors: Vectors, numbers: Numbers, options: Options
) -> Array:
    """What each element contributes to the reduced loss (N,), as ``compute_loss``."""
    x = jnp.asarray(logits)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    t, vectors, options = _given(labels, vectors, options, dtype)
    where, shapes = described(options.where), shapes_of(*vectors)
    soft = check_sigmoid_inputs(described(x), described(t), options.axis, shapes, where)
    numbers = _checked(numbers, dtype)
    Δ, w, o = vectors
    Δ, w = (None if v is None else by_label(v, x.ndim, options.axis) for v in (Δ, w))
    vectors = Vectors(Δ, w, None if o is None else along(o, x.ndim, options.axis))
    given, presence = sigmoid_targets(t, options, dtype)
    divisors = normalizers(given, presence, vectors.class_weight, None, options)
    terms = _terms(vectors, numbers, divisors, None)
    ε = numbers.label_smoothing
    if not soft and isinstance(ε, Array):
        return _smoothed_perhaps(x, given, presence, terms, ε, None)
    if soft or ε > 0:
        x, given = _over_classes(x, given, presence, ε, None)
    return mixture(x, given, terms, None)


def total_weight_and_examples(
    labels: ArrayLike, class_weight: ArrayLike | None, options: Options
) -> tuple[Array, Array]:
    """What the means of ``lmf_loss`` divide by: the batch's class weight and its examples, ()."""
    dtype = jnp.result_type(float)
    y, (_, w, _), options = _given(labels, Vectors(None, class_weight), options, dtype)
    soft = jnp.issubdtype(y.dtype, jnp.floating)
    axis = options.axis % y.ndim if soft else y.ndim
    check_mask(described(options.where), y.shape[:axis] + y.shape[axis + 1 :])
    if soft:
        return totals(*soft_targets(y, axis, options, dtype), w, axis)
    C = 2**31 - 1 if w is None else len(w)  # the loss itself checks the labels
    return totals(*targets(y, C, axis, options, dtype), w, axis)


def total_sigmoid_weight_and_examples(
    labels: ArrayLike, class_weight: ArrayLike | None, options: Options
) -> tuple[Array, Array]:
    """The same for the sigmoid form."""
    dtype = jnp.result_type(float)
    t, (_, w, _), options = _given(labels, Vectors(None, class_weight), options, dtype)
    check_mask(described(options.where), t.shape)
    w = None if w is None else by_label(w, t.ndim, options.axis)
    return totals(*sigmoid_targets(t, options, dtype), w, None)


def _given(
    labels: ArrayLike, vectors: Vectors, options: Options, dtype: Any
) -> tuple[Array, Vectors, Options]:
    """Labels, vectors and mask as arrays of JAX."""
    check_vectors(**{name: _on_host(v) for name, v in vectors._asdict().items()})
    arrays = Vectors(*(None if v is None else jnp.asarray(v, dtype) for v in vectors))
    mask = None if options.where is None else jnp.asarray(options.where)
    return _as_labels(labels), arrays, options._replace(where=mask)


def _as_labels(labels: ArrayLike) -> Array:
    """Labels as an array of JAX, which without x64 cuts NumPy's 2^32 + 1 to the class 1."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        is_wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        kept, given = np.iinfo(np.int64 if is_wide else np.int32), np.iinfo(labels.dtype)
        labels = np.clip(labels, max(kept.min, given.min), min(kept.max, given.max))
    return jnp.asarray(labels)


def _on_host(vector: Any) -> Any:
    """A CPU's array as NumPy's, whose numbers can be checked."""
    if not isinstance(vector, Array) or isinstance(vector, jax.core.Tracer):
        return vector
    on_cpu = all(device.platform == "cpu" for device in vector.devices())
    return np.asarray(vector) if on_cpu and vector.is_fully_addressable else vector


def _checked(numbers: Numbers, dtype: Any) -> Numbers:
    return Numbers(*(_number(name, value, dtype) for name, value in numbers._asdict().items()))


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
    return nan_where(~(RULES[name][1](value) & jnp.isfinite(value)), value)


def _is_zero(number: Any) -> bool:
    return not isinstance(number, Array) and number == 0


def _terms(
    vectors: Vectors, numbers: Numbers, divisors: tuple[Any, Any], axis: int | None
) -> Terms:
    """The terms of a batch whose sums are divided by these, () each."""
    (Δ, w, o), (α, β, γ, s, ε), (by_weight, by_examples) = vectors, numbers, divisors
    a = None if Δ is None or _is_zero(α) else α / by_weight
    b = None if _is_zero(β) else β / by_examples
    return Terms(Δ=Δ, w=w, a=a, b=b, γ=γ, s=s, o=o, ε=ε if axis is None else 0.0)


def _over_classes(
    z: Array, labels: Labels, presence: Array, ε: Any, axis: int | None
) -> tuple[Array, Labels]:
    """Labels (N, C), in the softmax form smoothed, and logits with zeros for masked examples."""
    along, C = (0, 2) if axis is None else (axis, z.shape[axis])
    (y, masked, q), present = labels, jnp.expand_dims(presence, along)
    if q is None:
        q = jnp.where(is_class(y, C, along), present, 0)
    if axis is not None and not _is_zero(ε):
        q = (1 - ε) * q + ε / C * present
    if masked is not None:
        z = jnp.where(masked if axis is None else jnp.expand_dims(masked, axis), 0, z)
    return z, Labels(masked=masked, q=q)


def _smoothed_perhaps(
    z: Array, labels: Labels, presence: Array, terms: Terms, ε: Array, axis: int | None
) -> Array:
    """Loss (N,) of integer labels with a smoothing of which only the run knows whether it is 0."""

    def over_classes() -> Array:
        return mixture(*_over_classes(z, labels, presence, ε, axis), terms, axis)

    is_0 = _is_constant_0(ε)
    loss: Array = jax.lax.cond(is_0, lambda: mixture(z, labels, terms, axis), over_classes)
    return loss


@jax.custom_jvp
def _is_constant_0(ε: Array) -> Array:
    """Whether ε is 0 and nobody differentiates for it: the loss at the label knows nothing of it.

    A differentiation for ε that follows one for something else meets this rule still.
    """
    return ε == 0


@partial(_is_constant_0.defjvp, symbolic_zeros=True)
def _is_constant_0_jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    constant = isinstance(tangents[0], SymbolicZero)
    is_0 = _is_constant_0(*primals) if constant else jnp.zeros_like(primals[0], bool)
    return is_0, np.zeros(is_0.shape, jax.dtypes.float0)
