"""The arithmetic in PyTorch: the terms, and the gradient's closed form computed with the value.

Symbols and shapes are those of ``lmf_multi._terms``, steps and names those of
``lmf_multi.reference``. The class axis stays where it is, so that no layout is copied.
"""

import math
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from lmf_multi._terms import Labels, Terms


def value_and_grad(
    z: Tensor, labels: Labels, terms: Terms, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Σ_j q_j w_j (a LDAM_j + b Focal_j) of each example (N,), and its gradient (N, C).

    Of the labelled class alone, or of all; without a class axis it is the sigmoid form, whose
    gradient is (N,) too.
    """
    if axis is None:
        return sigmoid(z, labels, terms)
    if labels.q is not None:
        return all_classes(z, labels, terms, axis)
    return one_class(z, labels, terms, axis)


def one_class(z: Tensor, labels: Labels, terms: Terms, axis: int) -> tuple[Tensor, Tensor]:
    """Loss of the labelled class alone (N,), and its gradient (N, C)."""
    masked, y, (Δ, w, a, b, γ, s, o, _) = labels.masked, labels.y.clamp(min=0), terms
    z, lost = adjusted(widened(z), None if o is None else by_class(o, z.dim(), axis))
    W, is_y = weights(labels, w, z.dtype), is_class(y, z, axis)
    z_y, left_out = of_label(z, y, is_y, axis), is_y
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y, left_out = torch.where(masked, 0.0, z_y), is_y | masked.unsqueeze(axis)
    others = torch.where(left_out, -torch.inf, z)  # masked_fill would change the layout
    M, lost_y = others.detach().amax(axis).clamp(min=-LARGE), None
    if lost is not None:
        M, lost_y = below(M), of_label(lost, y, is_y, axis)
    x = above(others, M.unsqueeze(axis), lost)

    losses, slopes, grads = [], [], []
    if a is not None and Δ is not None:
        e, S = exponentials(s * x, axis)
        loss, slope = ldam(log_odds(z_y, M, S.squeeze(axis), s, at_class(Δ, y), lost_y), s)
        losses.append(times(W * a, loss))
        slopes.append((W * a * slope).unsqueeze(axis))
        grads.append(e * (slopes[-1] / -S))
    if b is not None:
        e, S = exponentials(x, axis)
        loss, slope = focal(log_odds(z_y, M, S.squeeze(axis), lost=lost_y), γ)
        losses.append(times(W * b, loss))
        slopes.append((W * b * slope).unsqueeze(axis))
        grads.append(e * (slopes[-1] / -S))
    if not losses:
        return torch.zeros_like(z_y), torch.zeros_like(z)
    return sum_of(losses), torch.where(is_y, sum_of(slopes), sum_of(grads))


def all_classes(z: Tensor, labels: Labels, terms: Terms, axis: int) -> tuple[Tensor, Tensor]:
    """Loss of every class by its share q_j w_j, summed (N,), and its gradient (N, C).

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    q, (Δ, w, a, b, γ, s, o, _) = labels.q, terms
    Δ, w, o = (None if v is None else by_class(v, z.dim(), axis) for v in (Δ, w, o))
    z, lost = adjusted(widened(z), o)
    share = q if w is None else q * w
    is_top = is_class(z.detach().argmax(axis), z, axis)
    others = torch.where(is_top, -torch.inf, z)
    M = z.detach().amax(axis, keepdim=True)
    M_others = others.detach().amax(axis, keepdim=True).clamp(min=-LARGE)
    if lost is not None:
        M, M_others = below(M), below(M_others)
    M_j = torch.where(is_top, M_others, M)
    x, x_others = above(z, M, lost), above(others, M_others, lost)

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = torch.exp(s * x), torch.exp(s * x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = ldam(log_odds(z, M_j, S, s, Δ, lost), s)
        losses.append(times(share * a, loss))
        grads.append(chain(share * a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = torch.exp(x), torch.exp(x_others)
        S, S_others = sums_of_others(e, e_others, is_top, axis)
        loss, slope = focal(log_odds(z, M_j, S, lost=lost), γ)
        losses.append(times(share * b, loss))
        grads.append(chain(share * b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return torch.zeros_like(z).sum(axis), torch.zeros_like(z)
    return sum_of(losses).sum(axis), sum_of(grads)


def sigmoid(x: Tensor, labels: Labels, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss of each element (N,) as its label, or as negative and positive by q, and its gradient.

    Δ, w and q have negative and positive along a first axis (2, …).
    """
    q, (Δ, w, a, b, γ, s, o, ε) = labels.q, terms
    x, lost = adjusted(widened(x), o)
    if q is None:
        share, y = weights(labels, w, x.dtype), labels.y.clamp(min=0)
        x = x if labels.masked is None else torch.where(labels.masked, 0.0, x)
        sign, Δ = (2 * y - 1).to(x.dtype), None if Δ is None else at_class(Δ, y)
    else:
        q = q if ε == 0 else (1 - ε) * q + ε / 2 * q.sum(0)
        share = q if w is None else q * w
        sign = torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device).view(2, *[1] * x.dim())
    ω, lost = sign * x, None if lost is None else sign * lost

    losses, slopes = [], []
    if a is not None and Δ is not None:
        loss, slope = ldam(log_odds(ω, None, None, s, Δ, lost), s)
        losses.append(times(share * a, loss))
        slopes.append(share * a * slope)
    if b is not None:
        loss, slope = focal(ω, γ)
        losses.append(times(share * b, loss))
        slopes.append(share * b * slope)
    if not losses:
        return torch.zeros_like(x), torch.zeros_like(x)
    loss, grad = sum_of(losses), sign * sum_of(slopes)
    return (loss, grad) if q is None else (loss.sum(0), grad.sum(0))


def weights(labels: Labels, w: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each example's class weight W (N,): 0 for a masked one, NaN for an unknown label."""
    y = labels.y
    W = torch.ones_like(y, dtype=dtype) if w is None else at_class(w, y.clamp(min=0)).to(dtype)
    W = torch.where(y < 0, torch.nan, W)
    return W if labels.masked is None else torch.where(labels.masked, 0.0, W)


def sums_of_others(e: Tensor, e_others: Tensor, is_top: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Σ_{k≠j} of the exponentials for every j (N, C), and the largest class's by itself (N, 1)."""
    S_others = at_least_1(e_others.sum(axis, keepdim=True))
    return torch.where(is_top, S_others, e.sum(axis, keepdim=True) - e), S_others


def chain(G: Tensor, e: Tensor, S: Tensor, r_top: Tensor, is_top: Tensor, axis: int) -> Tensor:
    """Gradient (N, C) for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = torch.where(is_top, 0.0, G / S)
    G_top = torch.where(is_top, G, 0.0).sum(axis, keepdim=True)
    return G - e * (t.sum(axis, keepdim=True) - t) - r_top * G_top


def log_odds(
    z: Tensor,
    M: Tensor | None,
    S: Tensor | None,
    s: float = 1.0,
    Δ: Tensor | None = None,
    lost: Tensor | None = None,
) -> Tensor:
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back.

    ``lost`` is one of z already.
    """
    errors = [] if lost is None else [lost]
    for subtrahend in (M, Δ):
        if subtrahend is not None:
            z, rounding = difference(z, subtrahend)
            errors.append(rounding)
    rest = [s * sum_of(errors)] if errors else []
    rest += [] if S is None else [-torch.log(S)]
    return s * z + sum_of(rest) if rest else s * z


def difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    return c, torch.where(lost.abs() < torch.inf, lost, 0.0).detach()


def adjusted(z: Tensor, o: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """z + o, rounded, and what the rounding lost; z itself without an adjustment."""
    return (z, None) if o is None else difference(z, -o)


def ldam(τ: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    root, e, rest = tail(τ)
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    r = torch.where(τ >= 0, root, 1.0)
    return torch.where(τ >= 0, 0.0, -τ) + rest, -(s * r) * r / (1 + e)


def focal(ω: Tensor, γ: float) -> tuple[Tensor, Tensor]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    _, e, rest = tail(ω)
    ce, log = torch.where(ω >= 0, 0.0, -ω) + rest, torch.where(ω >= 0, ω, 0.0) + rest
    modulation = torch.exp(-γ * log)
    p, miss = torch.where(ω >= 0, 1.0, e), torch.where(ω >= 0, e, 1.0)  # times 1 + e
    return modulation * ce, -modulation * (γ * p * ce.clamp(max=LARGE) + miss) / (1 + e)


def tail(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^{-|x|/2}, its square and log(1 + e^{-|x|}), of which sigmoid and softplus are made.

    ``where`` takes the same side at 0 throughout, so that the derivatives there are right.
    """
    root = torch.exp(torch.where(x >= 0, -x, x) / 2)
    e = root * root
    return root, e, torch.log1p(e)


def times(coefficient: Tensor, term: Tensor) -> Tensor:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term == torch.inf)
    return torch.where(nothing, 0.0, coefficient * term)


# Beyond every log-odds that matters, and small enough for products with it to stay finite.
LARGE = 1e18


# --- PyTorch's own


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(z: Tensor) -> Tensor:
    """Logits in the dtype of the arithmetic."""
    return z.to(wide_dtype(z.dtype))


def is_class(y: Tensor, z: Tensor, axis: int) -> Tensor:
    """Boolean one-hot (N, C) of the class indices, in the layout of the logits."""
    classes = torch.arange(z.shape[axis], device=y.device).view([-1] + [1] * (y.dim() - axis))
    # the first operand decides the layout, and with it that of what is selected
    return torch.zeros_like(z, dtype=torch.bool) | (y.unsqueeze(axis) == classes)


def by_class(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """(C,) along the class axis of ``ndim``."""
    return vector.view([-1] + [1] * (ndim - 1 - axis))


def at_class(vector: Tensor, y: Tensor) -> Tensor:
    """``vector[y]`` (N,), of (C,) or of the sigmoid form's (2, …); vmap cannot batch the former for
    a single label.
    """
    if vector.dim() > 1:
        return torch.where(y == 1, vector[1], vector[0])
    return vector.index_select(0, y.reshape(-1)).view(y.shape)


def of_label(z: Tensor, y: Tensor, is_y: Tensor, axis: int) -> Tensor:
    """The label's logit (N,).

    In compiled code for CPUs a sum, together with which the largest is found, and which is kept:
    what was gathered would be gathered again wherever it is used.
    """
    if torch.compiler.is_compiling() and z.device.type == "cpu":
        return torch.where(is_y, z, 0.0).sum(axis)
    return z.gather(axis, y.unsqueeze(axis)).squeeze(axis)


def below(M: Tensor) -> Tensor:
    """A little less than the largest of adjusted logits, which was rounded: without rounding it is
    above, so that its exponential is 1 or more."""
    return M - M.abs() * torch.finfo(M.dtype).eps


def above(z: Tensor, M: Tensor, lost: Tensor | None) -> Tensor:
    """z - M, with what z has lost: M is about as large as z, the difference need not be."""
    return z - M if lost is None else (z - M) + lost


def exponentials(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """e^x (N, C), and its sum along the axis (N, 1).

    Results near the smallest normal number, and products with them, are many times slower on CPUs;
    e^-48 is far below any epsilon.
    """
    e = torch.exp2((x * LOG2E).clamp(min=-70))
    return e, at_least_1(e.sum(axis, keepdim=True))


LOG2E = math.log2(math.e)


def at_least_1(S: Tensor) -> Tensor:
    """A sum of exponentials, which is 1 or more unless no other class is possible.

    ``clamp`` would halve or drop the derivative where the sum rounds to 1.
    """
    return torch.where(S < 1, 1.0, S)


def sum_of(terms: list[Any]) -> Any:
    """The sum of at least one."""
    return reduce(add, terms)
