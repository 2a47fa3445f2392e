"""The labelled class alone, eagerly on a CPU: the steps of ``one_class``, and a plan for memory.

It takes float64, and all of it where the kernel of ``_cpu`` was not compiled. Every operation reads
and writes whole arrays, so rows are taken a piece at a time, whose arrays stay in the cache and are
overwritten. A small batch is next to no work, but as many operations: NumPy starts them several
times faster, on the same memory.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi.spec import Reduction
from lmf_multi.torch._closed_form import (
    LARGE,
    LOG2E,
    cast,
    chained,
    focal,
    keep,
    ldam,
    logits_of,
    loss_dtype,
    namespace,
    one_class,
    sum_of,
)


def one_class_eager(
    z: Tensor,
    y: Tensor,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """``one_class``; the gradient is None where nobody wants it."""
    dtype = loss_dtype(z)
    loss = torch.empty_like(y, dtype=dtype)
    grad = torch.empty_like(z, dtype=dtype) if with_grad else None
    for piece in _pieces(z.shape, axis):
        rows = piece[:axis] + piece[axis + 1 :]
        some: Any = [None if v is None else v[rows] for v in (y, masked, Δ, a, b)]
        (y_, masked_, Δ_, a_, b_), z_ = some, z[piece].movedim(axis, 0)
        out = None if grad is None else grad[piece].movedim(axis, 0)
        value = _in_torch(z_, out, y_, Δ_, a_, b_, γ, s)
        total = value.sum().item()
        if total - total != 0:  # not finite: perhaps a masked example, or 0 times infinity
            value, exact = one_class(z_, y_, masked_, Δ_, a_, b_, γ, s, 0)
            if out is not None:
                out.copy_(exact)
        loss[rows] = value
    return loss, grad


_PIECE = 2**19  # 2 MiB of float32


def _pieces(shape: torch.Size, axis: int) -> Iterator[tuple[slice, ...]]:
    """Slices over all axes but the class axis, of at most ``_PIECE`` elements where possible."""
    choices, elements = [[slice(None)] for _ in shape], shape[axis]
    others = [i for i in reversed(range(len(shape))) if i != axis]
    for i in others if shape.numel() > _PIECE else []:
        step = max(1, _PIECE // elements)
        choices[i] = [slice(start, start + step) for start in range(0, shape[i], step)]
        elements *= min(step, shape[i])
    return itertools.product(*choices)


def _in_torch(
    z: Tensor,
    out: Tensor | None,
    y: Tensor,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
) -> Tensor:
    """The loss of a piece (C, …), whose gradient goes to ``out``."""
    C, z, labels = len(z), z.detach().to(loss_dtype(z)), y.unsqueeze(0)
    if few := C <= _FEW:
        # a one-hot array is faster than scattered writes, and so are classes along the first axis
        is_y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        classes = torch.arange(C, dtype=torch.int8, device=z.device)
        torch.eq(labels.to(torch.int8), classes.view(C, *[1] * y.dim()), out=is_y)
        x = torch.add(z, is_y, alpha=-LARGE, out=torch.empty_like(is_y))
    else:
        x = z.clone().scatter_(0, labels, -LARGE)
    z_y = z.gather(0, labels).squeeze(0)
    loss: Tensor
    loss, slope = _one_class(x, torch.empty_like(x), z_y, Δ, a, b, γ, s, out is not None)
    if out is not None and few:
        torch.addcmul(x, is_y, slope, out=out)
    elif out is not None:
        out.copy_(x.scatter_(0, labels, slope.unsqueeze(0)))
    return loss


_FEW = 64


def small_loss(
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
    """The reduced loss of a small batch of integer labels, in NumPy.

    None where a label may be ignored or is out of range, or the loss is not finite, which ``plain``
    takes care of: the same loss of the logits in differentiable operations, for second derivatives
    too.
    """
    C, R, with_grad = z.shape[axis], y.numel(), z.requires_grad and torch.is_grad_enabled()
    labels = y.numpy().reshape(-1)
    smallest, largest = (labels.min(), labels.max()) if R else (-1, -1)
    if smallest < 0 or largest >= C or smallest <= ignore_index <= largest:
        return None
    x = z.detach().resolve_neg().movedim(axis, 0).to(loss_dtype(z)).numpy().reshape(C, R).copy()
    labels = labels.astype(np.int64)  # C · R may be too large for its dtype
    flat, positions = x.reshape(-1), labels * R + np.arange(R)
    W = np.ones(R, x.dtype) if w is None else w.numpy()[labels]
    by_weight, by_examples = 1.0, 1.0
    if totals is not None:
        by_weight, by_examples = (total.sum().item() for total in totals)
    elif reduction in ("mean", "batch_mean"):
        by_weight, by_examples = W.sum().item(), float(R)
    by_weight = by_examples if reduction == "batch_mean" else by_weight
    a = None if alpha == 0 else W * (alpha / (by_weight or 1.0))
    b = None if beta == 0 else W * (beta / max(by_examples, 1.0))
    z_y = flat[positions]
    flat[positions] = -LARGE
    with np.errstate(all="ignore"):
        margins = None if Δ is None else Δ.numpy()[labels]
        each, slope = _one_class(x, np.empty_like(x), z_y, margins, a, b, γ, s, with_grad)
        total = each.sum()
    if not np.isfinite(total):
        return None
    grad = None
    if with_grad:
        flat[positions] = slope
        grad = torch.empty_like(z, dtype=loss_dtype(z))
        grad.movedim(axis, 0).numpy()[...] = x.reshape(C, *y.shape)
    value = each.reshape(y.shape) if reduction == "none" else np.asarray(total)
    loss: Tensor = Known.apply(z, (torch.from_numpy(value), grad), axis, plain)
    return loss


SMALL = 2**15


class Known(torch.autograd.Function):
    """A value and its gradient, computed already."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        known: tuple[Tensor, Tensor | None],  # no input, which the caller could not change in place
        axis: int,
        plain: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.axis, ctx.plain, (value, grad) = axis, plain, known
        keep(ctx, z, grad)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            z = logits_of(ctx)
            (grad,) = torch.autograd.grad(ctx.plain(z), z, upstream, create_graph=True)
            return grad, None, None, None
        return chained(ctx, upstream, grad), None, None, None


def _one_class(
    x: Any,
    e: Any,
    z_y: Any,
    Δ: Any | None,
    a: Any | None,
    b: Any | None,
    γ: float,
    s: float,
    with_grad: bool,
) -> tuple[Any, Any]:
    """Loss and its gradient for the labelled class; that for the others replaces their logits.

    Arrays of PyTorch or NumPy: ``x`` (C, …) holds the logits, in which the labelled class has
    ``-LARGE``, so that one is always possible; ``e`` (C, …) is overwritten. Coefficients 0 with
    logits that are not finite give NaN.
    """
    nx = namespace(x)
    M = nx.amax(x, 0)
    d = cast(z_y, nx.float64) - cast(M, nx.float64)
    x -= M

    losses, slopes = [], []
    if a is not None and Δ is not None:
        e = x if b is None else e
        S = _exp_and_sum(nx.multiply(x, s * LOG2E, out=e))
        n = cast(Δ, nx.float64) - d
        n *= s
        n += cast(nx.log(S), nx.float64)
        value, slope = ldam(n, s, x.dtype)
        value *= a
        slope *= a
        losses.append(value)
        slopes.append(slope)
        if with_grad:
            e *= slope / -S
    if b is not None:
        x *= LOG2E
        S = _exp_and_sum(x)
        value, slope = focal(cast(nx.log(S), nx.float64) - d, γ, x.dtype)
        value *= b
        slope *= b
        losses.append(value)
        slopes.append(slope)
        if with_grad:
            x *= slope / -S
    if not losses:
        x[...] = 0
        return nx.zeros_like(M), nx.zeros_like(M)
    if len(losses) == 2 and with_grad:
        x += e
    return sum_of(losses), sum_of(slopes)


def _exp_and_sum(x: Any) -> Any:
    """Overwrites x by 2^x; the sum over the classes.

    What is far below the sum's epsilon becomes an exact 0: numbers near the smallest normal one,
    here or in later products, cost forty times the others.
    """
    negligible = -40.0 if x.dtype == namespace(x).float32 else -80.0
    if isinstance(x, Tensor):
        torch.threshold_(x, negligible, -torch.inf).exp2_()
    else:
        np.exp2(np.maximum(x, negligible, out=x), out=x)
        x -= 2**negligible
    return x.sum(0)
