"""The loss for PyTorch: called as ``torch.nn.functional.cross_entropy`` is, equal to the reference.

CPU and CUDA, float64 to bfloat16, autocast, ``torch.compile(fullgraph=True)``, ``torch.func``,
double backward; no host synchronisation on an accelerator.
"""

from lmf_multi._extras import require

require("torch")

from lmf_multi.torch._functional import focal_loss, ldam_loss, lmf_loss, sigmoid_lmf_loss  # noqa: E402
from lmf_multi.torch._heads import CosineLinear  # noqa: E402
from lmf_multi.torch._modules import FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss  # noqa: E402

__all__ = ["FocalLoss", "LDAMLoss", "LMFLoss", "SigmoidLMFLoss"]
__all__ += ["focal_loss", "ldam_loss", "lmf_loss", "sigmoid_lmf_loss"]
__all__ += ["CosineLinear"]
