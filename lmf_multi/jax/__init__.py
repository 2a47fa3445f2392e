"""The loss for JAX: pure functions, called as optax's losses are, equal to the reference.

jit, vmap, grad, jacfwd, hessian; float64 (x64) to bfloat16; strict dtype promotion.
"""

from lmf_multi._extras import require

require("jax")

from lmf_multi.jax._functional import (  # noqa: E402
    focal_loss,
    ldam_loss,
    lmf_loss,
    sigmoid_lmf_loss,
)
from lmf_multi.jax._losses import FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss  # noqa: E402

__all__ = [
    "FocalLoss",
    "LDAMLoss",
    "LMFLoss",
    "SigmoidLMFLoss",
    "focal_loss",
    "ldam_loss",
    "lmf_loss",
    "sigmoid_lmf_loss",
]
