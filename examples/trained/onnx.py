"""ONNX of a network in PyTorch, by PyTorch's exporter."""

from pathlib import Path

import torch
from torch import nn


def write(model: nn.Module, image_size: int, file: Path) -> None:
    """Write a network from ``pixels`` uint8 (N, S, S, 3), any N, to ``logits`` float32 (N, C).

    Args:
        model: on the CPU, in evaluation.
        image_size: S.
        file: one, weights and all; up to 2 GB.
    """
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)  # 1 would be a constant
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=[{0: torch.export.Dim("N")}],
        external_data=False,
        verbose=False,
    )
    assert program is not None  # as with dynamo=False
    program.save(file)
