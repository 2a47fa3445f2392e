"""The losses as modules: arrays from class counts, remembered for ``lmf_loss``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmf_multi._constructors import FocalConstructors, LDAMConstructors, LMFConstructors
from lmf_multi.spec import (
    Counts,
    Floats,
    LMFSpec,
    Reduction,
    Weights,
    check_parameters,
    check_reduction,
    focal_weights,
)
from lmf_multi.torch._functional import masked_loss


class _Loss(nn.Module):
    """Hyper-parameters as attributes, margins and class weights as non-persistent buffers.

    The buffers follow the module from device to device. They stay float64 whatever the module is
    cast to, because a margin rounded to bfloat16 is another margin, and are cast at each call.
    """

    margins: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        margins: Floats | None,
        class_weight: Floats | None,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        scale: float,
        label_smoothing: float,
        ignore_index: int,
        reduction: Reduction,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        for name, values in (("margins", margins), ("class_weight", class_weight)):
            buffer = None if values is None else torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, buffer, persistent=False)
        self.alpha, self.beta, self.gamma, self.scale = alpha, beta, gamma, scale
        self.label_smoothing = label_smoothing
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
        spec = LMFSpec(
            class_counts,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            max_margin=max_margin,
            scale=scale,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
        )
        super().__init__(
            spec.margins,
            None if spec.class_weight is None else spec.weights,
            alpha=spec.alpha,
            beta=spec.beta,
            gamma=spec.gamma,
            scale=spec.scale,
            label_smoothing=spec.label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )


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
        spec = LMFSpec(
            class_counts,
            max_margin=max_margin,
            scale=scale,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
        )
        super().__init__(
            spec.margins,
            None if spec.class_weight is None else spec.weights,
            alpha=1.0,
            beta=0.0,
            gamma=0.0,
            scale=spec.scale,
            label_smoothing=spec.label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )


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
        check_parameters(gamma=gamma, max_margin=max_margin, label_smoothing=label_smoothing)
        super().__init__(
            None,
            focal_weights(class_counts, class_weight, max_margin),
            alpha=0.0,
            beta=1.0,
            gamma=gamma,
            scale=1.0,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
