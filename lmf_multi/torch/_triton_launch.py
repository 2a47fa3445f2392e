"""How the Triton kernel is launched: rows dealt out to programs, and what it is told of them."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmf_multi._terms import Numbers
from lmf_multi.spec import Reduction
from lmf_multi.torch._layout import strides_of
from lmf_multi.torch._preparation import Batch

_TILE = 4096  # elements of a step of a program, 32 for each of its threads
LONGEST_ROW = 2**16  # that stays in registers, in bytes of the dtype of its arithmetic
_BLOCK = 4096  # of a longer row
_FEW_CLASSES = 32  # of whose rows each is a thread's
_WARPS = 2**14  # that fill a GPU several times
_FINISH = 4096  # programs whose sums are added at a time, by 16 warps
_FINISH_FEW = 128  # or by 4, where there are no more


class Pass(NamedTuple):
    """What a pass writes and reads beside logits and labels, as the kernel names it."""

    out: Tensor | None
    statistics: Tensor | None
    grad: Tensor | None = None
    upstream: Tensor | None = None
    coefficients: Tensor | None = None


def forward(z: Tensor, batch: Batch, plan: "Plan") -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, what its terms count for, and statistics of rows that do not fit a block."""
    N, dtype = plan.constants["N"], torch.promote_types(z.dtype, torch.float32)
    statistics = z.new_empty((3, N), dtype=dtype) if plan.is_long else None
    if batch.options.reduction == "none":
        axis = batch.options.axis
        out = z.new_empty(z.shape[:axis] + z.shape[axis + 1 :], dtype=dtype)
        launch(z, batch, plan, Pass(out, statistics))
        return out, None, statistics
    sums = z.new_empty((4, plan.programs), dtype=dtype)
    launch(z, batch, plan, Pass(sums, statistics))
    loss, coefficients = _finish(sums, batch, plan)
    return loss, coefficients, statistics


def _finish(sums: Tensor, batch: Batch, plan: "Plan") -> tuple[Tensor, Tensor]:
    """The reduced loss () of sums (4, programs), and what its two terms count for (2,)."""
    from lmf_multi.torch import _triton_kernels as kernels

    loss, coefficients = sums.new_empty(()), sums.new_empty(2, dtype=torch.float64)
    if sums.shape[1] > 8 * _FINISH:  # more than one program should add
        sums = sums.sum(1, keepdim=True, dtype=torch.float64)
    is_few = sums.shape[1] <= _FINISH_FEW
    weight, examples = batch.options.totals or (None, None)
    totals = _sum(weight, coefficients), _sum(examples, coefficients)
    tensors = (sums, *totals, loss, coefficients)
    constants = {
        "programs": sums.shape[1],
        "alpha": batch.numbers.alpha,
        "beta": batch.numbers.beta,
        "BY_WEIGHT": batch.options.reduction == "mean",
        "BY_EXAMPLES": batch.options.reduction in ("mean", "batch_mean"),
        "BLOCK": _FINISH_FEW if is_few else _FINISH,
    }
    options = {"num_warps": 4 if is_few else 16, "enable_fp_fusion": True}
    _start(kernels.finish, 1, tensors, constants, options, plan.compiled)
    return loss, coefficients


def _sum(total: Tensor | None, like: Tensor) -> Tensor | None:
    return None if total is None else total.to(like.device, like.dtype).sum()


def launch(z: Tensor, batch: Batch, plan: "Plan", run: Pass) -> None:
    from lmf_multi.torch import _triton_kernels as kernels

    options = batch.options
    tensors = (z, batch.y, options.where, batch.Δ, batch.w, batch.o, *run)
    is_one_for_all = run.upstream is None or not any(run.upstream.stride())
    constants = {
        **plan.constants,
        "upstream_stride": 0 if is_one_for_all else 1,
        "DTYPE": kernels.FLOAT64 if z.dtype == torch.float64 else kernels.FLOAT32,
        "REDUCED": run.out is not None and options.reduction != "none",
    }
    # adding to the logits takes registers of its own, of which no more may be spilt to memory
    is_frugal = run.grad is not None and batch.o is None
    how = plan.of_gradient if is_frugal else plan.options
    _start(kernels.mixture, plan.programs, tensors, constants, how, plan.compiled)


def _start(
    kernel: Any,
    programs: int,
    tensors: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    compiled: dict[Any, Any],
) -> None:
    """Launch a kernel, and remember what Triton compiled for such tensors and constants.

    Both are in the order of the kernel's arguments. Triton looks at every argument at each launch,
    which takes several times as long as the launch.
    """
    device = tensors[0].device
    kinds = [x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
    key = (device, *kinds, constants.get("upstream_stride"))
    with _on(device):
        if (program := compiled.get(key)) is not None:
            program[(programs, 1, 1)](*tensors, *constants.values())
            return
        program = kernel[(programs,)](*tensors, **constants, **options)
    if _programs_take_all_arguments():
        assert [*constants] == kernel.arg_names[len(tensors) :], "or the next launch mixes them up"
        compiled[key] = program


@cache
def _programs_take_all_arguments() -> bool:
    """Triton 3.3 and newer hand all of a kernel's arguments to what they compiled."""
    major, minor = import_module("triton").__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 3)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Plan(NamedTuple):
    """How the rows are dealt out to programs, and what the kernel is told of it by name."""

    programs: int
    is_long: bool  # whether a row is longer than a block
    constants: dict[str, Any]
    options: dict[str, Any]  # Triton's own
    of_gradient: dict[str, Any]  # and for the backward pass
    compiled: dict[Any, Any]  # what Triton has compiled, by what else it was compiled for


class _Kind(NamedTuple):
    """What a plan is made for: of what else Triton compiles programs, a plan remembers them."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    y_strides: tuple[int, ...] | None  # of distributions
    axis: int
    ignored: int | None
    numbers: Numbers
    reduction: Reduction


def plan_of(z: Tensor, batch: Batch) -> Plan:
    """How to launch the kernel for such logits and labels."""
    y_strides = batch.y.stride() if batch.is_soft else None
    axis, ignored = batch.options.axis, None if batch.is_soft else batch.options.ignore_index
    how = (axis, ignored, batch.numbers, batch.options.reduction)
    return _plan(_Kind(z.shape, z.stride(), z.dtype, y_strides, *how))


@lru_cache(maxsize=256)  # a training run has few shapes
def _plan(kind: _Kind) -> Plan:
    shape, strides, dtype, y_strides, axis, ignored, numbers, _ = kind
    layout = strides_of(shape, axis % len(shape), strides, y_strides)
    assert layout is not None, "supports() refuses these strides"
    (z_outer, z_inner, z_class), (y_outer, y_inner, y_class) = layout.z, layout.y
    grad_outer, grad_inner, grad_class = layout.grad
    C, is_soft = shape[axis], y_strides is not None
    N = math.prod(shape) // C
    # the terms of all classes, and float64, take several times the registers
    is_heavy = is_soft or numbers.label_smoothing != 0 or dtype == torch.float64
    tile = _tile(C, N, dtype, is_heavy, z_class == 1)
    constants = {
        "N": N,
        "inner": layout.inner,
        "z_outer": z_outer,
        "z_inner": z_inner,
        "z_class": z_class,
        "y_outer": y_outer,
        "y_inner": y_inner,
        "y_class": y_class,
        "grad_outer": grad_outer,
        "grad_inner": grad_inner,
        "grad_class": grad_class,
        "upstream_stride": None,  # launch() says
        "one": 1,
        "ignore_index": 0 if ignored is None else ignored,
        "alpha": numbers.alpha,
        "beta": numbers.beta,
        "gamma": numbers.gamma,
        "scale": numbers.scale,
        "smoothing": numbers.label_smoothing,
        "C": C,
        "BLOCK": tile.block,
        "ROWS": tile.rows,
        "STEPS": tile.steps,
        "ALIGNMENT": layout.alignment,
        "WITHIN": layout.inner > 1 and layout.inner % tile.rows == 0,
        "ROW_A_THREAD": z_class == 1 and tile.block <= _FEW_CLASSES,
        "DTYPE": None,  # likewise
        "SOFT": is_soft,
        "SMOOTHED": numbers.label_smoothing != 0,
        "IGNORES": ignored is not None,
        "FOCAL": numbers.beta != 0,
    }
    # Triton 3.10 changes the default; no product here is rounded on purpose
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    # of a thread, as many as four blocks of an SM have: else it has three, and waits for memory
    few = z_class != 1 and tile.block <= _FEW_CLASSES and not is_heavy
    of_gradient = options | ({"maxnreg": 128} if few else {})
    programs = -(-N // (tile.rows * tile.steps))
    return Plan(programs, tile.block < C, constants, options, of_gradient, {})


class _Tile(NamedTuple):
    """What a program takes at a time, rows × block elements, and how often."""

    rows: int
    block: int
    warps: int
    steps: int


def _tile(C: int, N: int, dtype: torch.dtype, is_heavy: bool, is_contiguous: bool) -> _Tile:
    """Of N rows of C classes, which are neighbours in memory or not."""
    size, each = (_TILE // 4, 8) if is_heavy else (_TILE, 32)
    block = _power_of_2(C) if row_bytes(C, dtype) <= LONGEST_ROW else _BLOCK
    if is_contiguous and block > _FEW_CLASSES and not is_heavy:
        # a warp for a row, if it can: each warp of a row does all the arithmetic of the row
        size = 32 * each
        warps = 1 << max(0, min(16, block // size).bit_length() - 1)
        rows = max(1, size // block)
    else:
        rows = min(512, max(1, size // block))
        warps = min(16, max(4, rows * block // (32 * each)))
    # a few steps cost less than programs of their own, as long as all of a GPU has work
    steps = max(1, min(8, N * warps // (rows * _WARPS)))
    return _Tile(rows, block, warps, 1 << (steps.bit_length() - 1))


def row_bytes(C: int, dtype: torch.dtype) -> int:
    """Of a row of logits in the dtype of its arithmetic."""
    return C * (8 if dtype == torch.float64 else 4)


def _power_of_2(n: int) -> int:
    """The smallest that is 2 or more, and at least n."""
    return 1 << max(n - 1, 1).bit_length()
