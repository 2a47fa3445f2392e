"""The cosine head, as :func:`lmf_multi.reference.cosine_logits` defines it; needs flax."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from lmf_multi._heads import check_features
from lmf_multi.spec import check_whole


class CosineLinear(nnx.Module):
    """A classifier head whose logits are cosines, the one that LDAM was published with.

    In place of the last ``nnx.Linear``; without bias, and without a scale of its own, since the
    loss's ``scale`` multiplies the logits and the margins alike.

    Args:
        in_features: length D of the feature vectors.
        out_features: number of classes C.
        rngs: where the kernel's key comes from.
        dtype: dtype of the logits; default: what features and kernel have in common.
        param_dtype: dtype of ``kernel``.

    ``kernel`` is (D, C), drawn with lengths near 1. Features are (..., D), logits (..., C). Half
    types are computed in float32.

    Raises:
        ValueError: a size below 1, or features of another size.
        TypeError: sizes that are not whole numbers, or features that are not in floating point.

    >>> head = CosineLinear(2, 2, rngs=nnx.Rngs(0))
    >>> head.kernel[...] = jnp.array([[2.0, -6.0], [0.0, -8.0]])
    >>> np.asarray(head(jnp.array([[3.0, 4.0]]))).round(4)
    array([[ 0.6, -1. ]], dtype=float32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        check_whole(1, in_features=in_features, out_features=out_features)
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (in_features, out_features), param_dtype))
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.param_dtype = dtype, param_dtype

    def __call__(self, inputs: Array) -> Array:
        """Logits (..., C) of features (..., D)."""
        check_features(inputs.shape, inputs.dtype, self.in_features)
        kernel = self.kernel[...]
        dtype = jnp.dtype(self.dtype or jnp.promote_types(inputs.dtype, kernel.dtype))
        wide = jnp.float32 if dtype.itemsize < 4 else dtype
        logits = _unit(inputs.astype(wide), -1) @ _unit(kernel.astype(wide), 0)
        return logits.astype(dtype)


def _unit(x: Array, axis: int) -> Array:
    # a factor does not change the direction, so none goes through the factor's derivative
    size = lax.stop_gradient(abs(x).max(axis, keepdims=True))
    tiny = np.finfo(x.dtype).tiny
    # at most 1 / tiny, because compilers multiply by the reciprocal, which would underflow
    x = x / jnp.where(size < tiny, 1, jnp.minimum(size, 1 / tiny))
    squares = (x * x).sum(axis, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares == 0, 1, squares))
