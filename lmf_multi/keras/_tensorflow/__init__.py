"""The core of ``lmf_multi.keras`` on TensorFlow, and what Keras' classes ask of it alone."""

from lmf_multi.keras._tensorflow._functional import (
    compute_loss,
    compute_sigmoid_loss,
    sparse_or_soft,
    squeeze,
)
from lmf_multi.keras._tensorflow._replicas import of_whole_batch, over_replicas

__all__ = [
    "compute_loss",
    "compute_sigmoid_loss",
    "of_whole_batch",
    "over_replicas",
    "sparse_or_soft",
    "squeeze",
]
