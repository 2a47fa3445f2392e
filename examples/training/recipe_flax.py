"""The recipe in optax, for the Flax trainer."""

import optax

from examples.training.recipe import Recipe


def build_optimizer(
    recipe: Recipe, steps: int, head_alone: bool = False
) -> optax.GradientTransformation:
    """PyTorch's Adam: the weight decay is added to the gradient, before.

    Args:
        recipe: the rates.
        steps: of an epoch.
        head_alone: whether the schedule is that of crt's head.
    """
    rate = schedule(recipe, head_alone)
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.adam(lambda count: rate(count // steps)),
    )


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
