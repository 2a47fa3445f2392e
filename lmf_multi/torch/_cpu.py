"""The loss of plain CPU tensors in one pass over the logits, where the kernel was compiled.

``lmf_multi/_kernel`` computes value and gradient together: forward and backward read the logits
once, and no buffer beside logits and gradient is of their size. Under ``torch.compile`` an operator
calls it.
"""

import ctypes
import math
from typing import Any, List, Optional, cast  # noqa: UP035  # as older PyTorch reads them

import torch
from torch import Tensor

from lmf_multi import _kernel
from lmf_multi._terms import Numbers, Options
from lmf_multi.torch._closed_form import value_and_grad
from lmf_multi.torch._mixture import Known, along_classes
from lmf_multi.torch._preparation import Batch, gradient, prepare
from lmf_multi.torch._tensors import (
    as_long,
    at_trace_time,
    check_memory,
    readable,
    transforms_are_active,
)
from lmf_multi.torch._triton import layout_of

_DTYPES = {getattr(torch, name): code for name, code in _kernel.DTYPES.items()}
WORTH_A_CALL = 2**14  # logits; compiled operations are faster on fewer
_is_exporting = getattr(torch.compiler, "is_exporting", None)  # which older PyTorch cannot tell


def takes_kernel(z: Tensor, batch: Batch) -> bool:
    """Whether ``kernel_loss`` takes this: classes as labels, on a CPU."""
    y, options = batch.y, batch.options
    if batch.is_soft or batch.is_sigmoid or batch.numbers.label_smoothing != 0:
        return False
    if torch.compiler.is_compiling():
        return _takes_operator(z, y)
    return readable(z) and readable(y) and _is_in_reach(z, y, options.axis)


def _is_in_reach(z: Tensor, y: Tensor, axis: int) -> bool:
    """Not float64, and not rows that two strides cannot address."""
    return (
        z.dtype in _DTYPES
        and z.numel() > 0
        and not z.is_neg()  # a view that negates when it is read
        and _kernel.library() is not None
        and layout_of(z, y, axis) is not None
    )


def _takes_operator(z: Tensor, y: Tensor) -> bool:
    """Whether ``torch.compile`` is to call the kernel, as it sees these tensors.

    Not in what is exported, which may run where this package is not installed, and not under the
    transforms of ``torch.func``, which can batch and differentiate operations.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and _is_exporting is not None
        and not _is_exporting()
        and not transforms_are_active()
        and z.device.type == y.device.type == "cpu"
        and z.dtype in _DTYPES
        and z.numel() >= _worth_a_call()
    )


@at_trace_time
def _worth_a_call() -> float:
    """How many logits are worth a call of the kernel in compiled code; none without it."""
    if _kernel.library() is None:
        return math.inf
    return 1 if _kernel.setting() == "always" else WORTH_A_CALL


def kernel_loss(z: Tensor, batch: Batch) -> Tensor | None:
    """The reduced loss of what ``takes_kernel`` takes.

    None where a label is out of range or the loss is not finite, which is left to the operations.
    Compiled code always gets a loss, as it cannot look.
    """
    with_grad = z.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return cast(Tensor, operator(**_flat(z, batch), with_grad=with_grad)[0])
    known = _call(z, batch, with_grad)
    return None if known is None else Known.apply(z, known, batch)


def _call(z: Tensor, batch: Batch, with_grad: bool) -> tuple[Tensor, Tensor | None] | None:
    """The loss and its gradient, or None as ``kernel_loss``."""
    z, y = z.detach(), as_long(batch.y).contiguous()
    (α, β, γ, s, _), options = batch.numbers, batch.options
    layout, totals = layout_of(z, y, options.axis), options.totals or ()
    assert layout is not None, "takes_kernel() refuses these strides"
    grad = torch.empty_like(z, dtype=torch.float32) if with_grad else None
    # whatever the defaults are: the kernel writes float32 into the memory of this device
    kind: Any = {"dtype": torch.float32, "device": z.device}
    losses = torch.empty(y.shape, **kind) if options.reduction == "none" else None
    Δ, w = (None if v is None else v.contiguous() for v in (batch.Δ if α else None, batch.w))
    total_weight, total_examples = (t.sum().item() for t in totals) if totals else [math.nan] * 2
    call = _kernel.OneClassCall(
        size=ctypes.sizeof(_kernel.OneClassCall),
        z=z.data_ptr(),
        y=y.data_ptr(),
        margins=None if Δ is None else Δ.data_ptr(),
        weights=None if w is None else w.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
        losses=None if losses is None else losses.data_ptr(),
        N=y.numel(),
        C=z.shape[options.axis],
        inner=layout.inner,
        z_strides=layout.z,
        grad_strides=layout.grad,
        ignore_index=options.ignore_index,
        alpha=α,
        beta=β,
        total_weight=total_weight,
        total_examples=total_examples,
        gamma=γ,
        scale=s,
        dtype=_DTYPES[z.dtype],
        by_weight=options.reduction == "mean",
        by_examples=options.reduction in ("mean", "batch_mean"),
        threads=torch.get_num_threads(),
    )
    library = _kernel.opened(True)  # takes_kernel() has asked whether it is wanted
    assert library is not None, "takes_kernel() needs it"
    status = library.lmf_multi_one_class(call)
    if status == _kernel.NO_MEMORY:
        raise MemoryError(f"the loss of logits {tuple(z.shape)} found no memory for its tiles")
    if status == _kernel.UNKNOWN_LABEL or not math.isfinite(call.loss):
        return None
    return torch.tensor(call.loss, **kind) if losses is None else losses, grad


# --- in compiled code, an operator, whose arguments PyTorch wants to be flat


@torch.library.custom_op("lmf_multi::one_class", mutates_args=())
def operator(
    z: Tensor,
    y: Tensor,
    margins: Optional[Tensor],  # noqa: UP045  # older PyTorch reads no other union
    class_weight: Optional[Tensor],  # noqa: UP045
    total_weight: Optional[Tensor],  # noqa: UP045
    total_examples: Optional[Tensor],  # noqa: UP045
    numbers: List[float],  # noqa: UP006
    axis: int,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The reduced loss of integer labels, and its gradient, empty where nobody wants it."""
    check_memory("input", z)
    check_memory("target", y)
    tensors = (y, margins, class_weight, total_weight, total_examples)
    batch = _batch(tensors, (numbers, axis, ignore_index, reduction))
    known = _call(z, batch, with_grad) if _is_in_reach(z, y, axis) else None
    if known is None:
        losses, of_z = value_and_grad(*prepare(z, batch), axis)
        grad = torch.empty_like(z, dtype=torch.float32).copy_(of_z) if with_grad else None
        known = losses if reduction == "none" else losses.sum(), grad
    loss, grad = known
    return loss, z.new_empty(0) if grad is None else grad


def _batch(tensors: Any, settings: Any) -> Batch:
    """What the operator's arguments say."""
    (y, Δ, w, *totals), (numbers, axis, ignore_index, reduction) = tensors, settings
    options = Options(axis, None, ignore_index, reduction=reduction)
    if totals[0] is not None:
        options = options.but(totals=tuple(totals))
    return Batch(y, Δ, w, Numbers(*numbers), options, is_soft=False, axis=axis, look=False)


def _flat(z: Tensor, batch: Batch) -> dict[str, Any]:
    """The operator's arguments, by name."""
    options = batch.options
    total_weight, total_examples = options.totals or (None, None)
    return {
        "z": z,
        "y": batch.y,
        "margins": batch.Δ,
        "class_weight": batch.w,
        "total_weight": total_weight,
        "total_examples": total_examples,
        "numbers": [*batch.numbers],
        "axis": options.axis,
        "ignore_index": options.ignore_index,
        "reduction": options.reduction,
    }


@operator.register_fake
def _(z: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, with_grad = others
    loss = y.new_empty(y.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, torch.empty_like(z, dtype=torch.float32) if with_grad else z.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[6:-1]
    ctx.set_materialize_grads(False)  # or the backward pass gets zeros of the logits' size
    ctx.save_for_backward(*inputs[:6], output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 11
    z, *tensors, grad = ctx.saved_tensors
    batch = _batch(tensors, ctx.settings)
    if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
        grad = gradient(z, batch)
    return (along_classes(upstream, batch.axis) * grad).to(z.dtype), *[None] * 10


operator.register_autograd(_backward, setup_context=_setup_context)
