"""What the models of three frameworks share: names, limits, and PyTorch's weights files."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.training.settings import ARCHS, TORCH_ARCHS
from lmf_multi._extras import require

WIDTHS = (32, 64, 128, 256)  # channels of small's four convolutions
# The layer of each that gives the logits, by its name in PyTorch.
HEADS = {
    "small": "head",
    "resnet50": "fc",
    "efficientnet_v2_s": "classifier.1",
    "densenet121": "classifier",
    "efficientnet_lite0": "classifier",
}
# Below, a pooling is left without pixels; keras.applications start at 32.
MIN_IMAGE_SIZE = {arch: 32 for arch in TORCH_ARCHS} | {"small": 15}


def check(
    arch: str,
    head: str,
    pretrained: bool,
    weights: str | Path | None,
    archs: Sequence[str] = ARCHS,
) -> None:
    """Refuse what a framework's ``build``, which has these networks, cannot make."""
    if arch not in archs:
        raise ValueError(f"arch must be one of {', '.join(archs)}, got {arch!r}")
    if head not in ("linear", "cosine"):
        raise ValueError(f"head must be linear or cosine, got {head!r}")
    if pretrained and arch == "small":
        raise ValueError(f"pretrained weights exist for {', '.join(archs[1:])}, got small")
    if pretrained and weights is not None:
        raise ValueError(f"pretrained and weights exclude each other, got weights {weights}")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"weights must name a file, got {weights}, which is none")


def check_image_size(arch: str, image_size: int) -> None:
    """Refuse images of which the poolings leave nothing."""
    if image_size < MIN_IMAGE_SIZE[arch]:
        smallest = MIN_IMAGE_SIZE[arch]
        raise ValueError(f"image_size must be at least {smallest} for {arch}, got {image_size}")


def download_failed(arch: str, error: Exception) -> ConnectionError:
    """One sentence for weights that are not to be had."""
    return ConnectionError(
        f"the ImageNet weights of {arch} could not be downloaded ({error}); "
        "--weights FILE takes a local file"
    )


# --- PyTorch's weights, which the Flax models take as well


def starting_weights(
    arch: str, pretrained: bool, weights: str | Path | None
) -> dict[str, Any] | None:
    """The state dict of CPU tensors to start from, or None to start from random weights.

    Raises:
        ConnectionError: torchvision's file cannot be downloaded.
        ModuleNotFoundError: PyTorch is absent, or for ``pretrained`` torchvision.
        ValueError: the file holds no state dict.
    """
    if pretrained:
        return as_torchvision_names(imagenet_weights(arch))
    return None if weights is None else as_torchvision_names(read(weights))


def imagenet_weights(arch: str) -> dict[str, Any]:
    """Torchvision's default ImageNet weights, from its cache or downloaded."""
    require("torchvision", "--pretrained", "torchvision")
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(arch).DEFAULT.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash is another
        raise download_failed(arch, error) from error


def read(file: str | Path) -> dict[str, Any]:
    """A state dict, or the one that a trainer's checkpoint holds as ``model``."""
    require("torch", "--weights")
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"weights must be a file of torch.save, got {file}: {reason}") from error
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not all(map(torch.is_tensor, found.values())):
        raise ValueError(f"weights must hold a state dict, names and tensors; {file} does not")
    return dict(found)


def as_torchvision_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """DenseNet's published file is older than its module, where norm.1 is called norm1."""
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    return {old.sub(r"\1\2", name): tensor for name, tensor in state_dict.items()}


def fitting(
    state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], head: str
) -> dict[str, Any]:
    """What a model takes of a state dict: everything, the head only if it is of its kind and size.

    Args:
        state_dict: arrays by name.
        shapes: the model's shapes by name, in the layout of those arrays.
        head: name of the layer that gives the logits.

    Raises:
        ValueError: beside the head something is missing, of another shape, or not the model's.
    """
    ours, theirs = dict(shapes), {name: tuple(a.shape) for name, a in state_dict.items()}
    if part(ours, head) != part(theirs, head):
        for names in (ours, theirs):
            for name in part(names, head):
                del names[name]
    for name in [*ours, *theirs]:
        if name.endswith("num_batches_tracked"):  # used by no model here, and not in old files
            continue
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"weights must have the model's names and shapes, got {name} of "
                f"{theirs.get(name, 'no shape: it is missing')} where the model has "
                f"{ours.get(name, 'none')}; are they another arch's?"
            )
    return {name: state_dict[name] for name in theirs}


def part(shapes: Mapping[str, tuple[int, ...]], layer: str) -> dict[str, tuple[int, ...]]:
    """The entries of one layer."""
    return {name: shape for name, shape in shapes.items() if name.startswith(f"{layer}.")}
