"""The Keras models: a small CNN and `keras.applications`, on TensorFlow, JAX and PyTorch.

They take raw pixels, and prepare them in their first layers: a saved model needs nothing else.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import keras
import numpy as np
from keras import layers

from examples.models.common import WIDTHS, check, check_image_size, download_failed
from examples.training.settings import MEAN, STD
from lmf_multi.keras import CosineLinear

APPLICATIONS = {
    "resnet50": keras.applications.ResNet50,
    "efficientnet_v2_s": keras.applications.EfficientNetV2S,
    "densenet121": keras.applications.DenseNet121,
}


def build(
    arch: str,
    num_classes: int,
    image_size: int,
    *,
    head: str = "linear",
    pretrained: bool = False,
    weights: str | Path | None = None,
) -> keras.Model:
    """A network: pixels (N, S, S, 3) from 0 to 255, of any dtype, to float32 logits (N, C).

    Args:
        arch: one of ``settings.ARCHS``.
        num_classes: C.
        image_size: S.
        head: ``linear``, or ``cosine`` for `lmf_multi.keras.CosineLinear`.
        pretrained: start from Keras' ImageNet weights, with a new head.
        weights: start from the file of such a model, ``.weights.h5`` or ``.keras``. Its head is
            taken if it is of the same kind and size.

    Raises:
        ConnectionError: the ImageNet weights cannot be downloaded.
        FileNotFoundError: ``weights`` is no file.
        ValueError: a value that is none of those above, or a file of another network.
    """
    check(arch, head, pretrained, weights)
    check_image_size(arch, image_size)
    pixels = keras.Input((image_size, image_size, 3), name="pixels")
    features = small(pixels) if arch == "small" else application(arch, pixels, pretrained)
    # under mixed precision the logits stay float32
    make_head = linear if head == "linear" else CosineLinear
    logits = make_head(num_classes, dtype="float32", name="head")(features)
    model = keras.Model(pixels, logits, name=arch)
    if weights is not None:
        load_weights(model, weights)
    return model


def linear(num_classes: int, **options: Any) -> layers.Dense:
    """A linear head, drawn from ±1 / √fan as PyTorch's: LDAM's scale multiplies its logits."""
    draw = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    return layers.Dense(num_classes, kernel_initializer=draw, **options)


def small(x: Any) -> Any:
    """Features of four convolutions, for images of 28 to 64 pixels."""
    x = standardized(x)
    # SAME would pad the convolution that strides on two sides only
    x = layers.ZeroPadding2D(1)(x)
    for i, width in enumerate(WIDTHS):
        x = layers.Conv2D(
            width,
            3,
            strides=1 if i else 2,
            padding="same" if i else "valid",
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal"
            ),
        )(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        x = layers.ReLU()(x)
        if i < len(WIDTHS) - 1:
            x = layers.MaxPooling2D(2)(x)
    return layers.GlobalAveragePooling2D()(x)


def application(arch: str, pixels: Any, pretrained: bool) -> Any:
    """Features of a network of `keras.applications`."""
    make = partial(
        APPLICATIONS[arch], include_top=False, pooling="avg", input_tensor=prepared(arch, pixels)
    )
    network = with_imagenet_weights(arch, make) if pretrained else make(weights=None)
    if arch == "efficientnet_v2_s":
        return layers.Dropout(0.2)(network.output)  # which is left out with its top
    return network.output


def with_imagenet_weights(arch: str, make: Callable[..., keras.Model]) -> keras.Model:
    """The network with Keras' ImageNet weights, from its cache or downloaded."""
    try:
        return make(weights="imagenet")
    except Exception as error:  # a failed download raises no subclass
        raise download_failed(arch, error) from error


def prepared(arch: str, pixels: Any) -> Any:
    """Pixels as the ImageNet weights of an application expect them."""
    if arch == "efficientnet_v2_s":
        return pixels  # it has a layer for that
    return blue_green_red(pixels) if arch == "resnet50" else standardized(pixels)


def standardized(pixels: Any) -> Any:
    """Pixels of ImageNet's mean 0 and deviation 1."""
    mean, std = np.array(MEAN), np.array(STD)
    scale, offset = (1 / (255 * std)).tolist(), (-mean / std).tolist()
    return layers.Rescaling(scale, offset, dtype="float32")(pixels)


def blue_green_red(pixels: Any) -> Any:
    """Pixels of ImageNet's mean 0 and in Caffe's order, with which ResNet50's weights were made."""
    offset = [-103.939, -116.779, -123.68]
    return layers.Rescaling(1.0, offset, dtype="float32")(keras.ops.flip(pixels, -1))


def load_weights(model: keras.Model, file: str | Path) -> None:
    """Take over a file's weights, in place; those of the head if it is of the same kind and size.

    Raises:
        ValueError: the others are not the model's.
    """
    body = keras.Model(model.input, model.layers[-1].input)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping")  # Keras only warns of layers not in the file
        try:
            body.load_weights(file)
        except (ValueError, OSError, KeyError, BadZipFile, UserWarning) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"weights must be a .weights.h5 or .keras file of {model.name}, "
                f"got {file}: {reason}"
            ) from error
        with suppress(ValueError, UserWarning):  # a head of another kind or size stays as it is
            model.load_weights(file)
