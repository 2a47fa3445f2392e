"""The trained networks of three frameworks in PyTorch, as Grad-CAM wants them.

Flax's networks have the logits of PyTorch's of the same weights, so these stand for them; Keras'
are run on Keras' PyTorch backend.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.models import torch as models_torch
from examples.study.planning import Study, Training
from examples.training.checkpoints import Checkpoints

FEWEST_PIXELS = 3  # a side of a map, of which the deepest layer that has them is taken
# By their names in PyTorch, each with half the pixels of the next.
LAYERS = {
    "small": ("features.3", "features.2", "features.1", "features.0"),
    "resnet50": ("layer4", "layer3", "layer2", "layer1"),
    "efficientnet_v2_s": ("features.7", "features.5", "features.3", "features.2"),
    "densenet121": ("features", "features.denseblock3", "features.denseblock2"),
    "efficientnet_lite0": ("blocks.6", "blocks.4", "blocks.2", "blocks.1"),
}


@dataclass(frozen=True)
class Network:
    """A trained network on the CPU, in evaluation: pixels uint8 (N, S, S, 3) to logits (N, C)."""

    model: nn.Module  # of what its first layers take, channels first
    prepare: Callable[[Tensor], Tensor]  # makes that of pixels
    layer: nn.Module  # whose output (N, channels, height, width) the map is of


def load(study: Study, training: Training, image_size: int) -> Network:
    """The network of the best epoch."""
    result = study.result(training)
    checkpoints = Checkpoints(study.out(training) / "checkpoints", print)
    folder = checkpoints.of_epoch(result["best_validation"]["epoch"])
    if not folder.exists():
        raise FileNotFoundError(f"the checkpoint {folder} is not there")
    return from_checkpoint(
        folder,
        framework=training.framework,
        arch=training.arch,
        head=training.settings().head,
        num_classes=len(result["data"]["class_names"]),
        image_size=image_size,
    )


def from_checkpoint(
    folder: Path, *, framework: str, arch: str, head: str, num_classes: int, image_size: int
) -> Network:
    """The network of a checkpoint's folder."""
    if framework == "keras":
        return keras_network(folder / "model.keras")
    build = {"arch": arch, "num_classes": num_classes, "head": head}
    if framework == "torch":
        model = models_torch.build(**build, weights=folder / "checkpoint.pt")
    else:
        model = models_torch.build(**build)
        load_flax(model, folder)
    return torch_network(model, arch, image_size)


def torch_network(model: nn.Module, arch: str, image_size: int) -> Network:
    """A network of `models.torch`."""
    pixels = torch.zeros(1, image_size, image_size, 3)
    layer = deepest(model.eval(), LAYERS[arch], models_torch.normalize(pixels))
    return Network(model, models_torch.normalize, layer)


@torch.no_grad()
def deepest(model: nn.Module, names: Sequence[str], example: Tensor) -> nn.Module:
    """The deepest of the layers whose output is no mere point."""
    large: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if min(output.shape[2:]) >= FEWEST_PIXELS:
            large.append(layer)  # in the order of the pass, so the deepest comes last

    hooks = [model.get_submodule(name).register_forward_hook(look) for name in names]
    model(example)
    for hook in hooks:
        hook.remove()
    return large[-1]


def load_flax(model: nn.Module, folder: Path) -> None:
    """Give a network of `models.torch` what a checkpoint has of the Flax network of that name."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading a file needs no accelerator
    from examples.models import flax as models_flax
    from examples.trained.flax import variables

    saved = models_flax.as_torchvision(variables(folder).items())
    weights = {name: torch.tensor(array) for name, array in saved.items()}
    # which Flax does not count
    tracked = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(tracked | weights)


def keras_network(file: Path) -> Network:
    """A saved Keras model, of whichever backend, on PyTorch's.

    Raises:
        ValueError: Keras was imported before, on another backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"  # which it reads when it is imported
    import keras

    import lmf_multi.keras  # noqa: F401 - so that Keras knows CosineLinear

    if keras.backend.backend() != "torch":
        raise ValueError(
            "maps of Keras' networks need Keras on PyTorch, but it was imported on "
            f"{keras.backend.backend()} before"
        )
    with keras.device("cpu"):
        model = keras.saving.load_model(file, compile=False)
    network = halves(model).eval()
    return Network(network, channels_first, network[0])


def halves(model: Any) -> nn.Sequential:
    """A Keras model on PyTorch in two parts, of which the first ends as `deepest` has it.

    It ends where nothing leads past it, which Keras finds out: elsewhere it can make no second.
    """
    for layer in reversed(model.layers):
        x = layer.output
        if len(x.shape) == 4 and min(x.shape[1:3]) >= FEWEST_PIXELS:
            with suppress(ValueError):
                second = type(model)(x, model.output)
                return nn.Sequential(KerasPart(type(model)(model.input, x)), KerasPart(second))
    raise ValueError(f"maps need {FEWEST_PIXELS} pixels a side, which no layer's output has")


class KerasPart(nn.Module):
    """Has its channels first outside, as Grad-CAM has them."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same of other sizes, or to logits (N, C)."""
        y = self.part(x.permute(0, 2, 3, 1), training=False).float()  # NumPy has no bfloat16
        return y.permute(0, 3, 1, 2) if y.ndim == 4 else y


def channels_first(pixels: Tensor) -> Tensor:
    """Pixels uint8 (N, S, S, 3) to float32 (N, 3, S, S)."""
    return pixels.permute(0, 3, 1, 2).float()
