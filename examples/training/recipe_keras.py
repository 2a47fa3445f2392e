"""The recipe in Keras, on every backend."""

from typing import Any

import keras

from examples.training.recipe import MOMENTUM, Recipe
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
    if recipe.optimizer == "sgd":
        return SGD(rate, l2=decay, momentum=MOMENTUM, nesterov=True)
    if recipe.optimizer == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=decay, epsilon=EPSILON)
    return Adam(rate, l2=decay)


class L2:
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
