"""The loss of plain CUDA tensors in a fused kernel, where Triton is installed.

The forward pass reads the logits once; the backward pass reads them once more and writes their
gradient, multiplied by the upstream gradient already and in the logits' dtype. That is 3 transfers
of the logits' size and no buffer beside logits and gradient. Keeping the gradient from the forward
pass would be 2, and 2 more for its product with the upstream gradient.
"""

import importlib.util
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmf_multi.spec import Reduction
from lmf_multi.torch._closed_form import as_long

_LOG = logging.getLogger("lmf_multi")
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


def supports(z: Tensor, y: Tensor, axis: int, label_smoothing: float = 0.0) -> bool:
    """Whether ``fused_loss`` takes these CUDA tensors, whose shapes and dtypes are checked already.

    Not rows that two strides cannot address; with distributions or label smoothing not more than
    4096 classes, in float64 2048; and not distributions that want a gradient.
    """
    soft = y.is_floating_point()
    return (
        available()
        and _runs_on(z.device)
        and y.device == z.device
        and z.dtype in _DTYPES
        and not (soft and y.requires_grad)
        and not ((soft or label_smoothing) and _row_bytes(z, axis) > _LONGEST_ROW_OF_ALL_CLASSES)
        and layout_of(z, y, axis) is not None
    )


@cache
def _runs_on(device: torch.device) -> bool:
    """NVIDIA's GPUs that the kernel was compiled for; a CPU is for Triton's interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def fused_loss(
    z: Tensor,
    y: Tensor,
    Δ: Tensor | None,
    w: Tensor | None,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    label_smoothing: float,
    axis: int,
    reduction: Reduction,
    plain: Callable[[Tensor], Tensor],
    ignore_index: int | None = None,
    where: Tensor | None = None,
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The reduced loss, as :func:`lmf_multi.torch.lmf_loss`, of what ``supports`` takes.

    Args:
        z: float, logits, the classes along ``axis``.
        y: integer, the logits' shape without the class axis; or float, the logits' shape.
        Δ: (C,) of any float dtype, or None, without the LDAM term.
        w: (C,) of any float dtype, or None for ones.
        plain: the same loss of the logits, in differentiable operations: for second derivatives.
        ignore_index: examples with this integer label take no part.
        where: bool, the logits' shape without the class axis; False leaves an example out.
        totals: replace the batch's total class weight and number of examples in the means.

    Returns:
        float32, or float64 for float64 logits. A label out of range gives NaN.
    """
    settings = _Settings(
        alpha, beta, gamma, scale, label_smoothing, axis, reduction, ignore_index, totals, plain
    )
    arrays = (None if v is None else v.contiguous() for v in (where, Δ if alpha else None, w))
    labels = as_long(y) if y.dtype == torch.uint64 else y  # the kernel casts to int64
    loss: Tensor = _FusedLoss.apply(
        z, y if y.is_floating_point() else labels.contiguous(), *arrays, settings
    )
    return loss


class _Settings(NamedTuple):
    alpha: float
    beta: float
    gamma: float
    scale: float
    label_smoothing: float
    axis: int
    reduction: Reduction
    ignore_index: int | None
    totals: tuple[Tensor, Tensor] | None
    plain: Callable[[Tensor], Tensor]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, settings = inputs
        loss, normalizers, statistics = _loss(*inputs)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, normalizers, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        z, y, where, Δ, w, normalizers, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            loss = ctx.settings.plain(z)
            (grad,) = torch.autograd.grad(loss, z, upstream, create_graph=True)
        else:
            grad = torch.empty_like(z)
            # one number for all rows, as sum() hands it down, has strides of 0
            upstream = upstream.contiguous() if any(upstream.stride()) else upstream
            backward = (grad, upstream, normalizers)
            _launch(z, y, where, Δ, w, ctx.settings, None, statistics, *backward)
        return grad, *[None] * 5


def _loss(
    z: Tensor, y: Tensor, where: Any, Δ: Any, w: Any, settings: _Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, what the means divide by, and statistics of rows that do not fit a block."""
    C, dtype = z.shape[settings.axis], torch.promote_types(z.dtype, torch.float32)
    N, tile = z.numel() // C, _tile(z, y, settings)
    statistics = z.new_empty((3, N), dtype=dtype) if tile.block < C else None
    if settings.reduction == "none":
        axis = settings.axis % z.dim()
        out = z.new_empty(z.shape[:axis] + z.shape[axis + 1 :], dtype=dtype)
        _launch(z, y, where, Δ, w, settings, out, statistics)
        return out, None, statistics
    sums = z.new_empty((4, tile.programs(N)), dtype=torch.float64)
    _launch(z, y, where, Δ, w, settings, sums, statistics)
    loss, normalizers = _finish(sums, settings, dtype)
    return loss, normalizers, statistics


def _finish(sums: Tensor, settings: _Settings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reduced loss, and what its two terms were divided by (2,)."""
    from lmf_multi.torch import _triton_kernels as kernels

    if sums.shape[1] > 16 * _FINISH:  # more than one program should add
        sums = sums.sum(1, keepdim=True)
    totals = settings.totals
    weight, examples = (None, None) if totals is None else (_sum(t, sums) for t in totals)
    loss, normalizers = sums.new_empty((), dtype=dtype), sums.new_empty(2)
    with _on(sums.device):
        kernels.finish[(1,)](
            sums,
            weight,
            examples,
            loss,
            normalizers,
            sums.shape[1],
            settings.alpha,
            settings.beta,
            BY_WEIGHT=settings.reduction == "mean",
            BY_EXAMPLES=settings.reduction in ("mean", "batch_mean"),
            BLOCK=_FINISH,
            enable_fp_fusion=True,
        )
    return loss, normalizers


def _sum(total: Tensor, like: Tensor) -> Tensor:
    return total.to(like.device, like.dtype).sum()


def _launch(
    z: Tensor,
    y: Tensor,
    where: Tensor | None,
    Δ: Tensor | None,
    w: Tensor | None,
    settings: _Settings,
    out: Tensor | None,
    statistics: Tensor | None,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    normalizers: Tensor | None = None,
) -> None:
    from lmf_multi.torch import _triton_kernels as kernels

    layout, tile = layout_of(z, y, settings.axis), _tile(z, y, settings)
    assert layout is not None, "supports() refuses these strides"
    C = z.shape[settings.axis]
    with _on(z.device):
        kernels.mixture[(tile.programs(z.numel() // C),)](
            z,
            y,
            where,
            Δ,
            w,
            out,
            statistics,
            grad,
            upstream,
            normalizers,
            z.numel() // C,
            layout.inner,
            *layout.z,
            *layout.y,
            *layout.grad,
            0 if upstream is None or not any(upstream.stride()) else 1,
            1,
            0 if settings.ignore_index is None else settings.ignore_index,
            settings.alpha,
            settings.beta,
            settings.gamma,
            settings.scale,
            settings.label_smoothing,
            C=C,
            BLOCK=tile.block,
            ROWS=tile.rows,
            ALIGNMENT=layout.alignment,
            ROW_A_THREAD=layout.z[2] == 1 and tile.block <= 32,
            DTYPE=kernels.FLOAT64 if z.dtype == torch.float64 else kernels.FLOAT32,
            SOFT=y.is_floating_point(),
            SMOOTHED=settings.label_smoothing != 0,
            IGNORES=settings.ignore_index is not None,
            FOCAL=settings.beta != 0,
            REDUCED=out is not None and settings.reduction != "none",
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


def _tile(z: Tensor, y: Tensor, settings: _Settings) -> _Tile:
    # the terms of all classes, and float64, take several times the registers
    heavy = y.is_floating_point() or settings.label_smoothing != 0 or z.dtype == torch.float64
    size, each = (_TILE // 4, 8) if heavy else (_TILE, 32)
    in_registers = _row_bytes(z, settings.axis) <= _LONGEST_ROW
    block = _power_of_2(z.shape[settings.axis]) if in_registers else _BLOCK
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
        if i == axis or size == 1:
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
