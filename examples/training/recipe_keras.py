"""The recipe in Keras, on every backend."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from examples.training import keras_devices
from examples.training.recipe import MOMENTUM, Recipe, pieces
from examples.training.run import Run

EPSILON = 1e-8  # PyTorch's and optax's


def rates(run: Run) -> keras.callbacks.Callback:
    """What sets the rates of ``run.settings``, by the epoch, which a resume knows."""
    return keras.callbacks.LearningRateScheduler(
        lambda epoch, _: run.settings.learning_rate_at(epoch, run.head_from)
    )


def build_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    """PyTorch's: adam and sgd add the weight decay to the gradient, adamw shrinks by it."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    options: dict[str, Any] = {}
    if recipe.clip_norm is not None:
        options["global_clipnorm"] = recipe.clip_norm
    if recipe.accumulate > 1:
        options["gradient_accumulation_steps"] = recipe.accumulate
    if recipe.ema is not None:
        options |= {"use_ema": True, "ema_momentum": recipe.ema}
    if recipe.optimizer == "sgd":
        return SGD(rate, l2=decay, momentum=MOMENTUM, nesterov=True, **options)
    if recipe.optimizer == "adamw":
        return AdamW(rate, weight_decay=decay, epsilon=EPSILON, **options)
    return Adam(rate, l2=decay, **options)


def check_devices(recipe: Recipe) -> None:
    """Raise ValueError for what Keras' optimisers compute of one replica's gradients alone."""
    if keras_devices.replicas() == 1:
        return
    for flag, asked in (
        ("--clip-norm", recipe.clip_norm is not None),
        ("--accumulate", recipe.accumulate > 1),
        ("--ema", recipe.ema is not None),
    ):
        if asked:
            raise ValueError(
                f"{flag} needs one device with Keras on TensorFlow, got "
                f"{keras_devices.replicas()}; KERAS_BACKEND=jax has it on several"
            )


def in_parts(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    accumulate: int,
    class_weight: Callable[[], np.ndarray | None],
) -> Iterator[tuple[np.ndarray, ...]]:
    """Images and labels of each part of each batch, and where there are several its share.

    The share, float32 (b,) and the same for the whole part, is its class weight over that of the
    batch, times the number of parts, since Keras takes the mean of their gradients.

    Args:
        batches: images (B, …) and labels (B,), or distributions (B, C).
        accumulate: the number of parts.
        class_weight: the weights (C,) by which the loss's mean divides, if any, as they are now.
    """
    for images, labels in batches:
        if accumulate == 1:
            yield images, labels
            continue
        w, weights = np.ones(len(labels)), class_weight()
        if weights is not None:
            w = weights[labels] if labels.ndim == 1 else labels @ weights
        for rows in pieces(accumulate):
            share = accumulate * w[rows].sum() / w.sum()
            yield images[rows], labels[rows], np.full(len(w[rows]), share, np.float32)


@contextmanager
def averaged(model: keras.Model) -> Iterator[None]:
    """Have a model the averaged weights inside, if its optimiser keeps any."""
    optimizer, weights = model.optimizer, model.trainable_variables
    if not optimizer.use_ema:
        yield
        return
    trained = copies(weights)
    optimizer.overwrite(weights)
    assign(weights, copies(weights))  # JAX gives away what the average would share with them
    try:
        yield
    finally:
        assign(weights, trained)


def copies(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """Their values, in memory of their own."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assign(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    """Give each variable a value."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class Averaging:
    """An optimiser whose moving average is of the weights after each batch, and beside them."""

    def overwrite(self, weights: Sequence[keras.Variable]) -> None:
        """Give weights the values of their averages."""
        super().finalize_variable_values(weights)

    def finalize_variable_values(self, weights: Sequence[keras.Variable]) -> None:
        """Keep them: ``fit`` calls this after each epoch here, from which the next one goes on."""

    def _update_model_variables_moving_average(self, weights: Sequence[keras.Variable]) -> None:
        """Keras would count a batch's weights once for each of its parts."""
        if not (parts := self.gradient_accumulation_steps):
            super()._update_model_variables_moving_average(weights)
            return
        is_last, is_first = (self._iterations + 1) % parts == 0, self.iterations == 0
        kept = keras.ops.where(is_first, 0.0, self.ema_momentum)
        kept = keras.ops.where(is_last, kept, 1.0)
        for weight, average in zip(weights, self._model_variables_moving_average, strict=True):
            average.assign(kept * average + (1 - kept) * weight)


@keras.saving.register_keras_serializable(package="examples")
class AdamW(Averaging, keras.optimizers.AdamW):
    """Keras' own."""


class L2(Averaging):
    """An optimiser whose weight decay is an L2 penalty, added to the gradient.

    Keras' own ``weight_decay`` shrinks the weights beside the step, as AdamW does.
    """

    def __init__(self, *arguments: Any, l2: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.l2 = l2

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One variable's step."""
        super().update_step(gradient + self.l2 * variable, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "l2": self.l2}


@keras.saving.register_keras_serializable(package="examples")
class Adam(L2, keras.optimizers.Adam):
    """Adam as PyTorch has it."""

    def __init__(
        self, learning_rate: float = 1e-3, l2: float = 0.0, epsilon: float = EPSILON, **options: Any
    ) -> None:
        super().__init__(learning_rate, l2=l2, epsilon=epsilon, **options)


@keras.saving.register_keras_serializable(package="examples")
class SGD(L2, keras.optimizers.SGD):
    """SGD whose weight decay PyTorch's has."""
