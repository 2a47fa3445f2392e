"""The losses as modules: arrays from class counts, remembered for ``lmf_loss``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmf_multi._constructors import (
    FocalConstructors,
    LDAMConstructors,
    LMFConstructors,
    Parameters,
    focal_parameters,
    ldam_parameters,
    lmf_parameters,
)
from lmf_multi.spec import (
    Counts,
    Reduction,
    Weights,
    check_reduction,
)
from lmf_multi.torch._functional import masked_loss


class _Loss(nn.Module):
    """Hyper-parameters as attributes, margins and class weights as non-persistent buffers.

    The buffers follow the module from device to device. They stay float64 whatever the module is
    cast to, because a margin rounded to bfloat16 is another margin, and are cast at each call.
    """

    margins: Tensor | None
    class_weight: Tensor | None

    def __init__(self, parameters: Parameters, ignore_index: int, reduction: Reduction) -> None:
        super().__init__()
        check_reduction(reduction)
        for name in ("margins", "class_weight"):
            values = getattr(parameters, name)
            buffer = None if values is None else torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, buffer, persistent=False)
        self.alpha, self.beta = parameters.alpha, parameters.beta
        self.gamma, self.scale = parameters.gamma, parameters.scale
        self.label_smoothing = parameters.label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, …) and labels, as :func:`lmf_loss` takes them."""
        return masked_loss(
            input,
            target,
            self.margins,
            self.class_weight,
            self.alpha,
            self.beta,
            self.gamma,
            self.scale,
            self.label_smoothing,
            self.ignore_index,
            self.reduction,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Loss":
        device = fn(torch.empty(0)).device
        # MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(device, dtype))
        return self

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, scale={self.scale}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    Args:
        class_counts: training examples of each class (C,), in label order, at least 1 each.
        ignore_index: examples with this integer label take no part.
        reduction: ``"mean"``, ``"batch_mean"``, ``"sum"`` or ``"none"``.

    >>> criterion = LMFLoss([90, 10])
    >>> criterion(torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 1]))
    tensor(0.6874)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = "margin",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = lmf_parameters(
            class_counts, alpha, beta, gamma, max_margin, scale, class_weight, label_smoothing
        )
        super().__init__(parameters, ignore_index, reduction)


class LDAMLoss(LDAMConstructors, _Loss):
    """``ldam_loss`` with margins and class weights from class counts; arguments as ``LMFLoss``.

    >>> LDAMLoss([90, 10], scale=1.0)(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.9741)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = ldam_parameters(class_counts, max_margin, scale, class_weight, label_smoothing)
        super().__init__(parameters, ignore_index, reduction)


class FocalLoss(FocalConstructors, _Loss):
    """``focal_loss`` with class weights; only named class weights need the counts.

    >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.1733)
    """

    def __init__(
        self,
        class_counts: Counts = None,
        *,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = focal_parameters(
            class_counts, gamma, max_margin, class_weight, label_smoothing
        )
        super().__init__(parameters, ignore_index, reduction)
