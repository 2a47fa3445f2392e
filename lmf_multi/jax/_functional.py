"""The steps of ``lmf_multi.reference`` in JAX; what is said here is only what differs.

Hyper-parameters may be tracers; what cannot raise there gives NaN.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lmf_multi.jax._closed_form import (
    by_class,
    is_class,
    is_symbolic_zero,
    mixture,
    nan_where,
    weights,
)
from lmf_multi.spec import (
    PROBABILITY_SLACK,
    RULES,
    Reduction,
    check_inputs,
    check_label_range,
    check_mask,
    check_parameters,
    check_probability_range,
    check_sigmoid_inputs,
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
        axis: the label axis of ``logits``, for (L, 2).
        where: bool, the logits' shape; False gives 0, whatever the logit and the label.

    The other arguments, results and errors as :func:`lmf_loss`; one value for each element.

    >>> loss = sigmoid_lmf_loss(jnp.array([-2.0, 0.5]), jnp.array([0, 1]), jnp.array([0.1, 0.5]))
    >>> [round(each, 4) for each in loss.tolist()]
    [0.0052, 1.1497]
    """
    return compute_sigmoid_loss(
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


def _as_labels(labels: ArrayLike) -> Array:
    """Labels as an array of JAX, which without x64 cuts NumPy's 2^32 + 1 to the class 1."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        is_wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        kept, given = np.iinfo(np.int64 if is_wide else np.int32), np.iinfo(labels.dtype)
        labels = np.clip(labels, max(kept.min, given.min), min(kept.max, given.max))
    return jnp.asarray(labels)


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
    totals: tuple[Array, Array] | None = None,
    axis_name: Any = None,
) -> Array:
    """What each example contributes to the reduced loss; ``reduction`` is their sum.

    ``totals`` replaces the batch's total class weight and number of examples in the means;
    ``axis_name`` is the mapped axis whose batches they are taken over.
    """
    check_vectors(margins=_on_host(margins), class_weight=_on_host(class_weight))
    z, y = jnp.asarray(logits), _as_labels(labels)
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

    axis, masked, C = axis % z.ndim, None if mask is None else ~mask, z.shape[axis]
    Δ_by_class, w_by_class = (None if v is None else by_class(v, z.ndim, axis) for v in (Δ, w))
    if soft:
        q, presence = _soft_targets(y, axis, mask, dtype)
        W = (q if w_by_class is None else q * w_by_class).sum(axis)
    else:
        y = _targets(y, C, mask, mask_name)
        presence = weights(y, masked, None, axis, dtype)
        W = presence if w is None else weights(y, masked, w, axis, dtype)
    by_weight, by_examples = _normalizers(W, presence, reduction, totals, axis_name)

    def of_one_class() -> Array:
        a = None if _is_zero(α) else α / by_weight
        b = None if _is_zero(β) else β / by_examples
        return mixture(z, y, masked, Δ, w, a, b, γ, s, axis)

    def of_all_classes() -> Array:
        present = jnp.expand_dims(presence, axis)
        p = (1 - ε) * (q if soft else jnp.where(is_class(y, C, axis), present, 0))
        p += ε / C * present
        share = p if w_by_class is None else p * w_by_class
        a = None if _is_zero(α) else share * (α / by_weight)
        b = None if _is_zero(β) else share * (β / by_examples)
        others = None, None, Δ_by_class, None, a, b, γ, s, axis
        return mixture(jnp.where(present == 0, 0, z), *others)

    return _by_smoothing(soft, ε, of_one_class, of_all_classes)


def compute_sigmoid_loss(
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
    totals: tuple[Array, Array] | None = None,
    axis_name: Any = None,
) -> Array:
    """What each element contributes to the reduced loss, as ``compute_loss``."""
    check_vectors(margins=_on_host(margins), class_weight=_on_host(class_weight))
    x, t = jnp.asarray(logits), _as_labels(labels)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    Δ = None if margins is None else jnp.asarray(margins, dtype)
    w = None if class_weight is None else jnp.asarray(class_weight, dtype)
    mask = None if where is None else jnp.asarray(where)
    soft = check_sigmoid_inputs(
        (x.shape, x.dtype),
        (t.shape, t.dtype),
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

    Δ, w = (None if v is None else _by_label(v, x.ndim, axis) for v in (Δ, w))
    t, presence = _sigmoid_targets(t, mask, mask_name, dtype)
    W = _sigmoid_weights(t, presence, w)
    by_weight, by_examples = _normalizers(W, presence, reduction, totals, axis_name)
    x = x if mask is None else jnp.where(mask, x, 0)

    def of_one_class() -> Array:
        positive = t == 1
        a = None if _is_zero(α) else W * (α / by_weight)
        b = None if _is_zero(β) else W * (β / by_examples)
        margins = None if Δ is None else jnp.where(positive, Δ[1], Δ[0])
        return mixture(x, positive, None, margins, None, a, b, γ, s, None)

    def of_all_classes() -> Array:
        q = ((1 - ε) * jnp.stack([1 - t, t]) + ε / 2) * presence[None]
        share = q if w is None else q * w
        a = None if _is_zero(α) else share * (α / by_weight)
        b = None if _is_zero(β) else share * (β / by_examples)
        return mixture(x, None, None, Δ, None, a, b, γ, s, None)

    return _by_smoothing(soft, ε, of_one_class, of_all_classes)


def _on_host(vector: Any) -> Any:
    """A CPU's array as NumPy's, whose numbers can be checked."""
    if not isinstance(vector, Array) or isinstance(vector, jax.core.Tracer):
        return vector
    on_cpu = all(device.platform == "cpu" for device in vector.devices())
    return np.asarray(vector) if on_cpu and vector.is_fully_addressable else vector


def total_weight_and_examples(
    labels: ArrayLike,
    class_weight: ArrayLike | None,
    *,
    axis: int,
    where: ArrayLike | None,
    axis_name: Any,
) -> tuple[Array, Array]:
    """What the means of ``lmf_loss`` divide by: the batch's class weight and its examples."""
    y, mask = _as_labels(labels), None if where is None else jnp.asarray(where)
    dtype = jnp.result_type(float)
    w = None if class_weight is None else jnp.asarray(class_weight, dtype)
    if jnp.issubdtype(y.dtype, jnp.floating):
        axis = axis % y.ndim
        _check_mask(mask, y.shape[:axis] + y.shape[axis + 1 :])
        q, presence = _soft_targets(y, axis, mask, dtype)
        W = (q if w is None else q * by_class(w, y.ndim, axis)).sum(axis)
    else:
        _check_mask(mask, y.shape)
        C = 2**31 - 1 if w is None else len(w)  # the loss itself checks the labels
        y, masked = _targets(y, C, mask, "where"), None if mask is None else ~mask
        presence = weights(y, masked, None, y.ndim, dtype)
        W = presence if w is None else weights(y, masked, w, y.ndim, dtype)
    return _totals(W, presence, axis_name)


def total_sigmoid_weight_and_examples(
    labels: ArrayLike,
    class_weight: ArrayLike | None,
    *,
    axis: int,
    where: ArrayLike | None,
    axis_name: Any,
) -> tuple[Array, Array]:
    """The same for the sigmoid form."""
    t, mask = _as_labels(labels), None if where is None else jnp.asarray(where)
    dtype = jnp.result_type(float)
    w = None if class_weight is None else jnp.asarray(class_weight, dtype)
    _check_mask(mask, t.shape)
    t, presence = _sigmoid_targets(t, mask, "where", dtype)
    w = None if w is None else _by_label(w, t.ndim, axis)
    return _totals(_sigmoid_weights(t, presence, w), presence, axis_name)


def _check_mask(mask: Array | None, examples: tuple[int, ...]) -> None:
    check_mask(None if mask is None else (mask.shape, mask.dtype), examples)


def _by_label(vector: Array, ndim: int, axis: int) -> Array:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.ndim == 1:
        return vector.reshape(2, *[1] * ndim)
    return vector.T.reshape(2, *[-1 if i == axis % ndim else 1 for i in range(ndim)])


def _sigmoid_targets(
    t: Array, where: Array | None, mask_name: str, dtype: Any
) -> tuple[Array, Array]:
    """Probabilities; each element's presence, 1, 0 for a masked one, NaN out of range."""
    t = t.astype(dtype)
    t = t if where is None else jnp.where(where, t, 0)
    presence = jnp.ones_like(t) if where is None else where.astype(dtype)
    if known := _range_outside_a_trace(t):
        check_probability_range(*known, mask_name)
    inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
    return t, nan_where(~inside, presence)


def _sigmoid_weights(t: Array, presence: Array, w: Array | None) -> Array:
    """Each element's class weight; exactly that of its class where t is 0 or 1."""
    return presence if w is None else presence * ((1 - t) * w[0] + t * w[1])


def _by_smoothing(soft: bool, ε: Any, of_one_class: Any, of_all_classes: Any) -> Array:
    """The class of the label alone, or all classes where labels or smoothing spread over them."""
    if soft or (not _is_zero(ε) and not isinstance(ε, Array)):
        loss: Array = of_all_classes()
    elif _is_zero(ε):
        loss = of_one_class()
    else:  # known at run time only
        loss = jax.lax.cond(_is_constant_0(ε), of_one_class, of_all_classes)
    return loss


@jax.custom_jvp
def _is_constant_0(ε: Array) -> Array:
    """Whether ε is 0 and nobody differentiates for it: the loss at the label knows nothing of it.

    A differentiation for ε that follows one for something else meets this rule still.
    """
    return ε == 0


@partial(_is_constant_0.defjvp, symbolic_zeros=True)
def _is_constant_0_jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    constant = is_symbolic_zero(tangents[0])
    is_0 = _is_constant_0(*primals) if constant else jnp.zeros_like(primals[0], bool)
    return is_0, np.zeros(is_0.shape, jax.dtypes.float0)


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


def _soft_targets(y: Array, axis: int, where: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Distributions, 0 for masked examples, and each example's presence."""
    presence = jnp.ones(y.shape[:axis] + y.shape[axis + 1 :], dtype)
    presence = presence if where is None else where.astype(dtype)
    return jnp.where(jnp.expand_dims(presence, axis) == 0, 0, y.astype(dtype)), presence


def _targets(y: Array, C: int, where: Array | None, mask_name: str) -> Array:
    """Class indices, 0 for a masked example, -1 for one out of range."""
    y = y if y.dtype.itemsize >= 4 else y.astype(jnp.int32)  # C may be too large for int8
    y = y if where is None else jnp.where(where, y, 0)
    if known := _range_outside_a_trace(y):
        check_label_range(*known, C, mask_name)
    return jnp.where((y >= 0) & (y < C), y, -1).astype(jnp.int32)


def _range_outside_a_trace(labels: Array) -> tuple[Any, Any] | None:
    """The smallest and the largest; inside a trace even those of an array from outside, which is
    no tracer itself, cannot be known.
    """
    if labels.size == 0 or isinstance(lowest := labels.min(), jax.core.Tracer):
        return None
    return lowest.item(), labels.max().item()


def _totals(W: Array, presence: Array, axis_name: Any) -> tuple[Array, Array]:
    """Total class weight and number of examples, of all devices along a mapped axis."""
    totals = W.sum(), presence.sum()
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)  # type: ignore[no-untyped-call]
    return totals


def _normalizers(
    W: Array,
    presence: Array,
    reduction: Reduction,
    totals: tuple[Array, Array] | None,
    axis_name: Any,
) -> tuple[Array | float, Array | float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    total, N = totals or _totals(W, presence, axis_name)
    total, N = total.astype(W.dtype), jnp.maximum(N.astype(W.dtype), 1)
    if reduction == "batch_mean":
        return N, N
    return jnp.where(total == 0, 1, total), N
