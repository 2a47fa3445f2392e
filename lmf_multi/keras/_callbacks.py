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
        loss: the one to change, where the model is compiled with several: an entry of
            ``model.loss``.
        effective_beta: of the effective number of samples, in [0, 1).

    Raises:
        ValueError: a value breaks its rule, or, in ``fit``, a loss that the model does not use.
        TypeError: in ``fit``, a loss without class weights.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.compile(loss=LDAMLoss([900, 100]))
    >>> drw = DeferredReweighting([900, 100], start=1)
    >>> _ = model.fit(np.zeros((4, 2)), np.ones(4), epochs=2, verbose=0, callbacks=[drw])
    >>> model.loss.class_weight.round(2)
    array([0.21, 1.79])
    """

    def __init__(
        self, class_counts: Counts, start: int, *, loss: Any = None, effective_beta: float = 0.9999
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
                f"got {loss.__class__.__name__}; name it with loss="  # not TensorFlow's wrapper
            )
        compiled = keras.tree.flatten(self.model.loss)
        if self.model.loss is not None and not any(each is loss for each in compiled):
            raise ValueError(
                f"loss must be one that the model is compiled with, got another {loss.name}; "
                "take it from model.loss, also after loading"
            )
        weights = deferred_weights(
            self.class_counts, epoch, self.start, effective_beta=self.effective_beta
        )
        if loss.class_weight is not None and np.array_equal(loss.class_weight, weights):
            return
        loss.set_class_weight(weights)
        for step in ("train", "test"):
            if getattr(self.model, f"{step}_function") is not None:
                self._trace_anew(step)

    def _trace_anew(self, step: str) -> None:
        # around a new function, because JAX finds the old trace by the method that was traced for
        # as long as anything holds on to it
        method = getattr(self.model, f"{step}_step")
        setattr(self.model, f"{step}_step", lambda *arguments: method(*arguments))
        getattr(self.model, f"make_{step}_function")(force=True)
        delattr(self.model, f"{step}_step")
