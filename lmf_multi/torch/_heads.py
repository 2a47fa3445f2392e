"""The cosine head, as :func:`lmf_multi.reference.cosine_logits` defines it."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmf_multi._heads import check_features
from lmf_multi.spec import check_whole


class CosineLinear(nn.Module):
    """A classifier head whose logits are cosines, the one that LDAM was published with.

    In place of the last ``torch.nn.Linear``; without bias, and without a scale of its own, since
    the loss's ``scale`` multiplies the logits and the margins alike.

    Args:
        in_features: length D of the feature vectors.
        out_features: number of classes C.
        device: device of ``weight``.
        dtype: dtype of ``weight``.

    ``weight`` is (C, D), drawn with every direction equally likely and lengths near 1. Features are
    (..., D), logits (..., C) in the dtype that features and weight have in common. Half types are
    computed in float32, under autocast too, where logits are float32 like the weight.

    Raises:
        ValueError: a size below 1, or features of another size.
        TypeError: sizes that are not whole numbers, or features that are not in floating point.

    >>> head = CosineLinear(2, 2)
    >>> _ = head.load_state_dict({"weight": torch.tensor([[2.0, 0.0], [-6.0, -8.0]])})
    >>> head(torch.tensor([[3.0, 4.0]]))
    tensor([[ 0.6000, -1.0000]], grad_fn=<MmBackward0>)
    """

    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_whole(1, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Logits (..., C) of features (..., D)."""
        check_features(tuple(input.shape), input.dtype, self.in_features)
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        with _without_autocast(input.device.type):
            return F.linear(_unit(input.to(wide)), _unit(self.weight.to(wide))).to(dtype)

    def extra_repr(self) -> str:
        """What printing a model shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _unit(x: Tensor) -> Tensor:
    # a factor does not change the direction, so none goes through the factor's derivative
    size = x.detach().abs().amax(-1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    # at most 1 / tiny, because compilers multiply by the reciprocal, which would underflow
    x = x / torch.where(size < tiny, 1, size.clamp(max=1 / tiny))
    squares = (x * x).sum(-1, keepdim=True)
    return x / torch.where(squares == 0, 1, squares).sqrt()


def _without_autocast(device: str) -> Any:
    """Some devices, such as meta, know no autocast."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
