"""The loss for JAX: pure functions, called as optax's losses are, equal to the reference.

jit, vmap, grad, jacfwd, hessian; float64 (x64) to bfloat16; strict dtype promotion.
``CosineLinear`` is a Flax NNX module; flax is imported when it is first used.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lmf_multi._extras import require

if TYPE_CHECKING:
    from lmf_multi.jax._heads import CosineLinear

require("jax")

from lmf_multi.jax._functional import focal_loss, ldam_loss, lmf_loss, sigmoid_lmf_loss  # noqa: E402
from lmf_multi.jax._losses import (  # noqa: E402
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    SigmoidLMFLoss,
    stack_losses,
)

__all__ = ["FocalLoss", "LDAMLoss", "LMFLoss", "SigmoidLMFLoss", "stack_losses"]
__all__ += ["focal_loss", "ldam_loss", "lmf_loss", "sigmoid_lmf_loss"]

# so that ``import *`` and dir() offer only what is there
if find_spec("flax") is not None:
    __all__ += ["CosineLinear"]


def __getattr__(name: str) -> Any:
    if name != "CosineLinear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("flax", "lmf_multi.jax.CosineLinear", "flax")
    from lmf_multi.jax._heads import CosineLinear

    return CosineLinear


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
