"""The PyTorch models: a small CNN and libraries' networks, their last layer for other classes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from examples.models import efficientnet_lite
from examples.models.common import HEADS, WIDTHS, check, fitting, starting_weights
from examples.training.settings import MEAN, STD, TORCH_ARCHS
from lmf_multi._extras import require
from lmf_multi.torch import CosineLinear


def build(
    arch: str,
    num_classes: int,
    *,
    head: str = "linear",
    pretrained: bool = False,
    weights: str | Path | None = None,
) -> nn.Module:
    """A network on the CPU: float (N, 3, H, W), as `normalize` makes it, to logits (N, C).

    Args:
        arch: one of ``settings.TORCH_ARCHS``.
        num_classes: C.
        head: ``linear``, or ``cosine`` for `lmf_multi.torch.CosineLinear`.
        pretrained: start from ImageNet's weights, with a new head.
        weights: start from a file: a state dict, or a checkpoint that holds one as ``model``. Its
            head is taken if it is of the same kind and size.

    Raises:
        ConnectionError: the ImageNet weights cannot be downloaded.
        FileNotFoundError: ``weights`` is no file.
        ModuleNotFoundError: torchvision or timm is absent.
        ValueError: a value that is none of those above, or a file of another network.
    """
    check(arch, head, pretrained, weights, TORCH_ARCHS)
    if pretrained and arch == "efficientnet_lite0":
        state_dict = efficientnet_lite.imagenet_weights()
    else:
        state_dict = starting_weights(arch, pretrained, weights)
    model = network(arch, num_classes)
    if head == "cosine":
        parent, _, name = HEADS[arch].rpartition(".")
        in_features = model.get_submodule(HEADS[arch]).in_features
        setattr(model.get_submodule(parent), name, CosineLinear(in_features, num_classes))
    if state_dict is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(fitting(state_dict, shapes, HEADS[arch]), strict=False)
    return model


def network(arch: str, num_classes: int) -> nn.Module:
    """With random weights and a linear head."""
    if arch == "small":
        return small(num_classes)
    if arch == "efficientnet_lite0":
        return efficientnet_lite.build(num_classes)
    return torchvision_model(arch, num_classes)


def small(num_classes: int) -> nn.Sequential:
    """Four convolutions for images of 28 to 64 pixels, 0.4 million parameters."""
    model = nn.Sequential()
    model.features = nn.Sequential(
        stage(3, WIDTHS[0], stride=2),
        stage(WIDTHS[0], WIDTHS[1]),
        stage(WIDTHS[1], WIDTHS[2]),
        stage(WIDTHS[2], WIDTHS[3], pool=False),
    )
    model.pool = nn.AdaptiveAvgPool2d(1)
    model.flatten = nn.Flatten()
    model.head = nn.Linear(WIDTHS[3], num_classes)
    return model


def stage(in_channels: int, out_channels: int, stride: int = 1, pool: bool = True) -> nn.Sequential:
    """Convolution, batch norm, ReLU, and perhaps half the pixels."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    layers = [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def torchvision_model(arch: str, num_classes: int) -> nn.Module:
    """Torchvision's network with random weights; torchvision is imported only for these."""
    require("torchvision", f"--arch {arch}", "torchvision")
    from torchvision.models import get_model

    return get_model(arch, weights=None, num_classes=num_classes)


def normalize(images: Tensor) -> Tensor:
    """Pixels uint8 (N, H, W, 3) to float32 (N, 3, H, W) of ImageNet's mean 0 and deviation 1.

    The result keeps the order of the pixels in memory: it is channels_last.
    """
    # numbers, since a copy of tensors to a GPU would wait for it
    colours = [(images[..., c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(colours, dim=-1).permute(0, 3, 1, 2)
