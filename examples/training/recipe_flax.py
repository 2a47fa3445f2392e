"""The recipe in optax, for the Flax trainer."""

from typing import Any

import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from examples.training.recipe import MOMENTUM, Recipe

TRAINED = "trained"  # the weights beside a checkpoint's model, whose own are averaged


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


# --- averaged weights, of which a state holds a part: {"model": {"head": …}}


def weights_of(state: nnx.State, trained: Any) -> nnx.State:
    """The weights of the model that are trained, which a filter tells."""
    return common(state, nnx.State({"model": nnx.filter_state(state["model"], trained)}))


def averaged(average: nnx.State, weights: nnx.State, share: ArrayLike) -> nnx.State:
    """The moving average, in which new weights have a share."""
    return optax.incremental_update(weights, average, share)


def validated(state: nnx.State, average: nnx.State | None) -> nnx.State:
    """The state whose model is validated: with the averaged weights, if there are any."""
    return state if average is None else nnx.merge_state(state, average)


def written(state: nnx.State, average: nnx.State | None) -> nnx.State:
    """What a checkpoint holds: ``validated``, and the weights that are trained if they differ."""
    if average is None:
        return state
    return nnx.State({**validated(state, average), TRAINED: common(state, average)["model"]})


def read(tree: nnx.State, average: nnx.State | None) -> tuple[nnx.State, nnx.State | None]:
    """The state and its average, of what was ``written`` with an average like this one."""
    if average is None:
        return tree, None
    weights = nnx.State({"model": tree[TRAINED]})
    state = nnx.State({name: part for name, part in tree.items() if name != TRAINED})
    return nnx.merge_state(state, weights), common(state, average)


def common(state: nnx.State, part: nnx.State) -> nnx.State:
    """What a state has at the places of a part of one."""
    places = {path for path, _ in nnx.to_flat_state(part)}
    return nnx.from_flat_state([each for each in nnx.to_flat_state(state) if each[0] in places])
