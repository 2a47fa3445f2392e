"""Compile every kernel that a list of calls launches, for GPUs that are not here.

``python -m tests.ahead_of_time 80`` prints a line of JSON for each, for compute capability 8.0;
without TRITON_INTERPRET, which replaces the compiler. Triton brings NVIDIA's assembler, which says
how many registers a kernel takes.
"""

import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO

import torch
import triton
from triton.backends.compiler import GPUTarget

from lmf_multi.torch import _triton_kernels
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


class NoDevice:
    """Stands in for the driver of a GPU with this compute capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


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
    for shape in ("wide", "pixels", "most of all"):
        yield {"shape": shape, "dtype": "bfloat16", "soft": True}
        yield {"shape": shape, "dtype": "float32", "soft": True, "label_smoothing": 0.1}
        yield {"shape": shape, "dtype": "float32", "label_smoothing": 0.1}
    for shape in ("wide", "pixels"):
        yield {"shape": shape, "dtype": "float64", "label_smoothing": 0.1}


def launch(shape, dtype, soft=False, weighted=True, masked=False, **options):
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
    w = Δ if weighted else None
    batch = torch_batch(y, Δ, w, options.values(), (1, where, ignored, "", reduction))
    fused_loss(z.requires_grad_(), batch).sum().backward()


def report(log, ptx):
    """Registers of a thread, bytes spilt from them to local memory, accesses to the device's."""
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spilt": r"(\d+) bytes spill stores",
    }
    return {
        **{name: int(re.search(each, log)[1]) for name, each in numbers.items()},
        "loads": re.findall(r"ld\.global\S*", ptx),
        "stores": re.findall(r"st\.global\S*", ptx),
    }


def compile_only(kernel, compiled):
    """Compile at each launch what is new, and keep it with the assembler's log."""
    run = kernel.run

    def warm_up(*args, grid, warmup, **options):
        with redirect_stdout(StringIO()) as log:
            result = run(*args, grid=grid, warmup=True, **options)
        compiled.append((kernel.fn.__name__, log.getvalue(), result.asm["ptx"]))

    kernel.run = warm_up


def main(capability):
    compiled = []
    compile_only(_triton_kernels.mixture, compiled)
    compile_only(_triton_kernels.finish, compiled)
    triton.runtime.driver.set_active(NoDevice(capability))
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    for call in calls():
        compiled.clear()
        launch(**call)
        passes = iter(("forward", "backward"))
        for name, log, ptx in compiled:
            name = next(passes) if name == "mixture" else name
            if log:
                print(json.dumps({**call, "kernel": name, **report(log, ptx)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
