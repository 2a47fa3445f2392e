"""What the labels say, and what the means divide by, before any arithmetic on the logits.

``presence`` (N,) is 1 for an example that counts, 0 for a masked one, NaN for an unknown label.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmf_multi._terms import Labels, Options
from lmf_multi.jax._closed_form import nan_where, weights
from lmf_multi.spec import PROBABILITY_SLACK, check_label_range, check_probability_range


def soft_targets(y: Array, axis: int, options: Options, dtype: Any) -> tuple[Labels, Array]:
    """Distributions (N, C), 0 for masked examples, and each example's presence (N,)."""
    where, y = options.where, y.astype(dtype)
    if where is None:
        return Labels(q=y), jnp.ones(y.shape[:axis] + y.shape[axis + 1 :], dtype)
    q = jnp.where(jnp.expand_dims(where, axis), y, 0)
    return Labels(masked=~where, q=q), where.astype(dtype)


def targets(y: Array, C: int, axis: int, options: Options, dtype: Any) -> tuple[Labels, Array]:
    """Class indices (N,), 0 for a masked example, -1 for one out of range, and their presence."""
    where = options.where
    y = y if y.dtype.itemsize >= 4 else y.astype(jnp.int32)  # C may be too large for int8
    y = y if where is None else jnp.where(where, y, 0)
    if known := _range_outside_a_trace(y):
        check_label_range(*known, C, options.mask_name)
    labels = _classes(y, C, where)
    return labels, weights(labels, None, axis, dtype)


def sigmoid_targets(t: Array, options: Options, dtype: Any) -> tuple[Labels, Array]:
    """Classes 0 and 1 (N,), or of floats the distributions (2, N); each element's presence (N,)."""
    where, soft = options.where, jnp.issubdtype(t.dtype, jnp.floating)
    t = t if t.dtype.itemsize >= 4 and not soft else t.astype(dtype if soft else jnp.int32)
    t = t if where is None else jnp.where(where, t, 0)
    if known := _range_outside_a_trace(t):
        check_probability_range(*known, options.mask_name)
    if not soft:
        labels = _classes(t, 2, where)
        return labels, weights(labels, None, None, dtype)
    inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
    t, presence = nan_where(~inside, t), nan_where(~inside, jnp.ones_like(t))
    q = jnp.stack([1 - t, t])
    if where is None:
        return Labels(q=q), presence
    return Labels(masked=~where, q=jnp.where(where[None], q, 0)), jnp.where(where, presence, 0)


def _classes(y: Array, C: int, where: Array | None) -> Labels:
    """Class indices (N,), -1 for one out of range, with their mask."""
    y = jnp.where((y >= 0) & (y < C), y, -1).astype(jnp.int32)
    return Labels(y, None if where is None else ~where)


def by_label(vector: Array, ndim: int, axis: int) -> Array:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.ndim == 1:
        return vector.reshape(2, *[1] * ndim)
    return along(vector.T, ndim, axis)


def along(vector: Array, ndim: int, axis: int) -> Array:
    """(…, L), or () for one of all labels, with L along the axis of the logits."""
    size = -1 if vector.ndim else 1
    shape = [size if i == axis % ndim else 1 for i in range(ndim)]
    return vector.reshape([*vector.shape[:-1], *shape])


def normalizers(
    labels: Labels, presence: Array, w: Array | None, axis: int | None, options: Options
) -> tuple[Array | float, Array | float]:
    """What the sums over LDAM and over focal are divided by, () each."""
    if options.reduction in ("none", "sum"):
        return 1.0, 1.0
    total, N = options.totals or totals(labels, presence, w, axis)
    total, N = total.astype(presence.dtype), jnp.maximum(N.astype(presence.dtype), 1)
    if options.reduction == "batch_mean":
        return N, N
    return jnp.where(total == 0, 1, total), N


def totals(
    labels: Labels, presence: Array, w: Array | None, axis: int | None
) -> tuple[Array, Array]:
    """Total class weight and number of examples, () each."""
    return weights(labels, w, axis, presence.dtype).sum(), presence.sum()


def _range_outside_a_trace(labels: Array) -> tuple[Any, Any] | None:
    """The smallest and the largest; inside a trace even those of an array from outside, which is
    no tracer itself, cannot be known.
    """
    if labels.size == 0 or isinstance(lowest := labels.min(), jax.core.Tracer):
        return None
    return lowest.item(), labels.max().item()
