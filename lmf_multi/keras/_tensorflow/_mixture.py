"""Which code runs, and how TensorFlow differentiates it."""

from typing import Any

import tensorflow as tf

from lmf_multi._terms import Labels, Terms
from lmf_multi.keras._tensorflow._closed_form import value_and_grad
from lmf_multi.keras._tensorflow._cpu import by_kernel, has_kernel_for


def mixture(z: tf.Tensor, labels: Labels, terms: Terms, axis: int | None) -> tf.Tensor:
    """Σ_j q_j w_j (a LDAM_j + b Focal_j) of each example (N,); the sigmoid form has no axis.

    The gradient (N, C) is computed together with the value, and kept. Differentiated again, it is
    the closed form's own derivative.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def closed_form(z: tf.Tensor) -> Any:
        if (axis is None or labels.q is None) and has_kernel_for(z, axis):
            loss, grad = by_kernel(z, labels, terms, axis)
        else:
            loss, grad = value_and_grad(z, labels, terms, axis)

        def pull(upstream: tf.Tensor) -> tf.Tensor:
            upstream = upstream if axis is None else tf.expand_dims(upstream, axis)
            return tf.cast(upstream * grad, z.dtype)

        return loss, pull

    return closed_form(z)
