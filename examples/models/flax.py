"""The Flax NNX models, which take PyTorch's weights: the same names give the same logits."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from examples.models import flax_networks
from examples.models.common import HEADS, check, fitting, starting_weights
from examples.training.settings import MEAN, STD
from lmf_multi.jax import CosineLinear

NETWORKS = {
    "small": flax_networks.Small,
    "resnet50": flax_networks.ResNet50,
    "efficientnet_v2_s": flax_networks.EfficientNetV2S,
    "densenet121": flax_networks.DenseNet121,
}
# PyTorch's names of what Flax calls so.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def build(
    arch: str,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    head: str = "linear",
    pretrained: bool = False,
    weights: str | Path | None = None,
    dtype: Any = jnp.float32,
) -> nnx.Module:
    """A network: float (N, H, W, 3), as `normalize` makes it, to float32 logits (N, C).

    Args:
        arch: one of ``settings.ARCHS``.
        num_classes: C.
        rngs: draws the parameters, and in training dropout and stochastic depth.
        head: ``linear``, or ``cosine`` for `lmf_multi.jax.CosineLinear`.
        pretrained: start from torchvision's ImageNet weights, with a new head.
        weights: start from PyTorch's file: a state dict, or a checkpoint that holds one as
            ``model``. Its head is taken if it is of the same kind and size.
        dtype: of the computation, such as ``jnp.bfloat16``; parameters, batch norm and the head
            stay float32.

    Raises:
        ConnectionError: the ImageNet weights cannot be downloaded.
        FileNotFoundError: ``weights`` is no file.
        ModuleNotFoundError: PyTorch is absent, which reads the file, or torchvision.
        ValueError: a value that is none of those above, or a file of another network.
    """
    check(arch, head, pretrained, weights)
    state_dict = starting_weights(arch, pretrained, weights)
    make_head = partial(linear if head == "linear" else cosine, num_classes, rngs, dtype)
    model = NETWORKS[arch](make_head, rngs, dtype)
    if state_dict is not None:
        load_torchvision(model, state_dict)
    return model


def linear(
    num_classes: int, rngs: nnx.Rngs, dtype: Any, features: int, fan: str = "fan_in"
) -> nnx.Linear:
    """A linear head, drawn from ±1 / √fan as torchvision's; computes in float32 at least."""
    return nnx.Linear(
        features,
        num_classes,
        kernel_init=nnx.initializers.variance_scaling(1 / 3, fan, "uniform"),
        dtype=jnp.promote_types(dtype, jnp.float32),
        rngs=rngs,
    )


def cosine(
    num_classes: int, rngs: nnx.Rngs, dtype: Any, features: int, fan: str = "fan_in"
) -> CosineLinear:
    """A cosine head, which has its own way of drawing; computes in float32 at least."""
    return CosineLinear(
        features, num_classes, dtype=jnp.promote_types(dtype, jnp.float32), rngs=rngs
    )


def load_torchvision(model: nnx.Module, state_dict: Mapping[str, Any]) -> None:
    """Take over a state dict, in place: parameters and the running statistics of batch norm.

    Args:
        model: what `build` made.
        state_dict: NumPy arrays or CPU tensors by PyTorch's names, from the network of that name;
            convolutions as (out, in, height, width), linear layers as (out, in).

    Raises:
        ValueError: names or shapes are not the model's, beside those of the head.
    """
    variables = {
        torch_name(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    }
    shapes = {name: variable.shape for name, variable in variables.items()}
    arrays = {name: to_flax(np.asarray(array)) for name, array in state_dict.items()}
    head = next(HEADS[arch] for arch, network in NETWORKS.items() if isinstance(model, network))
    for name, array in fitting(arrays, shapes, head).items():
        if name in variables:
            # a copy: on a CPU JAX would share PyTorch's memory, which its training writes over
            variables[name][...] = jnp.array(array, variables[name].dtype, copy=True)


def as_torchvision(variables: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[str, np.ndarray]:
    """The state dict, in NumPy, that `load_torchvision` would make these variables of.

    Args:
        variables: paths and arrays of parameters and running statistics.
    """
    return {torch_name(path): to_torch(np.asarray(array)) for path, array in variables}


def torch_name(path: tuple[Any, ...]) -> str:
    """The name in PyTorch of the variable at a path, where nnx.Sequential has ``layers``."""
    *modules, leaf = (str(part) for part in path if part != "layers")
    return ".".join([*modules, LEAVES[leaf]])


def to_flax(array: np.ndarray) -> np.ndarray:
    """A convolution's (out, in, height, width) to (height, width, in, out), a matrix transposed."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch(array: np.ndarray) -> np.ndarray:
    """The way back."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def normalize(images: Array) -> Array:
    """Pixels uint8 (N, H, W, 3) to float32 of the same shape, ImageNet's mean 0 and deviation 1."""
    pixels = jnp.asarray(images, jnp.float32)
    return (pixels / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
