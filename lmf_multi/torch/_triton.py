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
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmf_multi.torch._layout import layout_of
from lmf_multi.torch._mixture import along_classes
from lmf_multi.torch._operators import (
    ARGUMENTS,
    SCHEMA,
    TENSORS,
    batch_of,
    flat,
    may_call_operators,
)
from lmf_multi.torch._preparation import Batch, gradient, is_learned
from lmf_multi.torch._tensors import as_long, at_trace_time, check_memory, is_plain
from lmf_multi.torch._triton_launch import (
    LONGEST_ROW,
    Pass,
    Plan,
    forward,
    launch,
    plan_of,
    row_bytes,
)

_LOG = logging.getLogger("lmf_multi")
_SWITCH = "LMF_MULTI_TRITON"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LONGEST_ROW_OF_ALL_CLASSES = 2**14  # in bytes; their terms take several times as many


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
    if torch.compiler.is_compiling():
        return _takes_operator(z, batch)
    return (
        is_plain(z)
        and z.device.type in _wanted_on(os.environ.get(_SWITCH, "1"))
        and supports(z, batch)
    )


def _takes_operator(z: Tensor, batch: Batch) -> bool:
    """Whether ``torch.compile`` is to call the kernel: not for distributions."""
    return (
        may_call_operators()
        and not (batch.is_soft or batch.is_sigmoid or is_learned(batch))
        and batch.y.device == z.device
        and z.dtype in _DTYPES
        and not (_is_of_all(batch) and _is_too_long(z, batch))
        and _is_wanted(z.device.type, z.device.index)
    )


@at_trace_time
def _is_wanted(kind: str, index: int | None) -> bool:
    """Whether compiled code takes the kernel on such a device."""
    wanted = kind in _wanted_on(os.environ.get(_SWITCH, "1"))
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return wanted and available() and _runs_on(device)


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
    return (
        not batch.is_sigmoid
        and available()
        and _runs_on(z.device)
        and y.device == z.device
        and z.dtype in _DTYPES
        and not (batch.is_soft and y.requires_grad)
        and not (_is_of_all(batch) and _is_too_long(z, batch))
        and layout_of(z, y, axis) is not None
    )


def _is_of_all(batch: Batch) -> bool:
    """Whether the terms of all classes count, not those of the labelled ones alone."""
    return bool(batch.is_soft or batch.numbers.label_smoothing != 0)


def _is_too_long(z: Tensor, batch: Batch) -> bool:
    return row_bytes(z.shape[batch.options.axis], z.dtype) > _LONGEST_ROW_OF_ALL_CLASSES


@cache
def _runs_on(device: torch.device) -> bool:
    """NVIDIA's GPUs that the kernel was compiled for; a CPU is for Triton's interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def fused_loss(z: Tensor, batch: Batch) -> Tensor:
    """The reduced loss, as :func:`lmf_multi.torch.lmf_loss`, of what ``takes_fused`` takes.

    Returns:
        float32, or float64 for float64 logits. A label out of range gives NaN.
    """
    if torch.compiler.is_compiling():
        loss: Tensor = operator(z, *flat(batch))[0]
    else:
        loss = _FusedLoss.apply(z, _contiguous(batch))
    return loss


def _contiguous(batch: Batch) -> Batch:
    """With labels, masks and vectors as the kernel reads them; it casts labels to int64 itself."""
    y, where, α = batch.y, batch.options.where, batch.numbers.alpha
    if not batch.is_soft:
        y = (as_long(y) if y.dtype == torch.uint64 else y).contiguous()
    given = (batch.Δ if α else None, batch.w, batch.o)
    Δ, w, o = (None if v is None else v.contiguous() for v in given)
    options = batch.options if where is None else batch.options.but(where=where.contiguous())
    return batch._replace(y=y, Δ=Δ, w=w, o=o, options=options)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Batch) -> Tensor:
        ctx.batch, ctx.plan = batch, plan_of(z, batch)
        loss, coefficients, statistics = forward(z, batch, ctx.plan)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, batch.y, batch.options.where, coefficients, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        z, _, _, coefficients, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            return _differentiable(z, ctx.batch, upstream), None
        kept = (coefficients, statistics)
        return _of_logits(z, ctx.batch, ctx.plan, upstream, *kept), None


def _of_logits(
    z: Tensor,
    batch: Batch,
    plan: Plan,
    upstream: Tensor,
    coefficients: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    """The gradient, in their dtype and layout."""
    grad = torch.empty_like(z)
    # one number for all rows, as sum() hands it down, has strides of 0
    upstream = upstream.contiguous() if any(upstream.stride()) else upstream
    launch(z, batch, plan, Pass(None, statistics, grad, upstream, coefficients))
    return grad


def _differentiable(z: Tensor, batch: Batch, upstream: Tensor) -> Tensor:
    """Upstream times gradient, in operations."""
    return (along_classes(upstream, batch.axis) * gradient(z, batch)).to(z.dtype)


# --- in compiled code, two operators, as what compiles sees no numbers


_NAME, _GRADIENT = "lmf_multi::fused", "lmf_multi::fused_gradient"
_KEPT = "Tensor coefficients, Tensor statistics"  # for the backward pass; empty if there are none
for _name, _signature in (
    (_NAME, f"({SCHEMA}) -> (Tensor, Tensor, Tensor)"),
    (_GRADIENT, f"(Tensor upstream, {_KEPT}, {SCHEMA}) -> Tensor"),
):
    torch.library.define(_name, _signature, tags=torch.Tag.pt2_compliant_tag)
operator = torch.ops.lmf_multi.fused.default
_gradient_operator = torch.ops.lmf_multi.fused_gradient.default


@torch.library.impl(_NAME, ("CPU", "CUDA"))
def _(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, and what the backward pass reads."""
    z, batch = _readable(z, arguments)
    loss, coefficients, statistics = forward(z, batch, plan_of(z, batch))
    if coefficients is None:
        coefficients = loss.new_empty(0, dtype=torch.float64)
    return loss, coefficients, loss.new_empty(0) if statistics is None else statistics


def _readable(z: Tensor, arguments: Any) -> tuple[Tensor, Batch]:
    """Logits and batch as the kernel reads them, whatever the strides are."""
    batch = batch_of(arguments)
    for name, x in (("input", z), ("target", batch.y)):
        check_memory(name, x)
    is_in_reach = layout_of(z, batch.y, batch.options.axis) is not None
    return z if is_in_reach else z.contiguous(), _contiguous(batch)


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, dtype = batch_of(arguments), torch.promote_types(z.dtype, torch.float32)
    is_reduced, C = batch.options.reduction != "none", z.shape[batch.options.axis]
    loss = z.new_empty(() if is_reduced else batch.y.shape, dtype=dtype)
    is_long = row_bytes(C, z.dtype) > LONGEST_ROW
    statistics = z.new_empty((3, z.numel() // C) if is_long else 0, dtype=dtype)
    return loss, z.new_empty(2 if is_reduced else 0, dtype=torch.float64), statistics


@torch.library.impl(_GRADIENT, ("CPU", "CUDA"))
def _(
    upstream: Tensor, coefficients: Tensor, statistics: Tensor, given: Tensor, *arguments: Any
) -> Tensor:
    """Of the logits, in their dtype and layout."""
    z, batch = _readable(given, arguments)
    kept = (x if x.numel() else None for x in (coefficients, statistics))
    grad = _of_logits(z, batch, plan_of(z, batch), upstream, *kept)
    return grad if z is given else torch.empty_like(given).copy_(grad)


@torch.library.register_fake(_GRADIENT)  # type: ignore[untyped-decorator]
def _(upstream: Tensor, coefficients: Tensor, statistics: Tensor, z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ARGUMENTS
    z, *tensors, coefficients, statistics = ctx.saved_tensors
    arguments = (*tensors, *ctx.settings)
    if torch.is_grad_enabled():
        grad = _differentiable(z, batch_of(arguments), upstream)
    else:
        grad = _gradient_operator(upstream, coefficients, statistics, z, *arguments)
    return grad, *[None] * (ARGUMENTS - 1)


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
