"""ResNet-50, EfficientNetV2-S, DenseNet-121 and the small CNN in Flax NNX.

Every layer has the name that it has in torchvision, so that `flax.load_torchvision` finds it
without a table; padding, epsilons and probabilities are torchvision's too. Images and features are
(N, H, W, channels), logits (N, C).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from examples.models.common import WIDTHS

# Makes a network's last layer, of a number of features and how far to draw its weights.
Head = Callable[..., nnx.Module]


class BatchNorm(nnx.BatchNorm):
    """Batch norm as PyTorch has it: in float32 inside, and with an unbiased running variance.

    Under ``jit`` with a sharded batch the statistics are those of the whole batch.

    Raises:
        ValueError: one value for each feature, of which training can take no variance.
    """

    def __call__(self, x: Array) -> Array:
        """x (N, H, W, features) to the same shape and dtype."""
        if self.use_running_average:
            return super().__call__(x).astype(x.dtype)
        n = x.size // x.shape[-1]
        if n < 2:
            raise ValueError(
                f"batch norm must train on more than one value a feature, got shape {x.shape}; "
                "use a larger batch or larger images"
            )
        # Flax adds momentum · variance + (1 − momentum) · mean square deviation; this way around
        # the second term alone is multiplied by n / (n − 1)
        self.var[...] = self.var[...] * (n - 1) / n
        y = super().__call__(x).astype(x.dtype)
        self.var[...] = self.var[...] * n / (n - 1)
        return y


@dataclass(frozen=True)
class Layers:
    """Makes the layers of a network, with what they have in common."""

    rngs: nnx.Rngs
    dtype: Any  # of the computation; parameters are float32
    epsilon: float = 1e-5
    fan: str = "fan_out"  # which of its two sizes keeps the variance of a convolution

    def conv(
        self,
        in_features: int,
        out_features: int,
        size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        use_bias: bool = False,
    ) -> nnx.Conv:
        """A square convolution, padded alike on all sides, which SAME is not when it strides."""
        return nnx.Conv(
            in_features,
            out_features,
            (size, size),
            stride,
            padding=size // 2,
            feature_group_count=groups,
            use_bias=use_bias,
            kernel_init=nnx.initializers.variance_scaling(2.0, self.fan, "normal"),
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, features: int) -> BatchNorm:
        """Batch norm, whose momentum PyTorch calls 0.1."""
        return BatchNorm(features, momentum=0.9, epsilon=self.epsilon, rngs=self.rngs)

    def conv_norm(self, *sizes: int, act: Callable[[Array], Array] | None, **options: Any) -> Any:
        """Convolution, batch norm and perhaps an activation."""
        layers = [self.conv(*sizes, **options), self.norm(sizes[1])]
        return nnx.Sequential(*layers, *([act] if act else []))


half = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
stem_pool = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def global_mean(x: Array) -> Array:
    """(N, H, W, D) to (N, D), in float32 at least."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Small(nnx.Module):
    """Four convolutions for images of 28 to 64 pixels, 0.4 million parameters."""

    def __init__(self, head: Head, rngs: nnx.Rngs, dtype: Any):
        layers = Layers(rngs, dtype)

        def stage(*sizes: int) -> nnx.Sequential:
            return layers.conv_norm(*sizes, act=nnx.relu)

        self.features = nnx.Sequential(
            stage(3, WIDTHS[0], 3, 2),
            stage(WIDTHS[0], WIDTHS[1], 3),
            stage(WIDTHS[1], WIDTHS[2], 3),
            stage(WIDTHS[2], WIDTHS[3], 3),
        )
        self.head = head(WIDTHS[3])

    def __call__(self, x: Array) -> Array:
        """Logits."""
        *stages, last = self.features.layers
        for stage in stages:
            x = half(stage(x))
        return self.head(global_mean(last(x)))


# --- ResNet: He et al., arXiv 1512.03385, with the stride in the 3×3 convolution


class Bottleneck(nnx.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, layers: Layers, in_features: int, width: int, stride: int):
        out_features = 4 * width
        self.conv1, self.bn1 = layers.conv(in_features, width, 1), layers.norm(width)
        self.conv2, self.bn2 = layers.conv(width, width, 3, stride), layers.norm(width)
        self.conv3, self.bn3 = layers.conv(width, out_features, 1), layers.norm(out_features)
        if stride != 1 or in_features != out_features:
            self.downsample = layers.conv_norm(in_features, out_features, 1, stride, act=None)
        else:
            self.downsample = nnx.Sequential()  # the identity

    def __call__(self, x: Array) -> Array:
        """x plus what the convolutions add, then ReLU."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        return nnx.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nnx.Module):
    """torchvision.models.resnet50."""

    def __init__(self, head: Head, rngs: nnx.Rngs, dtype: Any):
        layers = Layers(rngs, dtype)

        def stage(in_features: int, width: int, depth: int, stride: int) -> nnx.Sequential:
            first = Bottleneck(layers, in_features, width, stride)
            return nnx.Sequential(
                first, *(Bottleneck(layers, 4 * width, width, 1) for _ in range(depth - 1))
            )

        self.conv1, self.bn1 = layers.conv(3, 64, 7, 2), layers.norm(64)
        self.layer1 = stage(64, 64, 3, 1)
        self.layer2 = stage(256, 128, 4, 2)
        self.layer3 = stage(512, 256, 6, 2)
        self.layer4 = stage(1024, 512, 3, 2)
        self.fc = head(2048)

    def __call__(self, x: Array) -> Array:
        """Logits."""
        x = stem_pool(nnx.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(global_mean(x))


# --- EfficientNetV2: Tan and Le, arXiv 2104.00298


class SqueezeExcitation(nnx.Module):
    """Scales every feature by what the whole image says of it."""

    def __init__(self, layers: Layers, features: int, squeezed: int):
        self.fc1 = layers.conv(features, squeezed, 1, use_bias=True)
        self.fc2 = layers.conv(squeezed, features, 1, use_bias=True)

    def __call__(self, x: Array) -> Array:
        """x (N, H, W, features) times (N, 1, 1, features) in [0, 1]."""
        scale = nnx.silu(self.fc1(x.mean((1, 2), keepdims=True)))
        return x * nnx.sigmoid(self.fc2(scale))


class MBConv(nnx.Module):
    """An inverted bottleneck; fused, it has one full convolution in place of a depthwise one."""

    def __init__(
        self,
        layers: Layers,
        in_features: int,
        out_features: int,
        *,
        stride: int,
        expand: int,
        fused: bool,
        drop_rate: float,
    ):
        wide, silu = in_features * expand, nnx.silu
        if fused and expand == 1:
            block = [layers.conv_norm(in_features, out_features, 3, stride, act=silu)]
        elif fused:
            block = [
                layers.conv_norm(in_features, wide, 3, stride, act=silu),
                layers.conv_norm(wide, out_features, 1, act=None),
            ]
        else:
            block = [
                layers.conv_norm(in_features, wide, 1, act=silu),
                layers.conv_norm(wide, wide, 3, stride, act=silu, groups=wide),
                SqueezeExcitation(layers, wide, in_features // 4),
                layers.conv_norm(wide, out_features, 1, act=None),
            ]
        self.block = nnx.Sequential(*block)
        self.shortcut = stride == 1 and in_features == out_features
        # stochastic depth: the block is left out of whole images
        self.drop = nnx.Dropout(drop_rate, broadcast_dims=(1, 2, 3), rngs=layers.rngs)

    def __call__(self, x: Array) -> Array:
        """The block, beside a shortcut where sizes allow it."""
        y = self.block(x)
        return x + self.drop(y) if self.shortcut else y


class EfficientNetV2S(nnx.Module):
    """torchvision.models.efficientnet_v2_s."""

    # fused, expand, stride of the first block, features in and out, blocks
    STAGES = (
        (True, 1, 1, 24, 24, 2),
        (True, 4, 2, 24, 48, 4),
        (True, 4, 2, 48, 64, 4),
        (False, 4, 2, 64, 128, 6),
        (False, 6, 1, 128, 160, 9),
        (False, 6, 2, 160, 256, 15),
    )

    def __init__(self, head: Head, rngs: nnx.Rngs, dtype: Any):
        layers = Layers(rngs, dtype, epsilon=1e-3)
        stages, block, blocks = [], 0, sum(depth for *_, depth in self.STAGES)
        for fused, expand, first_stride, in_features, out_features, depth in self.STAGES:
            stage = []
            for i in range(depth):
                stage.append(
                    MBConv(
                        layers,
                        out_features if i else in_features,
                        out_features,
                        stride=1 if i else first_stride,
                        expand=expand,
                        fused=fused,
                        drop_rate=0.2 * block / blocks,
                    )
                )
                block += 1
            stages.append(nnx.Sequential(*stage))
        self.features = nnx.Sequential(
            layers.conv_norm(3, 24, 3, 2, act=nnx.silu),
            *stages,
            layers.conv_norm(256, 1280, 1, act=nnx.silu),
        )
        self.classifier = nnx.Sequential(nnx.Dropout(0.2, rngs=rngs), head(1280, fan="fan_out"))

    def __call__(self, x: Array) -> Array:
        """Logits."""
        return self.classifier(global_mean(self.features(x)))


# --- DenseNet: Huang et al., arXiv 1608.06993


class DenseLayer(nnx.Module):
    """Adds features to those before it."""

    def __init__(self, layers: Layers, in_features: int, growth: int):
        self.norm1 = layers.norm(in_features)
        self.conv1 = layers.conv(in_features, 4 * growth, 1)
        self.norm2 = layers.norm(4 * growth)
        self.conv2 = layers.conv(4 * growth, growth, 3)

    def __call__(self, x: Array) -> Array:
        """x with its new features behind it."""
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], axis=-1)


class Transition(nnx.Module):
    """Half the features, half the pixels each way."""

    def __init__(self, layers: Layers, in_features: int):
        self.norm = layers.norm(in_features)
        self.conv = layers.conv(in_features, in_features // 2, 1)

    def __call__(self, x: Array) -> Array:
        """(N, H, W, features) to (N, H // 2, W // 2, features // 2)."""
        return nnx.avg_pool(self.conv(nnx.relu(self.norm(x))), (2, 2), strides=(2, 2))


class DenseNet121(nnx.Module):
    """torchvision.models.densenet121."""

    DEPTHS, GROWTH = (6, 12, 24, 16), 32

    def __init__(self, head: Head, rngs: nnx.Rngs, dtype: Any):
        layers, features = Layers(rngs, dtype, fan="fan_in"), 64
        named = {"conv0": layers.conv(3, features, 7, 2), "norm0": layers.norm(features)}
        for i, depth in enumerate(self.DEPTHS, start=1):
            block = {}
            for j in range(1, depth + 1):
                block[f"denselayer{j}"] = DenseLayer(layers, features, self.GROWTH)
                features += self.GROWTH
            named[f"denseblock{i}"] = nnx.Dict(block)
            if i < len(self.DEPTHS):
                named[f"transition{i}"] = Transition(layers, features)
                features //= 2
        self.features = nnx.Dict(named | {"norm5": layers.norm(features)})
        self.classifier = head(features)

    def __call__(self, x: Array) -> Array:
        """Logits."""
        features = self.features
        x = stem_pool(nnx.relu(features["norm0"](features["conv0"](x))))
        for i, depth in enumerate(self.DEPTHS, start=1):
            for j in range(1, depth + 1):
                x = features[f"denseblock{i}"][f"denselayer{j}"](x)
            if i < len(self.DEPTHS):
                x = features[f"transition{i}"](x)
        return self.classifier(global_mean(nnx.relu(features["norm5"](x))))
