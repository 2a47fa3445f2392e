"""What compilers say of the kernel for GPUs that are not here: ``bench_loss --aot sm_90``.

Triton brings NVIDIA's assembler, which tells the registers of a thread and the bytes that it spills
from them to memory. Not with TRITON_INTERPRET, which replaces the compiler.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from examples.bench.measure import Cell, bytes_a_logit
from lmf_multi.torch import LMFLoss, _triton_kernels


@dataclass(frozen=True)
class Program:
    """A pass of the loss, compiled for one shape, and what it moves by its design."""

    architecture: str
    shape: tuple[int, ...]
    dtype: str
    kernel: str  # forward or backward
    registers: int  # of a thread
    spilt: int  # bytes
    stack: int  # bytes
    shared: int  # bytes of a block's memory
    bytes_a_logit: float


class NoDevice:
    """Stands in for the driver of a GPU with this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, told: Callable[[str, str, Any], None]) -> None:
    """Compile at each launch what is new, and tell its name, the assembler's log and the result."""
    run = kernel.run

    def warm_up(*args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with redirect_stdout(StringIO()) as log:
            result = run(*args, grid=grid, warmup=True, **options)
        told(kernel.fn.__name__, log.getvalue(), result)

    kernel.run = warm_up


def without_a_gpu(capability: int, told: Callable[[str, str, Any], None]) -> None:
    """From now on in this process kernels are compiled for that GPU, and run nowhere."""
    for kernel in (_triton_kernels.mixture, _triton_kernels.finish):
        compile_only(kernel, told)
    triton.runtime.driver.set_active(NoDevice(capability))
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True


def resources(log: str) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory, in the assembler's words."""
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spilt": r"(\d+) bytes spill stores",
    }
    return {name: int(re.search(each, log)[1]) for name, each in numbers.items()}


def programs(architecture: str, cells: Sequence[Cell]) -> Iterator[Program]:
    """Both passes of the loss for each shape, with class weights, and its mean."""
    found: dict[int, dict[str, int]] = {}
    launched: list[int] = []

    def told(name: str, log: str, result: Any) -> None:
        if name == "mixture":
            launched.append(id(result))
            if log:  # else it was compiled for an earlier shape
                found[id(result)] = {**resources(log), "shared": result.metadata.shared}

    without_a_gpu(int(architecture.removeprefix("sm_")), told)
    for shape, dtype in cells:
        launched.clear()
        lose(shape, dtype)
        moved = bytes_a_logit(shape, dtype)
        for kernel, program in zip(("forward", "backward"), launched, strict=True):
            yield Program(
                architecture, shape, dtype, kernel, bytes_a_logit=moved[kernel], **found[program]
            )


def lose(shape: tuple[int, ...], dtype: str) -> None:
    """The loss and its gradient, whose values mean nothing, as nothing runs."""
    z = torch.zeros(shape, dtype=getattr(torch, dtype), requires_grad=True)
    y = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    LMFLoss([*range(shape[1], 0, -1)], class_weight="balanced")(z, y).backward()
