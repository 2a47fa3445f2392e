"""Heads on frozen features: all losses, settings and seeds in one compiled program.

Heads of one seed see the same batch, so that a step is one product of matrices for all of them:
vmapped over losses and settings, it reads the features once, not once a head. Seeds, which shuffle
differently, follow one another inside the program. N examples, D features, C classes; R heads of
each of S seeds, E epochs of T batches of B. Classes come first, (C, N): the loss runs over examples
side by side, which on CPUs halves its time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.nn.initializers import he_normal, lecun_normal

from examples.training.run import epoch_order
from lmf_multi.jax import LMFLoss, stack_losses

HEADS = ("linear", "cosine", "mlp")
HIDDEN = 64  # units of mlp's hidden layer
TAUS = np.round(np.arange(-2.0, 3.01, 0.1), 1)  # of `tune_adjustment`'s every other one
# Every loss as a member of the family, so that one program computes them; bwcce, whose mean is over
# the class weight as LDAM's, is LDAM without margins.
CROSS_ENTROPY = {"alpha": 0.0, "gamma": 0.0, "class_weight": None}
MEMBERS: dict[str, dict[str, Any]] = {
    "ce": CROSS_ENTROPY,
    "bwcce": {"alpha": 1.0, "beta": 0.0, "scale": 1.0},
    "focal": {"alpha": 0.0},
    "ldam": {"alpha": 1.0, "beta": 0.0},
    "lmf": {},
    "la": CROSS_ENTROPY,
    "crt": CROSS_ENTROPY,
}
Parameters = dict[str, Array]


class Arrays(NamedTuple):
    """Standardised features float32 (N, D) and labels int (N,) to train on and to choose by."""

    X: Array
    y: Array
    val_X: Array
    val_y: Array


class Heads(NamedTuple):
    """R heads that are trained on the same batches: each leaf has a leading axis (R,)."""

    loss: Any  # of `stack_losses`, of logits (C, B)
    learning_rate: Array
    weight_decay: Array


class Order(NamedTuple):
    """Which examples S seeds are trained on: int (S, E, T, B), and the seeds (S,)."""

    rows: Array
    seeds: Array


class Trained(NamedTuple):
    """The parameters (S, R, …) and number (S, R) of each head's best epoch, and all epochs."""

    parameters: Parameters
    best_epoch: Array
    history: dict[str, Array]  # (S, R, E) each


# --- heads


def start(head: str, key: Array, num_features: int, num_classes: int) -> Parameters:
    """Parameters of a head, drawn as Flax's layers draw theirs."""
    axes = {"in_axis": -1, "out_axis": -2}
    if head == "cosine":
        return {"weight": lecun_normal(**axes)(key, (num_classes, num_features))}
    if head == "linear":
        weight = lecun_normal(**axes)(key, (num_classes, num_features))
        return {"weight": weight, "bias": jnp.zeros((num_classes, 1))}
    first, second = jax.random.split(key)
    return {
        "hidden_weight": he_normal(**axes)(first, (HIDDEN, num_features)),
        "hidden_bias": jnp.zeros((HIDDEN, 1)),
        "weight": lecun_normal(**axes)(second, (num_classes, HIDDEN)),
        "bias": jnp.zeros((num_classes, 1)),
    }


def logits_of(head: str, parameters: Parameters, X: Array) -> Array:
    """Logits (C, N) of features (N, D)."""
    if head == "cosine":
        return unit(parameters["weight"]) @ unit(X).T
    inputs = X.T
    if head == "mlp":
        hidden = parameters["hidden_weight"] @ inputs + parameters["hidden_bias"]
        inputs = jax.nn.relu(hidden)
    return parameters["weight"] @ inputs + parameters["bias"]


def unit(x: Array) -> Array:
    """Rows of length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- losses


def build_loss(name: str, arguments: dict[str, Any], class_counts: Sequence[int]) -> LMFLoss:
    """A trainers' loss, of logits (C, N): its name, and what it takes beside the class counts."""
    loss = LMFLoss(class_counts, axis=0, **MEMBERS[name] | arguments)
    return loss.replace(margins=0 * loss.margins) if name == "bwcce" else loss


def stack(losses: Sequence[Any], settings: Sequence[dict[str, float]]) -> Heads:
    """R heads from as many losses and settings, of a ``learning_rate`` and ``weight_decay``."""
    rates = ([each[name] for each in settings] for name in ("learning_rate", "weight_decay"))
    return Heads(stack_losses(losses), *(jnp.array(rate, jnp.float32) for rate in rates))


def orders(labels: np.ndarray, seeds: int, *, sampler: str, epochs: int, batch_size: int) -> Order:
    """The batches that the trainers of each seed would take from labels (N,)."""
    steps = len(labels) // batch_size
    rows = [
        epoch_order(labels, steps * batch_size, sampler=sampler, seed=seed, epoch=epoch)
        for seed in range(seeds)
        for epoch in range(epochs)
    ]
    shape = (seeds, epochs, steps, batch_size)
    return Order(jnp.array(rows, jnp.int32).reshape(shape), jnp.arange(seeds))


# --- training


@dataclass(frozen=True)
class Recipe:
    """What all heads have in common, and what the program is compiled for."""

    head: str  # one of `HEADS`
    num_classes: int
    decay: tuple[float, ...]  # (E,), what the learning rates are multiplied by in each epoch
    # called when all heads of a seed and a group have ended an epoch
    on_epoch: Callable[[], None] = lambda: None


@partial(jax.jit, static_argnames="recipe")
def train(arrays: Arrays, groups: Sequence[tuple[Heads, Order]], recipe: Recipe) -> list[Trained]:
    """Train every head by Adam with an L2 penalty; choose its epoch by `tuned_macro_f1`.

    Each of the groups is heads with the batches that they share.
    """

    def of_a_seed(heads: Heads, order: Order) -> Trained:
        return jax.vmap(lambda one: fit(arrays, one, order, recipe))(heads)

    return [jax.lax.map(partial(of_a_seed, heads), order) for heads, order in groups]


def fit(arrays: Arrays, head: Heads, order: Order, recipe: Recipe) -> Trained:
    """One head of one seed, of leaves without the axes of R and S."""
    X, y, val_X, val_y = arrays
    log_priors = jnp.log(jnp.bincount(y, length=recipe.num_classes) / len(y))
    optimizer = optax.chain(optax.add_decayed_weights(head.weight_decay), optax.scale_by_adam())

    def loss_of(parameters: Parameters, rows: Array) -> Array:
        return head.loss(logits_of(recipe.head, parameters, X[rows]), y[rows])

    def epoch(carry: Any, now: Any) -> tuple[Any, dict[str, Array]]:
        (number, batches, factor), (state, best) = now, carry

        def step(state: Any, rows: Array) -> tuple[Any, Array]:
            parameters, moments = state
            loss, gradient = jax.value_and_grad(loss_of)(parameters, rows)
            updates, moments = optimizer.update(gradient, moments, parameters)
            rate = -head.learning_rate * factor
            updates = jax.tree.map(lambda update: rate * update, updates)
            return (optax.apply_updates(parameters, updates), moments), loss

        state, losses = jax.lax.scan(step, state, batches)
        logits = logits_of(recipe.head, state[0], val_X)
        tuned = tuned_macro_f1(logits, val_y, log_priors)
        found = (tuned, number, state[0])
        best = jax.tree.map(partial(jnp.where, tuned > best[0]), found, best)
        jax.debug.callback(recipe.on_epoch)
        return (state, best), {
            "train_loss": losses.mean(),
            "val_loss": head.loss(logits, val_y),
            "val_macro_f1": macro_f1(logits, val_y),
            "val_macro_f1_tuned": tuned,
            "val_accuracy": (logits.argmax(0) == val_y).mean(),
        }

    key = jax.random.key(order.seeds)
    parameters = start(recipe.head, key, X.shape[1], recipe.num_classes)
    state, best = (parameters, optimizer.init(parameters)), (-1.0, 0, parameters)
    epochs = (jnp.arange(1, len(recipe.decay) + 1), order.rows, jnp.array(recipe.decay))
    (_, best), history = jax.lax.scan(epoch, (state, best), epochs)
    return Trained(best[2], best[1], history)


def tuned_macro_f1(logits: Array, labels: Array, log_priors: Array) -> Array:
    """The best macro-F1 of the logits (C, N) less τ log π, of all τ; log π (C,)."""

    def score(tau: Array) -> Array:
        return macro_f1(logits - tau * log_priors[:, None], labels)

    return jax.lax.map(score, jnp.array(TAUS, logits.dtype)).max()


def macro_f1(logits: Array, labels: Array) -> Array:
    """The mean of the classes' F1, of which a class that is never found has 0: (C, N), (N,)."""
    classes = jnp.arange(len(logits))[:, None]
    true, predicted = labels == classes, logits.argmax(0) == classes
    members = true.sum(1) + predicted.sum(1)
    return (2 * (true & predicted).sum(1) / jnp.maximum(members, 1)).mean()
