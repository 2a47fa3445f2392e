"""A PyTorch network without its head, whose weights stay as they are."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.models.common import HEADS, check_image_size
from examples.models.torch import build, normalize


def feature_network(
    arch: str, image_size: int, weights: str | Path | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Pixels uint8 (N, S, S, 3) to features float32 (N, D), on the CPU, and a name for caches.

    Args:
        arch: one of ``settings.TORCH_ARCHS``.
        image_size: S.
        weights: a file, as ``models.torch.build`` takes it; by default ImageNet's.

    Raises:
        ConnectionError, FileNotFoundError, ModuleNotFoundError, ValueError: as ``build``.
    """
    check_image_size(arch, image_size)
    model = build(arch, 2, pretrained=weights is None, weights=weights)
    parent, _, name = HEADS[arch].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    model.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def network(pixels: np.ndarray) -> np.ndarray:
        return model(normalize(torch.from_numpy(pixels))).float().numpy()

    if weights is None:
        return network, f"{arch}-imagenet"
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return network, f"{arch}-{digest[:12]}"
