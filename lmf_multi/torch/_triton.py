"""The loss of plain CUDA tensors in a fused kernel, where Triton is installed.

The forward pass reads the logits once; the backward pass reads them once more and writes their
gradient, multiplied by the upstream gradient already and in the logits' dtype. That is 3 transfers
of the logits' size and no buffer beside logits and gradient. Keeping the gradient from the forward
pass would be 2, and 2 more for its product with the upstream gradient.

In the environment ``LMF_MULTI_TRITON=0`` turns it off, ``1`` is the default, and ``always`` lets
CPU tensors take it too, which only Triton's interpreter runs (TRITON_INTERPRET=1); it is read
whenever a loss is computed.
"""

import importlib.util
import logging
import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmf_multi.torch._mixture import along_classes
from lmf_multi.torch._preparation import Batch, gradient
from lmf_multi.torch._tensors import as_long, is_plain

_LOG = logging.getLogger("lmf_multi")
_SWITCH = "LMF_MULTI_TRITON"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TILE = 4096  # elements of a program, 32 for each of its threads
_LONGEST_ROW = 2**16  # that stays in registers, in bytes of the dtype of its arithmetic
_LONGEST_ROW_OF_ALL_CLASSES = 2**14  # whose terms take several times as many
_BLOCK = 4096  # of a longer row
_FINISH = 1024  # programs whose sums are added at a time
_MOST_ROWS = 2**31 - 2**16  # counted in 32 bits, a last tile included


@cache
def available() -> bool:
    """Whether Triton is installed; says once, for debugging, if it is not."""
    if importlib.util.find_spec("triton") is not None:
        return True
    _LOG.debug("Triton is not installed: on CUDA the loss takes several kernels instead of one")
    return False


def takes_fused(z: Tensor, batch: Batch) -> bool:
    """Whether the logits are numbers on a device where it is wanted, and ``fused_loss`` takes them.

    On CUDA devices; on CPUs where the environment says so, and the CPU kernel does not take them.
    """
    return (
        is_plain(z)  # first, for what compiles does not look at the environment
        and z.device.type in _wanted_on(os.environ.get(_SWITCH, "1"))
        and supports(z, batch)
    )


@cache
def _wanted_on(setting: str) -> tuple[str, ...]:
    """The types of device, by one of the values that have a meaning."""
    if setting not in ("", "0", "1", "always"):
        raise ValueError(
            f"{_SWITCH} must be 0, 1 or always, got {setting!r}; 0 turns the Triton kernel off"
        )
    return {"0": (), "always": ("cpu", "cuda")}.get(setting, ("cuda",))


def supports(z: Tensor, batch: Batch) -> bool:
    """Whether ``fused_loss`` takes these CUDA tensors.

    Not rows that two strides cannot address; with distributions or label smoothing not more than
    4096 classes, in float64 2048; not distributions that want a gradient; not the sigmoid form.
    """
    y, axis = batch.y, batch.options.axis
    is_of_all = batch.is_soft or batch.numbers.label_smoothing != 0
    return (
        not batch.is_sigmoid
        and available()
        and _runs_on(z.device)
        and y.device == z.device
        and z.dtype in _DTYPES
        and not (batch.is_soft and y.requires_grad)
        and not (is_of_all and _row_bytes(z, axis) > _LONGEST_ROW_OF_ALL_CLASSES)
        and layout_of(z, y, axis) is not None
    )


@cache
def _runs_on(device: torch.device) -> bool:
    """NVIDIA's GPUs that the kernel was compiled for; a CPU is for Triton's interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def fused_loss(z: Tensor, batch: Batch) -> Tensor:
    """The reduced loss, as :func:`lmf_multi.torch.lmf_loss`, of what ``supports`` takes.

    Returns:
        float32, or float64 for float64 logits. A label out of range gives NaN.
    """
    y, where, α = batch.y, batch.options.where, batch.numbers.alpha
    if not batch.is_soft:  # the kernel casts to int64
        y = (as_long(y) if y.dtype == torch.uint64 else y).contiguous()
    given = (where, batch.Δ if α else None, batch.w, batch.o)
    where, Δ, w, o = (None if v is None else v.contiguous() for v in given)
    batch = batch._replace(y=y, Δ=Δ, w=w, o=o, options=batch.options.but(where=where))
    loss: Tensor = _FusedLoss.apply(z, batch)
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Batch) -> Tensor:
        loss, normalizers, statistics = _loss(z, batch)
        ctx.batch = batch
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, batch.y, batch.options.where, normalizers, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        z, _, _, normalizers, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = (along_classes(upstream, ctx.batch.axis) * gradient(z, ctx.batch)).to(z.dtype)
        else:
            grad = torch.empty_like(z)
            # one number for all rows, as sum() hands it down, has strides of 0
            upstream = upstream.contiguous() if any(upstream.stride()) else upstream
            _launch(z, ctx.batch, _Pass(None, statistics, grad, upstream, normalizers))
        return grad, None


class _Pass(NamedTuple):
    """What a pass writes and reads beside logits and labels, as the kernel names it."""

    out: Tensor | None
    statistics: Tensor | None
    grad: Tensor | None = None
    upstream: Tensor | None = None
    normalizers: Tensor | None = None


def _loss(z: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, what the means divide by, and statistics of rows that do not fit a block."""
    axis, dtype = batch.options.axis, torch.promote_types(z.dtype, torch.float32)
    C = z.shape[axis]
    N, tile = z.numel() // C, _tile(z, batch)
    statistics = z.new_empty((3, N), dtype=dtype) if tile.block < C else None
    if batch.options.reduction == "none":
        out = z.new_empty(z.shape[:axis] + z.shape[axis + 1 :], dtype=dtype)
        _launch(z, batch, _Pass(out, statistics))
        return out, None, statistics
    sums = z.new_empty((4, tile.programs(N)), dtype=torch.float64)
    _launch(z, batch, _Pass(sums, statistics))
    loss, normalizers = _finish(sums, batch, dtype)
    return loss, normalizers, statistics


def _finish(sums: Tensor, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reduced loss (), and what its two terms were divided by (2,), of sums (4, programs)."""
    from lmf_multi.torch import _triton_kernels as kernels

    if sums.shape[1] > 16 * _FINISH:  # more than one program should add
        sums = sums.sum(1, keepdim=True)
    weight, examples = batch.options.totals or (None, None)
    loss, normalizers = sums.new_empty((), dtype=dtype), sums.new_empty(2)
    with _on(sums.device):
        kernels.finish[(1,)](
            sums=sums,
            total_weight=_sum(weight, sums),
            total_examples=_sum(examples, sums),
            loss=loss,
            normalizers=normalizers,
            programs=sums.shape[1],
            alpha=batch.numbers.alpha,
            beta=batch.numbers.beta,
            BY_WEIGHT=batch.options.reduction == "mean",
            BY_EXAMPLES=batch.options.reduction in ("mean", "batch_mean"),
            BLOCK=_FINISH,
            enable_fp_fusion=True,
        )
    return loss, normalizers


def _sum(total: Tensor | None, like: Tensor) -> Tensor | None:
    return None if total is None else total.to(like.device, like.dtype).sum()


def _launch(z: Tensor, batch: Batch, run: _Pass) -> None:
    from lmf_multi.torch import _triton_kernels as kernels

    (y, Δ, w, o, numbers, options, soft, *_), tile = batch, _tile(z, batch)
    layout, C, ignored = layout_of(z, y, options.axis), z.shape[options.axis], options.ignore_index
    assert layout is not None, "supports() refuses these strides"
    (z_outer, z_inner, z_class), (y_outer, y_inner, y_class) = layout.z, layout.y
    grad_outer, grad_inner, grad_class = layout.grad
    with _on(z.device):
        kernels.mixture[(tile.programs(z.numel() // C),)](
            z=z,
            y=y,
            where=options.where,
            Δ=Δ,
            w=w,
            o=o,
            **run._asdict(),
            N=z.numel() // C,
            inner=layout.inner,
            z_outer=z_outer,
            z_inner=z_inner,
            z_class=z_class,
            y_outer=y_outer,
            y_inner=y_inner,
            y_class=y_class,
            grad_outer=grad_outer,
            grad_inner=grad_inner,
            grad_class=grad_class,
            upstream_stride=0 if run.upstream is None or not any(run.upstream.stride()) else 1,
            one=1,
            ignore_index=0 if ignored is None else ignored,
            alpha=numbers.alpha,
            beta=numbers.beta,
            gamma=numbers.gamma,
            scale=numbers.scale,
            smoothing=numbers.label_smoothing,
            C=C,
            BLOCK=tile.block,
            ROWS=tile.rows,
            ALIGNMENT=layout.alignment,
            ROW_A_THREAD=z_class == 1 and tile.block <= 32,
            DTYPE=kernels.FLOAT64 if z.dtype == torch.float64 else kernels.FLOAT32,
            SOFT=soft,
            SMOOTHED=numbers.label_smoothing != 0,
            IGNORES=ignored is not None and not soft,
            FOCAL=numbers.beta != 0,
            REDUCED=run.out is not None and options.reduction != "none",
            num_warps=tile.warps,
            # Triton 3.10 changes the default; no product here is rounded on purpose
            enable_fp_fusion=True,
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Tile(NamedTuple):
    """What a program takes at a time: rows × block elements."""

    rows: int
    block: int
    warps: int

    def programs(self, N: int) -> int:
        return -(-N // self.rows)


def _tile(z: Tensor, batch: Batch) -> _Tile:
    # the terms of all classes, and float64, take several times the registers
    axis, ε = batch.options.axis, batch.numbers.label_smoothing
    heavy = batch.is_soft or ε != 0 or z.dtype == torch.float64
    size, each = (_TILE // 4, 8) if heavy else (_TILE, 32)
    in_registers = _row_bytes(z, axis) <= _LONGEST_ROW
    block = _power_of_2(z.shape[axis]) if in_registers else _BLOCK
    rows = min(512, max(1, size // block))
    return _Tile(rows, block, min(16, max(4, rows * block // (32 * each))))


def _row_bytes(z: Tensor, axis: int) -> int:
    return _power_of_2(z.shape[axis]) * (8 if z.dtype == torch.float64 else 4)


def _power_of_2(n: int) -> int:
    """The smallest that is 2 or more, and at least n."""
    return 1 << max(n - 1, 1).bit_length()


class _Layout(NamedTuple):
    """Row r of an array starts at (r // inner) · stride[0] + (r % inner) · stride[1]."""

    inner: int
    z: tuple[int, int, int]
    y: tuple[int, int, int]
    grad: tuple[int, int, int]
    alignment: int


def layout_of(z: Tensor, y: Tensor, axis: int) -> _Layout | None:
    """Strides of rows and classes, or None where the rows' axes are more than two."""
    y_strides = y.stride() if y.is_floating_point() else None
    return _strides(z.shape, axis % z.dim(), z.stride(), y_strides)


@lru_cache(maxsize=256)
def _strides(
    shape: torch.Size, axis: int, z: tuple[int, ...], y: tuple[int, ...] | None
) -> _Layout | None:
    grad = torch.empty_like(torch.empty_strided(shape, z, device="meta")).stride()
    arrays = (z, grad, z if y is None else y)
    axes: list[tuple[int, list[int]]] = []
    for i, size in enumerate(shape):
        steps = [strides[i] for strides in arrays]
        if i == axis or size == 1 or 0 in shape:  # no rows lie anywhere
            continue
        if axes and axes[-1][1] == [size * step for step in steps]:
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    rows = math.prod(size for size, _ in axes)
    reach = max(strides[axis] for strides in arrays) * (shape[axis] - 1)
    if len(axes) > 2 or rows > _MOST_ROWS or reach >= 2**31:
        return None
    inner = axes[1][0] if len(axes) == 2 else 1
    outers, inners = [*(steps for _, steps in axes), [0] * 3, [0] * 3][:2]
    z_, grad_, y_ = (
        (outer, inner_, strides[axis])
        for outer, inner_, strides in zip(outers, inners, arrays, strict=True)
    )
    return _Layout(inner, z_, y_, grad_, math.gcd(16, *outers, *inners))
