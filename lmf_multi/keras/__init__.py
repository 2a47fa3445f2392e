"""The loss for Keras 3, on its TensorFlow, JAX and PyTorch backends, equal to the reference.

``model.compile(loss=LMFLoss(class_counts))``; saved models load without ``custom_objects`` once
this module is imported.
"""

from lmf_multi._extras import require

require("keras")

from lmf_multi.keras._callbacks import DeferredReweighting  # noqa: E402
from lmf_multi.keras._functional import focal_loss, ldam_loss, lmf_loss, sigmoid_lmf_loss  # noqa: E402
from lmf_multi.keras._heads import CosineLinear  # noqa: E402
from lmf_multi.keras._losses import FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss  # noqa: E402

__all__ = [
    "CosineLinear",
    "DeferredReweighting",
    "FocalLoss",
    "LDAMLoss",
    "LMFLoss",
    "SigmoidLMFLoss",
]
__all__ += ["focal_loss", "ldam_loss", "lmf_loss", "sigmoid_lmf_loss"]
