"""The loss of plain CPU tensors in one pass over the logits, where the kernel was compiled.

``lmf_multi/_kernel`` computes value and gradient together: forward and backward read the logits
once, and no buffer beside logits and gradient is of their size. Under ``torch.compile`` an operator
calls it.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lmf_multi import _kernel
from lmf_multi._terms import Numbers
from lmf_multi.spec import Reduction
from lmf_multi.torch._closed_form import value_and_grad
from lmf_multi.torch._layout import strides_of
from lmf_multi.torch._mixture import Known, along_classes
from lmf_multi.torch._operators import SCHEMA, TENSORS, batch_of, flat, may_call_operators
from lmf_multi.torch._preparation import Batch, gradient, is_learned, prepare
from lmf_multi.torch._tensors import (
    as_long,
    at_trace_time,
    check_memory,
    readable,
)

_DTYPES = {getattr(torch, name): code for name, code in _kernel.DTYPES.items()}
_BY_LABEL = {"margins": 2, "weights": 2, "adjustments": 1}  # the axes of what each label has
WORTH_A_CALL = 2**13  # logits; compiled operations are faster on fewer


def takes_kernel(z: Tensor, batch: Batch) -> bool:
    """Whether ``kernel_loss`` takes this on a CPU: classes as labels, or the sigmoid form."""
    if not batch.is_sigmoid and (batch.is_soft or batch.numbers.label_smoothing != 0):
        return False
    if is_learned(batch) or (batch.is_sigmoid and abs(batch.options.ignore_index or 0) > 2**24):
        return False  # float32's labels could not tell that one from its neighbours
    if torch.compiler.is_compiling():
        return _takes_operator(z, batch)
    return readable(z, batch.y, batch.options.where) and _is_in_reach(z)


def _is_in_reach(z: Tensor) -> bool:
    """Not float64, nor a view that negates when it is read."""
    return (
        z.dtype in _DTYPES
        and z.numel() > 0
        and not z.is_neg()
        and _kernel.library(z.numel()) is not None
    )


def _takes_operator(z: Tensor, batch: Batch) -> bool:
    """Whether ``torch.compile`` is to call the kernel, as it sees these tensors."""
    return (
        may_call_operators()
        and z.device.type == batch.y.device.type == "cpu"
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

    None where a label is out of range or the loss is not finite, or where two strides cannot
    address the rows, which is left to the operations. Compiled code always gets a loss, as it
    cannot look.
    """
    with_grad = z.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return cast(Tensor, operator(z, *flat(batch), with_grad)[0])
    known = _call(z, batch, with_grad)
    return None if known is None else Known.apply(z, known, batch)


def _call(z: Tensor, batch: Batch, with_grad: bool) -> tuple[Tensor, Tensor | None] | None:
    """The loss and its gradient, or None as ``kernel_loss``."""
    options, totals = batch.options, batch.options.totals
    z, held, plan = (_elements if batch.is_sigmoid else _rows)(z.detach(), batch)
    if plan is None:
        return None
    # whatever the defaults are: the kernel writes into the memory of this device
    kind: Any = {"dtype": torch.float32, "device": z.device}
    grad = torch.empty_like(z, dtype=torch.float32) if with_grad else None
    losses = torch.empty(batch.y.shape, **kind) if options.reduction == "none" else None
    call = _kernel.LossCall.from_buffer_copy(plan)
    for name, x in {**held, "z": z, "grad": grad, "losses": losses}.items():
        if x is not None:
            setattr(call, name, x.data_ptr())
    if totals is not None:
        call.total_weight, call.total_examples = (t.sum().item() for t in totals)
    call.threads = torch.get_num_threads()
    library = _kernel.opened(True)  # takes_kernel() has asked whether it is wanted
    assert library is not None, "takes_kernel() needs it"
    status = library.lmf_multi_loss(call)
    if status == _kernel.NO_MEMORY:
        raise MemoryError(f"the loss of logits {tuple(z.shape)} found no memory for its tiles")
    if status == _kernel.UNKNOWN_LABEL or not math.isfinite(call.loss):
        return None
    return torch.scalar_tensor(call.loss, **kind) if losses is None else losses, grad


def _rows(z: Tensor, batch: Batch) -> Any:
    """Logits of the softmax form, what the kernel reads beside them, and the plan."""
    y, Δ, w, o, numbers, options, *_ = batch
    held = _constants(Δ if numbers.alpha else None, w, o)
    told = (z.dtype, options.ignore_index, numbers, options.reduction)
    plan = _plan_of_rows(z.shape, z.stride(), options.axis, *told)
    return z, {"y": as_long(y).contiguous(), **held}, plan


def _elements(z: Tensor, batch: Batch) -> Any:
    """The same of the sigmoid form, one element after another."""
    (axis, where, ignored, *_), (t, Δ, w, o, numbers, *_) = batch.options, batch
    held = _constants(Δ if numbers.alpha else None, w, o)
    ranks = tuple((name, v.dim()) for name, v in held.items())
    L = max((len(v) for name, v in held.items() if v.dim() == _BY_LABEL[name]), default=1)
    held["t"] = t.float().contiguous()
    if where is not None:
        held["where"] = where.contiguous()
    ignored = None if t.dtype == torch.bool else ignored
    told = (z.dtype, ignored, numbers, batch.options.reduction)
    return z.contiguous(), held, _plan_of_elements(z.shape, axis, L, ranks, *told)


def _constants(*vectors: Tensor | None) -> dict[str, Tensor]:
    """Those over the classes that there are, by the kernel's names."""
    named = zip(_BY_LABEL, vectors, strict=True)
    return {name: v.double().contiguous() for name, v in named if v is not None}


@lru_cache(maxsize=256)  # a training run has few shapes
def _plan_of_rows(
    shape: torch.Size, strides: tuple[int, ...], axis: int, *told: Any
) -> _kernel.LossCall | None:
    """A call of such rows without its addresses; None where two strides cannot address them."""
    layout = strides_of(shape, axis % len(shape), strides, None)
    if layout is None:
        return None
    plan = _plan(*told)
    plan.N, plan.C, plan.inner = math.prod(shape) // shape[axis], shape[axis], layout.inner
    plan.z_strides, plan.grad_strides = layout.z, layout.grad
    return plan


@lru_cache(maxsize=256)
def _plan_of_elements(
    shape: torch.Size, axis: int, L: int, ranks: tuple[tuple[str, int], ...], *told: Any
) -> _kernel.LossCall:
    """A call of such elements, of L labels."""
    plan = _plan(*told)
    plan.N, plan.C, plan.inner = math.prod(shape), L, math.prod(shape[axis + 1 :])
    for name, rank in ranks:
        setattr(plan, f"{name}_by_label", rank == _BY_LABEL[name])
    return plan


def _plan(
    dtype: torch.dtype, ignored: int | None, numbers: Numbers, reduction: Reduction
) -> _kernel.LossCall:
    α, β, γ, s, ε = numbers
    return _kernel.LossCall(
        size=ctypes.sizeof(_kernel.LossCall),
        ignore_index=ignored or 0,
        alpha=α,
        beta=β,
        total_weight=math.nan,
        total_examples=math.nan,
        gamma=γ,
        scale=s,
        smoothing=ε,
        ignored=math.nan if ignored is None else ignored,
        dtype=_DTYPES[dtype],
        by_weight=reduction == "mean",
        by_examples=reduction in ("mean", "batch_mean"),
    )


# --- in compiled code, an operator, whose arguments PyTorch wants to be flat


# defined by its schema, as torch.library.custom_op's own wrappers take longer than a small batch
_NAME = "lmf_multi::kernel"
torch.library.define(
    _NAME,
    f"({SCHEMA}, bool with_grad) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
operator = torch.ops.lmf_multi.kernel.default


@torch.library.impl(_NAME, "CPU")
def _(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The reduced loss, and its gradient, empty where nobody wants it."""
    *others, with_grad = arguments
    batch = batch_of(others)
    given = {"input": z, "target": batch.y, "where": batch.options.where}
    for name, x in given.items():
        if x is not None:
            check_memory(name, x)
    known = _call(z, batch, with_grad) if _is_in_reach(z) else None
    if known is None:
        losses, of_z = value_and_grad(*prepare(z, batch), batch.axis)
        grad = torch.empty_like(z, dtype=torch.float32).copy_(of_z) if with_grad else None
        known = losses if batch.options.reduction == "none" else losses.sum(), grad
    loss, grad = known
    return loss, z.new_empty(0) if grad is None else grad


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _(z: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, _, with_grad = others
    loss = y.new_empty(y.shape if reduction == "none" else (), dtype=torch.float32)
    grad = torch.empty_like(z.contiguous() if others[-2] else z, dtype=torch.float32)
    return loss, grad if with_grad else z.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[TENSORS:-1]
    ctx.set_materialize_grads(False)  # or the backward pass gets zeros of the logits' size
    ctx.save_for_backward(*inputs[:TENSORS], output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * (TENSORS + len(ctx.settings) + 1)
    z, *tensors, grad = ctx.saved_tensors
    batch = batch_of((*tensors, *ctx.settings))
    if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
        grad = gradient(z, batch)
    grad = (along_classes(upstream, batch.axis) * grad).to(z.dtype)
    return grad, *[None] * (TENSORS + len(ctx.settings))


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
