"""The loss of plain CPU tensors in one pass over the logits, where the kernel was compiled.

``_cpu.cpp`` computes value and gradient together: forward and backward read the logits once, and
no buffer beside logits and gradient is of their size.
"""

import ctypes
import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmf_multi.spec import Reduction, check_label_range
from lmf_multi.torch._eager import Known
from lmf_multi.torch._triton import layout_of

_LOG = logging.getLogger("lmf_multi")
_DTYPES = (torch.float32, torch.bfloat16)
_UNKNOWN_LABEL, _NO_MEMORY = 1, 2
_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


@cache
def kernel() -> Any:
    """The compiled function, or None; says once, for debugging, if there is none."""
    found = importlib.util.find_spec("lmf_multi.torch._cpu_kernel")
    if found is None or found.origin is None:
        _LOG.debug("The CPU kernel was not compiled: the loss takes many operations instead of one")
        return None
    function = ctypes.CDLL(found.origin).lmf_multi_one_class
    kinds: list[Any] = [_POINTER, _INT, *[_POINTER] * 6, *[_LONG] * 10, *[_DOUBLE] * 4]
    function.argtypes = [*kinds, _INT, _INT, _DOUBLE, _DOUBLE, _INT]
    return function


def has_kernel_for(z: Tensor, y: Tensor, axis: int) -> bool:
    """Whether ``kernel_loss`` takes these tensors of numbers on a CPU, checked already.

    Not float64 and float16, and not rows that two strides cannot address.
    """
    return (
        z.dtype in _DTYPES
        and z.numel() > 0
        and not z.is_neg()  # a view that negates when it is read
        and kernel() is not None
        and layout_of(z, y, axis) is not None
    )


def kernel_loss(
    z: Tensor,
    y: Tensor,
    Δ: Tensor | None,
    w: Tensor | None,
    alpha: float,
    beta: float,
    γ: float,
    s: float,
    axis: int,
    ignore_index: int,
    reduction: Reduction,
    totals: tuple[Tensor, Tensor] | None,
    plain: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The reduced loss of integer labels; None where it is not finite, which is left to ``plain``.

    Args:
        z: float32 or bfloat16, logits, the classes along ``axis``.
        y: integer, the logits' shape without the class axis.
        Δ: (C,) float32, or None, without the LDAM term.
        w: (C,) float32, or None for ones.
        plain: the same loss of the logits, in differentiable operations: for second derivatives.
        totals: replace the batch's total class weight and number of examples in the means.

    Raises:
        ValueError: a label is out of range.
    """
    layout, C, y = layout_of(z, y, axis), z.shape[axis], y.long().contiguous()
    assert layout is not None, "has_kernel_for() refuses these strides"
    with_grad = z.requires_grad and torch.is_grad_enabled()
    grad = torch.empty_like(z, dtype=torch.float32) if with_grad else None
    losses = torch.empty(y.shape) if reduction == "none" else None
    Δ, w = (None if v is None else v.contiguous() for v in (Δ if alpha else None, w))
    weight, examples = (torch.nan,) * 2 if totals is None else (t.sum().item() for t in totals)
    total = ctypes.c_double()
    addresses = (None if v is None else v.data_ptr() for v in (Δ, w, grad, losses))
    status = kernel()(
        z.data_ptr(),
        z.dtype == torch.bfloat16,
        y.data_ptr(),
        *addresses,
        ctypes.addressof(total),
        y.numel(),
        C,
        layout.inner,
        *layout.z,
        *layout.grad,
        ignore_index,
        alpha,
        beta,
        γ,
        s,
        reduction == "mean",
        reduction in ("mean", "batch_mean"),
        weight,
        examples,
        torch.get_num_threads(),
    )
    if status == _NO_MEMORY:
        raise MemoryError(f"the loss of logits {tuple(z.shape)} found no memory for its tiles")
    if status == _UNKNOWN_LABEL:
        some = y[y != ignore_index]
        check_label_range(int(some.min()), int(some.max()), C, f"ignore_index={ignore_index}")
    if not math.isfinite(total.value):
        return None
    value = torch.tensor(total.value) if losses is None else losses
    loss: Tensor = Known.apply(z, (value, grad), axis, plain)
    return loss
