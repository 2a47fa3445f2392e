"""The loss of plain CPU tensors in one pass over the logits, where the kernel was compiled.

``lmf_multi/_cpu.cpp`` computes value and gradient together: forward and backward read the logits
once, and no buffer beside logits and gradient is of their size. Under ``torch.compile`` an operator
calls it.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Optional, TypeAlias, cast

import torch
from torch import Tensor

from lmf_multi._cpu import library
from lmf_multi.spec import Reduction
from lmf_multi.torch._closed_form import as_long, at_trace_time, one_class
from lmf_multi.torch._eager import Known
from lmf_multi.torch._triton import layout_of

_DTYPES = (torch.float32, torch.bfloat16)
_UNKNOWN_LABEL, _NO_MEMORY = 1, 2
WORTH_A_CALL = 2**15  # logits; compiled operations are faster on fewer
_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


@cache
def kernel() -> Any:
    """The compiled function, or None."""
    compiled = library()
    if compiled is None:
        return None
    function = compiled.lmf_multi_one_class
    kinds: list[Any] = [_POINTER, _INT, *[_POINTER] * 6, *[_LONG] * 10, *[_DOUBLE] * 4]
    function.argtypes = [*kinds, _INT, _INT, _DOUBLE, _DOUBLE, _INT]
    return function


def check_memory(**tensors: Tensor) -> None:
    """Refuse tensors whose storage was freed, as FSDP's are: to read them would end the process."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if type(x) not in (Tensor, torch.nn.Parameter) or x.numel() == 0:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.layout != torch.strided:
            continue
        reach, size = x.numel(), x.untyped_storage().nbytes()
        if not x.is_contiguous():
            steps = zip(x.shape, x.stride(), strict=True)
            reach = 1 + sum((n - 1) * step for n, step in steps)
        if size < (x.storage_offset() + reach) * x.itemsize:
            raise RuntimeError(
                f"{name} must have memory for its shape {tuple(x.shape)}, got a storage of {size} "
                "bytes; call the loss before it is freed"
            )


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
    """The reduced loss of integer labels; None where a label is out of range or it is not finite.

    Those are left to ``plain``. Compiled code always gets a loss, as it cannot look.

    Args:
        z: float32 or bfloat16, logits, the classes along ``axis``.
        y: integer, the logits' shape without the class axis.
        Δ: (C,) float32, or None, without the LDAM term.
        w: (C,) float32, or None for ones.
        plain: the same loss of the logits, in differentiable operations: for second derivatives.
        totals: replace the batch's total class weight and number of examples in the means.
    """
    tensors = (z, y, Δ if alpha else None, w, *(totals or (None, None)))
    settings = _Settings(alpha, beta, γ, s, axis, ignore_index, reduction)
    with_grad = z.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return cast(Tensor, operator(*tensors, *settings, with_grad)[0])
    known = _call(tensors, settings, with_grad)
    return None if known is None else Known.apply(z, known, axis, plain)


class _Settings(NamedTuple):
    alpha: float
    beta: float
    gamma: float
    scale: float
    axis: int
    ignore_index: int
    reduction: Reduction


# logits, labels, margins, class weights, and the totals of weights and of examples
_Tensors: TypeAlias = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def _call(
    tensors: _Tensors, settings: _Settings, with_grad: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The loss and its gradient, or None as ``kernel_loss``."""
    z, y, Δ, w, *totals = tensors
    alpha, beta, γ, s, axis, ignore_index, reduction = settings
    layout, y = layout_of(z, y, axis), as_long(y).contiguous()
    assert layout is not None, "has_kernel_for() refuses these strides"
    grad = torch.empty_like(z, dtype=torch.float32) if with_grad else None
    # whatever the defaults are: the kernel writes float32 into the memory of this device
    kind: Any = {"dtype": torch.float32, "device": z.device}
    losses = torch.empty(y.shape, **kind) if reduction == "none" else None
    Δ, w = (None if v is None else v.contiguous() for v in (Δ, w))
    total = ctypes.c_double()
    status = kernel()(
        z.data_ptr(),
        z.dtype == torch.bfloat16,
        y.data_ptr(),
        *(None if v is None else v.data_ptr() for v in (Δ, w, grad, losses)),
        ctypes.addressof(total),
        y.numel(),
        z.shape[axis],
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
        *(torch.nan if t is None else t.sum().item() for t in totals),
        torch.get_num_threads(),
    )
    if status == _NO_MEMORY:
        raise MemoryError(f"the loss of logits {tuple(z.shape)} found no memory for its tiles")
    if status == _UNKNOWN_LABEL or not math.isfinite(total.value):
        return None
    return torch.tensor(total.value, **kind) if losses is None else losses, grad


# --- in compiled code, an operator


_is_exporting = getattr(torch.compiler, "is_exporting", None)  # which older PyTorch cannot tell


@at_trace_time
def _has_kernel() -> bool:
    return kernel() is not None


def has_operator_for(z: Tensor, y: Tensor) -> bool:
    """Whether ``torch.compile`` is to call the kernel, as it sees these tensors.

    Not in what is exported, which may run where this package is not installed, and not under the
    transforms of ``torch.func``, which can batch and differentiate operations.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and _is_exporting is not None
        and not _is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and z.device.type == y.device.type == "cpu"
        and z.dtype in _DTYPES
        and z.numel() >= WORTH_A_CALL
        and _has_kernel()
    )


@torch.library.custom_op("lmf_multi::one_class", mutates_args=())
def operator(
    z: Tensor,
    y: Tensor,
    margins: Optional[Tensor],  # noqa: UP045  # older PyTorch reads no other union
    class_weight: Optional[Tensor],  # noqa: UP045
    total_weight: Optional[Tensor],  # noqa: UP045
    total_examples: Optional[Tensor],  # noqa: UP045
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    axis: int,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The reduced loss of integer labels, and its gradient, empty where nobody wants it."""
    tensors = (z, y, margins, class_weight, total_weight, total_examples)
    check_memory(input=z, target=y)
    settings = _Settings(alpha, beta, gamma, scale, axis, ignore_index, cast(Reduction, reduction))
    known = _call(tensors, settings, with_grad) if has_kernel_for(z, y, axis) else None
    if known is None:
        losses, of_z = _operations(tensors, settings, combine=one_class, look=False)
        grad = torch.empty_like(z, dtype=torch.float32).copy_(of_z) if with_grad else None
        known = losses if reduction == "none" else losses.sum(), grad
    loss, grad = known
    return loss, z.new_empty(0) if grad is None else grad


@operator.register_fake
def _(z: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, with_grad = others
    loss = y.new_empty(y.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, torch.empty_like(z, dtype=torch.float32) if with_grad else z.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = _Settings(*inputs[6:-1])
    ctx.set_materialize_grads(False)  # or the backward pass gets zeros of the logits' size
    ctx.save_for_backward(*inputs[:6], output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 14
    *tensors, grad = ctx.saved_tensors
    z, by_row = tensors[0], upstream.dim() > 0
    if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
        losses = _operations(tensors, ctx.settings)
        loss = losses if by_row else losses.sum()
        (grad,) = torch.autograd.grad(loss, z, upstream, create_graph=True)
        return grad, *[None] * 13
    upstream = upstream.unsqueeze(ctx.settings.axis) if by_row else upstream
    return (upstream * grad).to(z.dtype), *[None] * 13


operator.register_autograd(_backward, setup_context=_setup_context)


def _operations(tensors: _Tensors, settings: _Settings, **options: Any) -> Any:
    """The same without the kernel, as ``compute_loss``."""
    from lmf_multi.torch._functional import compute_loss  # which imports this module

    z, y, Δ, w, *totals = tensors
    alpha, beta, γ, s, axis, ignore_index, reduction = settings
    return compute_loss(
        z,
        y,
        Δ,
        w,
        alpha,
        beta,
        γ,
        s,
        0.0,
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        totals=None if totals[0] is None else cast(Any, totals),
        **options,
    )
