"""What ``bench_loss`` measures in Keras on TensorFlow: forward and backward, compiled by XLA."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from examples.bench.measure import Run
from examples.bench.measure import host_clock as clock  # noqa: F401  how calls are timed
from lmf_multi import LMFSpec
from lmf_multi.keras import LMFLoss

if keras.backend.backend() != "tensorflow":
    raise SystemExit(
        "bench_loss measures Keras on TensorFlow, "
        f"got the backend {keras.backend.backend()!r}; --framework jax and torch measure those"
    )

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def contenders(shape: tuple[int, ...], dtype: str, device: str) -> dict[str, Run]:
    """Names, and what runs one forward and backward pass on fixed logits and labels.

    ``shape`` is PyTorch's (N, C, …); the class axis is last here. XLA inside TensorFlow does not
    tell how much memory it takes.
    """
    z, y = inputs(shape, dtype)
    copy = tf.function(lambda z: tf.identity(z) + tf.zeros([], z.dtype), jit_compile=True)

    def step(compiled: Any, *arrays: tf.Tensor) -> Run:
        def call() -> None:
            tf.nest.map_structure(lambda result: result.numpy(), compiled(*arrays))

        return Run(call, lambda: None)

    runs = {"copy": step(copy, z)}
    for name, loss in losses(shape[1], dtype).items():
        runs[name] = step(compiled(loss), z, y)
    return runs


def prepare(device: str) -> dict[str, float]:
    """Refuse another device than there is."""
    if device == "cuda" and not tf.config.list_physical_devices("GPU"):
        raise SystemExit("TensorFlow finds no GPU")
    return {}


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits with the class axis last, and labels."""
    rng, (N, C, *spatial) = np.random.default_rng(0), shape
    z = tf.cast(rng.normal(size=(N, *spatial, C)), dtype)
    return z, tf.constant(rng.integers(0, C, (N, *spatial)), tf.int32)


def losses(C: int, dtype: str) -> dict[str, Loss]:
    """Mean losses of C classes, long-tailed as in the applications: 1000 to 10."""
    spec = LMFSpec([round(1000 * 100 ** (-j / (C - 1))) for j in range(C)])
    margins, weights = (tf.constant(v, dtype) for v in (spec.margins, spec.weights))

    def published(y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        return published_formula(z, y, margins, weights, spec)

    return {
        "cross-entropy": keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype),
        "published formula": published,
        "ours": LMFLoss.from_spec(spec, dtype=dtype),
    }


def published_formula(
    z: tf.Tensor, y: tf.Tensor, Δ: tf.Tensor, w: tf.Tensor, spec: LMFSpec
) -> tf.Tensor:
    """LMF as it is published: a cross-entropy of shifted, scaled logits and a focal one."""
    is_y, w_y = tf.one_hot(y, z.shape[-1], dtype=z.dtype), tf.gather(w, y)
    shifted = spec.scale * (z - is_y * Δ)
    ldam = w_y * tf.nn.sparse_softmax_cross_entropy_with_logits(y, shifted)
    ce = tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)
    focal = (1 - tf.exp(-ce)) ** spec.gamma * w_y * ce
    ldam = tf.reduce_sum(ldam) / tf.reduce_sum(w_y)
    return spec.alpha * ldam + spec.beta * tf.reduce_mean(focal)


def compiled(loss: Loss) -> Any:
    """Value and gradient."""

    def run(z: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(y, z)
        return value, tape.gradient(value, z)

    return tf.function(run, jit_compile=True)


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    return {"keras": keras.__version__, "tensorflow": tf.__version__}
