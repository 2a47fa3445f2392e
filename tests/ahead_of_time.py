"""Compile every kernel that a list of calls launches, for GPUs that are not here.

``python -m tests.ahead_of_time 80`` prints a line of JSON for each, for compute capability 8.0;
without TRITON_INTERPRET, which replaces the compiler. Triton brings NVIDIA's assembler, which says
how many registers a kernel takes.
"""

import json
import re
import sys

import torch

from examples.bench.gpu_compiler import resources, without_a_gpu
from lmf_multi.torch._triton import fused_loss
from tests.adapters import torch_batch

SHAPES = {
    "wide": (64, 1000),
    "narrow": (64, 7),
    "long": (8, 8142),
    "longest": (8, 16384),
    "most of all": (8, 4096),
    "in blocks": (4, 40000),
    "pixels": (2, 5, 64, 64),
    "channels last": (2, 5, 64, 64),
    "voxels": (2, 4, 8, 16, 16),
}


def calls():
    """Arguments of ``launch``, which make the kernel take every path through its flags."""
    for shape in SHAPES:
        yield {"shape": shape, "dtype": "float32"}
    for shape in ("wide", "pixels", "in blocks"):
        yield {"shape": shape, "dtype": "bfloat16"}
        yield {"shape": shape, "dtype": "float64"}
        for options in ({"alpha": 0.0}, {"beta": 0.0}, {"weighted": False}, {"reduction": "none"}):
            yield {"shape": shape, "dtype": "float32", **options}
        yield {"shape": shape, "dtype": "float16", "reduction": "sum", "masked": True}
        yield {"shape": shape, "dtype": "float32", "adjusted": True}
    for shape in ("wide", "pixels", "most of all"):
        yield {"shape": shape, "dtype": "bfloat16", "soft": True}
        yield {"shape": shape, "dtype": "float32", "soft": True, "label_smoothing": 0.1}
        yield {"shape": shape, "dtype": "float32", "label_smoothing": 0.1}
        yield {"shape": shape, "dtype": "float32", "label_smoothing": 0.1, "adjusted": True}
    for shape in ("wide", "pixels"):
        yield {"shape": shape, "dtype": "float64", "label_smoothing": 0.1}


def launch(shape, dtype, soft=False, weighted=True, masked=False, adjusted=False, **options):
    """The loss and its gradient; nothing runs, so that their values mean nothing."""
    z = torch.zeros(SHAPES[shape], dtype=getattr(torch, dtype))
    if shape == "channels last":
        z = z.contiguous(memory_format=torch.channels_last)
    y = torch.zeros_like(z) if soft else torch.zeros_like(z[:, 0], dtype=torch.int64)
    Δ = torch.zeros(z.shape[1], dtype=torch.float64)
    numbers = {"alpha": 1.5, "beta": 1.0, "gamma": 1.5, "scale": 30.0, "label_smoothing": 0.0}
    reduction = options.pop("reduction", "mean")
    where = torch.ones(z[:, 0].shape, dtype=torch.bool) if masked else None
    options, ignored = numbers | options, None if soft else -100
    w, o = Δ if weighted else None, Δ if adjusted else None
    batch = torch_batch(y, Δ, w, o, options.values(), (1, where, ignored, "", reduction))
    fused_loss(z.requires_grad_(), batch).sum().backward()


def report(log, ptx):
    """Registers of a thread, bytes spilt from them to local memory, accesses to the device's."""
    return {
        **resources(log),
        "loads": re.findall(r"ld\.global\S*", ptx),
        "stores": re.findall(r"st\.global\S*", ptx),
    }


def main(capability):
    compiled = []
    without_a_gpu(capability, lambda *launched: compiled.append(launched))
    for call in calls():
        compiled.clear()
        launch(**call)
        passes = iter(("forward", "backward"))
        for name, log, result in compiled:
            name = next(passes) if name == "mixture" else name
            if log:
                found = report(log, result.asm["ptx"])
                print(json.dumps({**call, "kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
