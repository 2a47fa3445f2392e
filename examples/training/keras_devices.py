"""The devices of Keras' backend: their names and memory, and a batch shared by several of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np

from examples.training.start import check_shares

BACKEND = keras.backend.backend()


def shared(batch_size: int, parts: int = 1) -> AbstractContextManager[Any]:
    """Have all GPUs or TPU cores take a share of each part, where a model is made inside.

    On TensorFlow and JAX; Keras on PyTorch trains on one.

    Raises:
        ValueError: the batch has no equal parts.
    """
    scope: AbstractContextManager[Any] = nullcontext()
    devices = 1
    if BACKEND == "tensorflow":
        strategy = tensorflow_strategy()
        scope, devices = strategy.scope(), strategy.num_replicas_in_sync
    elif BACKEND == "jax" and (devices := len(keras.distribution.list_devices())) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    check_shares(batch_size, devices, "devices", parts)
    return scope


def shared_with(model: keras.Model) -> AbstractContextManager[Any]:
    """Have what is made inside take part where a model does."""
    return model.distribute_strategy.scope() if BACKEND == "tensorflow" else nullcontext()


def tensorflow_strategy() -> Any:
    """The ``tf.distribute.Strategy`` of what is there."""
    import tensorflow as tf

    try:
        tpu = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        return tf.distribute.TPUStrategy(tpu)
    except ValueError:  # there is no TPU
        several = len(tf.config.list_physical_devices("GPU")) > 1
        return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def replicas() -> int:
    """How many devices compute gradients of their own, of their share of a batch."""
    if BACKEND != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def feed(
    batches: Callable[[], Iterator[tuple[np.ndarray, ...]]],
    batch_size: int,
    image_size: int,
    label: tuple[tuple[int, ...], str] = ((), "int64"),
    weighted: bool = False,
) -> Any:
    """Batches of images uint8 (b, S, S, 3) and labels in a form that ``fit`` reads from the first.

    Under a strategy of TensorFlow ``fit`` reads some, and begins again: a generator has lost them.

    Args:
        batches: yields them.
        batch_size: b.
        image_size: S.
        label: shape and dtype of an image's.
        weighted: there are sample weights too, float32 (b,).
    """
    if BACKEND != "tensorflow":
        return batches()
    import tensorflow as tf

    shape, dtype = label
    images = tf.TensorSpec((batch_size, image_size, image_size, 3), tf.uint8)
    signature = (images, tf.TensorSpec((batch_size, *shape), dtype))
    if weighted:
        signature += (tf.TensorSpec((batch_size,), tf.float32),)
    found = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return found.prefetch(tf.data.AUTOTUNE)


def normalize_whole_batches(model: keras.Model) -> None:
    """Have batch norm take the moments of the whole batch where replicas share it."""
    if BACKEND != "tensorflow" or model.distribute_strategy.num_replicas_in_sync == 1:
        return
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True


def over_replicas(x: Any) -> Any:
    """A scalar's sum over a batch's parts, which only TensorFlow's strategies compute apart."""
    if BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()  # None while Keras looks at shapes alone
    return x if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, x)


def name() -> str:
    """What the first device calls itself; ``cpu`` where there is no other."""
    if BACKEND == "jax":
        import jax

        device = jax.devices()[0]
        return "cpu" if device.platform == "cpu" else device.device_kind
    if BACKEND == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpu)["device_name"]
    return "TPU" if tf.config.list_logical_devices("TPU") else "cpu"


def peak_memory() -> int | None:
    """Bytes that the first device held at most; None where they are the host's."""
    if BACKEND == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None
    if BACKEND == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
