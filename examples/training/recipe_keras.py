"""The recipe in Keras, on every backend."""

from typing import Any

import keras

from examples.training.recipe import Recipe


def rates(recipe: Recipe) -> keras.callbacks.Callback:
    """What sets the rates of ``recipe.learning_rate_at``, by the epoch, which a resume knows."""
    return keras.callbacks.LearningRateScheduler(lambda epoch, _: recipe.learning_rate_at(epoch))


@keras.saving.register_keras_serializable(package="examples")
class Adam(keras.optimizers.Adam):
    """Adam as PyTorch has it: the weight decay is an L2 penalty, added to the gradient.

    Keras' own ``weight_decay`` shrinks the weights beside Adam, as in AdamW.
    """

    def __init__(
        self, learning_rate: float = 1e-3, l2: float = 0.0, epsilon: float = 1e-8, **options: Any
    ) -> None:
        super().__init__(learning_rate, epsilon=epsilon, **options)
        self.l2 = l2

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One variable's step."""
        super().update_step(gradient + self.l2 * variable, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "l2": self.l2}
