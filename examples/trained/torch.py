"""The network of a finished PyTorch run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.models import torch as models
from examples.trained import onnx
from examples.trained.finished import Finished


def network(run: Finished) -> Callable[[np.ndarray], np.ndarray]:
    """Pixels uint8 (N, S, S, 3) to logits float32 (N, C); on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = FromPixels(built(run)).eval().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def logits_of(pixels: np.ndarray) -> np.ndarray:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
            return model(torch.from_numpy(pixels).to(device)).cpu().numpy()

    return logits_of


def built(run: Finished) -> nn.Module:
    """With the checkpoint's weights, on the CPU."""
    model = models.build(run.arch, run.num_classes, head=run.head)
    file = run.checkpoint / "checkpoint.pt"
    # weights_only: a pickle could run code, and runs are passed around
    saved = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    return model


class FromPixels(nn.Module):
    """A network with what stands before it: pixels uint8 (N, S, S, 3) to float32 logits (N, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, then predict."""
        return self.network(models.normalize(pixels)).float()


def export_onnx(run: Finished, file: Path) -> None:
    """Write the network in float32, whatever it was trained in."""
    onnx.write(FromPixels(built(run)).eval(), run.image_size, file)


EXPORTS = {"onnx": export_onnx}
