"""The cosine head, as :func:`lmf_multi.reference.cosine_logits` defines it."""

from typing import Any

import keras
import numpy as np
from keras import ops

from lmf_multi._heads import check_features
from lmf_multi.spec import check_whole

# smallest normal numbers, as constants for torch.compile
_TINY = {name: float(np.finfo(name).tiny) for name in ("float32", "float64")}


@keras.saving.register_keras_serializable(package="lmf_multi")
class CosineLinear(keras.layers.Layer):  # type: ignore[misc]  # Keras carries no types
    """A classifier head whose logits are cosines, the one that LDAM was published with.

    In place of the last ``keras.layers.Dense``; without bias, and without a scale of its own, since
    the loss's ``scale`` multiplies the logits and the margins alike.

    Args:
        units: number of classes C.
        kernel_initializer: how ``kernel`` (D, C) is drawn; by default with lengths near 1.
        **options: ``name``, ``dtype``, ``trainable``, as every layer takes them.

    Features are (..., D), logits (..., C) in the layer's compute dtype. Under mixed precision the
    cosines are computed in float32 from the float32 kernel, and rounded at the end;
    ``dtype="float32"`` keeps them whole.

    Raises:
        ValueError: a size below 1, or features of another size.
        TypeError: sizes that are not whole numbers, or features that are not in floating point.

    >>> head = CosineLinear(2)
    >>> head.build((None, 2))
    >>> _ = head.kernel.assign([[2.0, -6.0], [0.0, -8.0]])
    >>> ops.convert_to_numpy(head(ops.array([[3.0, 4.0]]))).round(4)
    array([[ 0.6, -1. ]], dtype=float32)
    """

    def __init__(
        self, units: int, *, kernel_initializer: Any = "lecun_normal", **options: Any
    ) -> None:
        check_whole(1, units=units)
        # Keras would round features and kernel to the compute dtype before their lengths are taken
        super().__init__(autocast=False, **options)
        self.units = int(units)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the kernel for features (..., D)."""
        in_features = input_shape[-1] if input_shape else None
        if in_features is None:
            raise ValueError(
                f"features must have a known last axis, got shape {tuple(input_shape)}; "
                "give keras.Input its size"
            )
        check_whole(1, in_features=in_features)
        self.in_features = in_features
        self.kernel = self.add_weight(
            name="kernel", shape=(in_features, self.units), initializer=self.kernel_initializer
        )

    def call(self, inputs: Any) -> Any:
        """Logits (..., C) of features (..., D)."""
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        check_features(tuple(inputs.shape), dtype, self.in_features)
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        # not ops.matmul, which on PyTorch multiplies float64 in float32
        logits = _unit(ops.cast(inputs, wide), -1) @ _unit(ops.cast(self.kernel, wide), 0)
        return ops.cast(logits, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """(..., C) for features (..., D)."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments, from which ``from_config`` rebuilds the layer."""
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "units": self.units, "kernel_initializer": initializer}


def _unit(x: Any, axis: int) -> Any:
    # a factor does not change the direction, so none goes through the factor's derivative; the
    # sum, since Keras' max refuses an empty batch and breaks torch.compile's graph
    size = ops.stop_gradient(ops.sum(ops.abs(x), axis, keepdims=True))
    one, tiny = ops.ones_like(size), _TINY[keras.backend.standardize_dtype(x.dtype)]
    # at most 1 / tiny, because compilers multiply by the reciprocal, which would underflow
    size = ops.where(size > 1 / tiny, one / tiny, size)
    x = x / ops.where(size < tiny, one, size)
    squares = ops.sum(x * x, axis, keepdims=True)
    return x / ops.sqrt(ops.where(squares == 0, ops.ones_like(squares), squares))
