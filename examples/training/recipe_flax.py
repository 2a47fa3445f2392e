"""The recipe in optax, for the Flax trainer."""

import optax
from jax import Array

from examples.training.recipe import MOMENTUM, Recipe


def build_optimizer(
    recipe: Recipe, steps: int, head_alone: bool = False
) -> optax.GradientTransformation:
    """PyTorch's: adam and sgd add the weight decay to the gradient, adamw shrinks by it.

    Args:
        recipe: the rates.
        steps: of an epoch.
        head_alone: whether the schedule is that of crt's head.
    """
    of_epoch = schedule(recipe, head_alone)

    def rate(count: Array) -> Array:
        return of_epoch(count // steps)

    parts = []
    if recipe.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(recipe.clip_norm))
    if recipe.optimizer == "adamw":
        parts.append(optax.adamw(rate, weight_decay=recipe.weight_decay))
    else:
        parts.append(optax.add_decayed_weights(recipe.weight_decay))
        sgd = recipe.optimizer == "sgd"
        parts.append(optax.sgd(rate, MOMENTUM, nesterov=True) if sgd else optax.adam(rate))
    optimizer = optax.chain(*parts)
    if recipe.accumulate == 1:
        return optimizer
    # the sum: each part's gradients are its share of the whole batch's mean
    several = optax.MultiSteps(optimizer, recipe.accumulate, use_grad_mean=False)
    return several.gradient_transformation()


def schedule(recipe: Recipe, head_alone: bool = False) -> optax.Schedule:
    """optax's schedules, of the epoch: the rates of ``recipe.learning_rate_at``."""
    (epochs, warmup), rate = recipe.stage(head_alone), recipe.learning_rate
    if recipe.schedule == "step":
        decay = (recipe.decay_epochs, recipe.decay_factor)
        main = optax.exponential_decay(rate, *decay, staircase=True)
    elif recipe.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, epochs - warmup)
    else:
        main = optax.constant_schedule(rate)
    rise = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rise, main], [warmup]) if warmup else main
