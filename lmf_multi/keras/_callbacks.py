"""Deferred re-weighting in ``fit``."""

from typing import Any

import keras
import numpy as np

from lmf_multi._deferred import deferred_weights
from lmf_multi.keras._losses import FocalLoss, LDAMLoss, LMFLoss
from lmf_multi.spec import Counts


class DeferredReweighting(keras.callbacks.Callback):  # type: ignore[misc]  # Keras carries no types
    """Class weights of each epoch, as ``deferred_weights`` gives them.

    The step is traced once more at ``start``, because Keras makes constants of the weights. The
    epoch is Keras' own, so ``fit(initial_epoch=...)`` after a resume has the right weights.

    Args:
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        start: the first epoch with weights, counted from 0.
        loss: the loss to change, if it is not the one that the model is compiled with.
        effective_beta: of the effective number of samples, in [0, 1).

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.compile(loss=LDAMLoss([900, 100]))
    >>> drw = DeferredReweighting([900, 100], start=1)
    >>> _ = model.fit(np.zeros((4, 2)), np.ones(4), epochs=2, verbose=0, callbacks=[drw])
    >>> model.loss.class_weight.round(2)
    array([0.21, 1.79])
    """

    def __init__(
        self,
        class_counts: Counts,
        start: int,
        *,
        loss: Any = None,
        effective_beta: float = 0.9999,
    ) -> None:
        super().__init__()
        deferred_weights(class_counts, 0, start, effective_beta=effective_beta)  # the checks
        self.class_counts, self.start = class_counts, start
        self.loss, self.effective_beta = loss, effective_beta

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the epoch's weights, and have the steps traced anew if they are others."""
        loss = self.model.loss if self.loss is None else self.loss
        if not isinstance(loss, LMFLoss | LDAMLoss | FocalLoss):
            raise TypeError(
                "DeferredReweighting needs LMFLoss, LDAMLoss or FocalLoss, "
                f"got {type(loss).__name__}; name it with loss="
            )
        weights = deferred_weights(
            self.class_counts, epoch, self.start, effective_beta=self.effective_beta
        )
        if loss.class_weight is not None and np.array_equal(loss.class_weight, weights):
            return
        loss.set_class_weight(weights)
        self.model.make_train_function(force=True)
        if self.model.test_function is not None:
            self.model.make_test_function(force=True)
