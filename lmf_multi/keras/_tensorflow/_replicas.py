"""Totals where a ``tf.distribute`` strategy has split the batch over replicas."""

from typing import Any

import tensorflow as tf


def over_replicas(totals: list[tf.Tensor]) -> list[tf.Tensor]:
    """Totals, () each, of the whole batch from those of a replica."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return totals
    both: list[tf.Tensor] = replica.all_reduce(tf.distribute.ReduceOp.SUM, totals)
    return both


def of_whole_batch(total: tf.Tensor) -> tf.Tensor:
    """A replica's share () of the sum over all, with the gradient of its own part.

    Keras weights the values of replicas by their examples and multiplies them by their number: of
    equal shares it makes the sum, whatever the sizes.
    """
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return total
    (everything,) = over_replicas([tf.stop_gradient(total)])
    share = everything / replica.num_replicas_in_sync

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def shared(total: tf.Tensor) -> Any:
        return tf.identity(share), lambda upstream: upstream

    return shared(total)
