"""Cross-entropy in optax, for the Flax trainer; the other losses are the library's."""

import jax
import optax
from flax import struct
from jax import Array


@struct.dataclass
class CrossEntropy:
    """optax's cross-entropy: the mean over the class weight (C,) of the batch.

    With a sharded batch sums are those of all devices.
    """

    weight: Array
    label_smoothing: float = struct.field(pytree_node=False, default=0.0)

    def __call__(
        self, logits: Array, labels: Array, *, normalizers: tuple[Array, Array] | None = None
    ) -> Array:
        """The loss of logits (N, C) and labels, or a part's share of a batch's.

        Labels are integer (N,), or distributions float (N, C).
        """
        total, _ = normalizers or self.normalizers(labels)
        if labels.ndim == 1 and not self.label_smoothing:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return self.weight[labels] @ losses / total
        q = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
        q = optax.smooth_labels(q, self.label_smoothing)
        return optax.softmax_cross_entropy(logits, q * self.weight).sum() / total

    def normalizers(self, labels: Array) -> tuple[Array, Array]:
        """Total class weight of the labels, as the library's losses have it."""
        total = (self.weight[labels] if labels.ndim == 1 else labels @ self.weight).sum()
        return total, total
