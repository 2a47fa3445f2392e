"""The network of a finished Keras run, on whichever backend Keras is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import lmf_multi.keras  # noqa: F401 - so that Keras knows CosineLinear
from examples.trained.finished import Finished


def network(run: Finished) -> Callable[[np.ndarray], np.ndarray]:
    """Pixels uint8 (N, S, S, 3) to logits float32 (N, C); compiled anew for each N."""
    return built(run).predict_on_batch


def built(run: Finished) -> Any:
    """The model that was saved, which prepares its pixels itself."""
    return keras.saving.load_model(run.checkpoint / "model.keras", compile=False)


def in_float32(run: Finished) -> Any:
    """The same model where mixed precision computed in bfloat16, which few runtimes have."""
    model = built(run)
    if not run.bf16:
        return model
    config = model.to_json().replace("mixed_bfloat16", "float32")
    exact = keras.models.model_from_json(config)
    exact.set_weights(model.get_weights())
    return exact


def export_savedmodel(run: Finished, file: Path) -> None:
    """Write a folder for ``tf.saved_model.load``, of which ``serve`` takes any N."""
    shape = (None, run.image_size, run.image_size, 3)
    pixels = keras.InputSpec(dtype="uint8", shape=shape, name="pixels")
    in_float32(run).export(file, "tf_saved_model", verbose=False, input_signature=[pixels])


def export_onnx(run: Finished, file: Path) -> None:
    """Write what PyTorch's exporter makes of the model, which is a module of PyTorch there."""
    import torch

    from examples.trained import onnx

    class Evaluation(torch.nn.Module):
        """Keras' batch norm and dropout go by an argument."""

        def __init__(self) -> None:
            super().__init__()
            self.model = in_float32(run)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels, training=False)

    with keras.device("cpu"):
        onnx.write(Evaluation().eval(), run.image_size, file)


EXPORTS = {"savedmodel": export_savedmodel, "onnx": export_onnx}
