"""The demo's Flax NNX step, with optax."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.data.digits import Digits, Recipe
from lmf_multi import class_counts
from lmf_multi.jax import LMFLoss

adam = functools.cache(optax.adam)  # the same object for every seed, so no seed recompiles


class CNN(nnx.Module):
    """Two convolutions, one pooling, two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.conv1(images))
        hidden = nnx.relu(self.conv2(hidden))
        hidden = nnx.max_pool(hidden, (2, 2), strides=(2, 2))
        hidden = nnx.relu(self.dense1(hidden.reshape(len(hidden), -1)))
        return self.dense2(hidden)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch, as LMFLoss gives it."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, criterion, images, labels):
    """Update the model in place; return the batch's loss."""
    value, grads = nnx.value_and_grad(lambda model: criterion(model(images), labels))(model)
    optimizer.update(model, grads)
    return value


def train(
    digits: Digits, loss: str, recipe: Recipe, on_epoch: Callable[[float], None]
) -> np.ndarray:
    """Train with cross-entropy or LMF; report each epoch's mean loss; predict the test images."""
    shuffle = np.random.default_rng(recipe.seed)
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)

    model = CNN(nnx.Rngs(recipe.seed))
    optimizer = nnx.Optimizer(model, adam(recipe.learning_rate), wrt=nnx.Param)
    if loss == "LMF":
        criterion = LMFLoss(class_counts(digits.train_labels))
    else:
        criterion = jax.tree_util.Partial(cross_entropy)  # a function as a pytree, as LMFLoss is

    for _ in range(recipe.epochs):
        losses = []
        order = shuffle.permutation(len(labels))
        for start in range(0, len(order), recipe.batch_size):
            batch = order[start : start + recipe.batch_size]
            losses.append(train_step(model, optimizer, criterion, images[batch], labels[batch]))
        on_epoch(float(jnp.mean(jnp.stack(losses))))

    return np.asarray(model(digits.test_images).argmax(-1))
