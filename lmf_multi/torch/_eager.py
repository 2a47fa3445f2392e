"""The labelled class alone, eagerly on a CPU: the steps of ``one_class``, and a plan for memory.

Every operation reads and writes whole arrays, so rows are taken a piece at a time, whose arrays
stay in the cache and are overwritten. A small batch is next to no work, but as many operations:
NumPy starts them several times faster, on the same memory.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi.torch._closed_form import (
    LARGE,
    LOG2E,
    cast,
    focal,
    ldam,
    loss_dtype,
    namespace,
    one_class,
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
    compute: Any = _in_numpy if z.numel() <= _SMALL else _in_torch
    for piece in _pieces(z.shape, axis):
        rows = piece[:axis] + piece[axis + 1 :]
        some: Any = [None if v is None else v[rows] for v in (y, masked, Δ, a, b)]
        (y_, masked_, Δ_, a_, b_), z_ = some, z[piece].movedim(axis, 0)
        out = None if grad is None else grad[piece].movedim(axis, 0)
        value = compute(z_, out, y_, Δ_, a_, b_, γ, s)
        total = value.sum().item()
        if total - total != 0:  # not finite: perhaps a masked example, or 0 times infinity
            value, exact = one_class(z_, y_, masked_, Δ_, a_, b_, γ, s, 0)
            if out is not None:
                out.copy_(exact)
        loss[rows] = value
    return loss, grad


# Elements of a batch that is small, and of a piece: 2 MiB.
_SMALL, _PIECE = 2**15, 2**19


def _pieces(shape: torch.Size, axis: int) -> Iterator[tuple[slice, ...]]:
    """Slices over all axes but the class axis, of at most ``_PIECE`` elements where possible."""
    choices, elements = [[slice(None)] for _ in shape], shape[axis]
    others = [i for i in reversed(range(len(shape))) if i != axis]
    for i in others if shape.numel() > _PIECE else []:
        step = max(1, _PIECE // elements)
        choices[i] = [slice(start, start + step) for start in range(0, shape[i], step)]
        elements *= min(step, shape[i])
    return itertools.product(*choices)


def _in_numpy(
    z: Tensor,
    out: Tensor | None,
    y: Tensor,
    Δ: Any | None,
    a: Any | None,
    b: Any | None,
    γ: float,
    s: float,
) -> Tensor:
    """The loss of a small batch (C, …), whose gradient goes to ``out``."""
    C, R = z.shape[0], y.numel()
    x = z.detach().to(loss_dtype(z)).numpy().reshape(C, R).copy()
    flat, labels = x.reshape(-1), y.numpy().reshape(-1) * R + np.arange(R)
    Δ, a, b = (None if v is None else v.detach().numpy().reshape(-1) for v in (Δ, a, b))
    z_y = flat[labels]
    flat[labels] = -LARGE
    with np.errstate(all="ignore"):
        loss, slope = _one_class(x, np.empty_like(x), z_y, Δ, a, b, γ, s, out is not None)
    if out is not None:
        flat[labels] = slope
        out.numpy()[...] = x.reshape(out.shape)
    return torch.from_numpy(loss).view(y.shape)


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
        is_y, classes = torch.empty(z.shape, dtype=z.dtype), torch.arange(C, dtype=torch.int8)
        torch.eq(labels.to(torch.int8), classes.view(C, *[1] * y.dim()), out=is_y)
        x = torch.add(z, is_y, alpha=-LARGE, out=torch.empty_like(is_y))
    else:
        x = z.clone().scatter_(0, labels, -LARGE)
    z_y = z.gather(0, labels).squeeze(0)
    loss: Tensor
    loss, slope = _one_class(x, torch.empty_like(x), z_y, Δ, a, b, γ, s, out is not None)
    if out is not None and few:
        torch.add(x, is_y.mul_(slope), out=out)
    elif out is not None:
        out.copy_(x.scatter_(0, labels, slope.unsqueeze(0)))
    return loss


_FEW = 64


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

    loss, slope = nx.zeros_like(z_y), nx.zeros_like(z_y)
    if a is not None and Δ is not None:
        e = x if b is None else e
        S = _exp_and_sum(nx.multiply(x, s * LOG2E, out=e))
        n = cast(Δ, nx.float64) - d
        n *= s
        n += cast(nx.log(S), nx.float64)
        loss, slope = ldam(n, s, x.dtype)
        loss *= a
        slope *= a
        if with_grad:
            e *= slope / -S
    if b is not None:
        x *= LOG2E
        S = _exp_and_sum(x)
        value, slope_of_focal = focal(cast(nx.log(S), nx.float64) - d, γ, x.dtype)
        value *= b
        slope_of_focal *= b
        loss += value
        slope += slope_of_focal
        if with_grad:
            x *= slope_of_focal / -S
    if a is not None and b is not None and with_grad:
        x += e
    return loss, slope


def _exp_and_sum(x: Any) -> Any:
    """Overwrites x by 2^x; the sum over the classes.

    What is far below the sum's epsilon becomes an exact 0: numbers near the smallest normal one,
    here or in later products, cost forty times the others.
    """
    nx = namespace(x)
    negligible = -40.0 if x.dtype == nx.float32 else -80.0
    if nx is np:
        np.maximum(x, negligible, out=x)
    else:
        x.clamp_(min=negligible)
    nx.exp2(x, out=x)
    x -= 2**negligible
    return x.sum(0)
