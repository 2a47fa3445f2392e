"""The Keras trainer's losses beside the library's: cross-entropy, and those of parts of a batch."""

from typing import Any

import keras
import numpy as np
from keras import ops

from examples.training import keras_devices
from lmf_multi.keras import FocalLoss, LMFLoss


class CrossEntropy(keras.losses.Loss):
    """Keras' weighted cross-entropy: the mean over the class weight of all devices' batch."""

    def __init__(self, weight: np.ndarray, label_smoothing: float = 0.0) -> None:
        super().__init__(name="cross_entropy")
        self.label_smoothing = label_smoothing
        self.class_weight = weight.astype(np.float32)

    # not call, whose mean Keras would take over the examples
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of labels and logits (N, C), times the weight that all may have.

        Labels are (N,), or distributions (N, C).
        """
        sparse, ε = len(y_true.shape) == 1, self.label_smoothing
        if sparse:
            # int: where replicas share a batch, Keras first looks at their labels' mean
            y_true = ops.cast(y_true, "int32")
            w = ops.take(self.class_weight, y_true)
        else:
            w = ops.matmul(y_true, self.class_weight)
        if sparse and not ε:
            losses = w * keras.losses.sparse_categorical_crossentropy(
                y_true, y_pred, from_logits=True
            )
        else:
            C = y_pred.shape[-1]
            q = (1 - ε) * (ops.one_hot(y_true, C) if sparse else y_true) + ε / C
            share = ops.multiply(q, self.class_weight)  # of which PyTorch's operator warns
            losses = -ops.sum(share * ops.log_softmax(y_pred), -1)
        if sample_weight is not None:
            losses = losses * sample_weight
        return ops.sum(losses) / keras_devices.over_replicas(ops.sum(w))


class LMFInParts(LMFLoss):
    """`LMFLoss`, or a part's share of a batch's, where ``in_parts`` weights its examples."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """LDAM's mean is over the class weight, focal's over the examples, alike in every part."""
        if sample_weight is None:
            return super().__call__(y_true, y_pred)
        ldam, focal = (
            LMFLoss.from_config(self.get_config() | {other: 0.0}) for other in ("beta", "alpha")
        )
        return ldam(y_true, y_pred, sample_weight) + focal(y_true, y_pred)


class FocalInParts(FocalLoss):
    """`FocalLoss`, whose mean is over the examples, as many in every part."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The part's mean, whatever it weighs."""
        return super().__call__(y_true, y_pred)
