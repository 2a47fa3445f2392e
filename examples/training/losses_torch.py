"""Cross-entropy in PyTorch; the other losses are the library's."""

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CrossEntropy(nn.Module):
    """PyTorch's weighted cross-entropy: the mean over the class weight of all processes' batch."""

    def __init__(self, weight: np.ndarray, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float32), persistent=False)

    def forward(
        self, logits: Tensor, labels: Tensor, normalizers: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of logits (N, C) and labels, or a part's share of a batch's.

        Labels are int64 (N,), or distributions float (N, C).
        """
        logits = logits.float()  # as autocast would
        of_all = partial(
            cross_entropy, logits, labels, self.weight, label_smoothing=self.label_smoothing
        )
        if normalizers is None and labels.ndim == 1 and not dist.is_initialized():
            return of_all()
        total, _ = normalizers or self.normalizers(labels)
        loss = of_all(reduction="sum") / total
        # DDP divides the gradients by that number
        return dist.get_world_size() * loss if dist.is_initialized() else loss

    def normalizers(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Total class weight of the labels of all processes, as the library's losses have it."""
        total = (self.weight[labels] if labels.ndim == 1 else labels @ self.weight).sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total, total
