"""The terms in PyTorch, with the gradient's closed form computed together with the value.

The backward pass is then one product. Under autograd the same steps are differentiable themselves,
which is what second derivatives use.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return _is_plain(x) and x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is one of numbers, neither traced nor batched."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def mixture(
    z: Tensor,
    y: Tensor | None,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int | None,
) -> Tensor:
    """a LDAM_y + b Focal_y of each example, or with ``y=None`` the sum of it over the classes.

    Without a class axis it is the sigmoid form: y tells the positive elements, and with ``y=None``
    Δ, a and b hold negative and positive along a first axis.
    """
    coefficients = [c for c in (a, b) if c is not None]
    if torch.is_grad_enabled() and any(c.requires_grad for c in coefficients):
        # a distribution that is learned too: leave both gradients to autograd
        return _value_and_grad(z, y, masked, Δ, a, b, γ, s, axis)[0]
    formula = _ClosedForm if torch.compiler.is_compiling() else _ClosedFormForward
    loss: Tensor = formula.apply(z, y, masked, Δ, a, b, γ, s, axis)[0]
    return loss


class _ClosedForm(torch.autograd.Function):
    """The value, with the gradient kept for the backward pass; differentiable again and again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        z, y, *_ = inputs
        if y is None or not readable(z) or z.numel() <= _PIECE:
            return _value_and_grad(*inputs)
        return _value_and_grad_in_pieces(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, γ, s, axis = inputs
        ctx.settings, ctx.axis = (γ, s, axis), axis
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or the backward pass gets zeros of the logits' size
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        z, y, masked, Δ, a, b, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = _value_and_grad(z, y, masked, Δ, a, b, *ctx.settings)[1]
        upstream = upstream if ctx.axis is None else upstream.unsqueeze(ctx.axis)
        return (upstream * grad).to(z.dtype), *[None] * 8


class _ClosedFormForward(_ClosedForm):
    """With forward-mode derivatives, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        change = ctx.saved_tensors[-1] * tangent
        return change if ctx.axis is None else change.sum(ctx.axis), None


def _value_and_grad(
    z: Tensor,
    y: Tensor | None,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int | None,
) -> tuple[Tensor, Tensor]:
    z = z if z.dtype == torch.float64 else z.float()
    if axis is None:
        return _sigmoid(z, y, Δ, a, b, γ, s)
    if y is None:
        return _all_classes(z, Δ, a, b, γ, s, axis)
    return _one_class(z, y, masked, Δ, a, b, γ, s, axis)


def _value_and_grad_in_pieces(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time: on a CPU their intermediates then stay in its cache."""
    arrays, (γ, s, axis) = arguments[:5], arguments[5:]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    loss, grad = torch.empty_like(arrays[0], dtype=dtype), torch.empty_like(z, dtype=dtype)
    for piece in _pieces(z.shape, axis):
        rows = piece if axis is None else piece[:axis] + piece[axis + 1 :]
        y, masked, Δ, a, b = (None if array is None else array[rows] for array in arrays)
        loss[rows], grad[piece] = _value_and_grad(z[piece], y, masked, Δ, a, b, γ, s, axis)
    return loss, grad


def _pieces(shape: torch.Size, axis: int | None) -> Iterator[tuple[slice, ...]]:
    """Slices over all axes but the class axis, of at most ``_PIECE`` elements where possible."""
    choices, elements = [[slice(None)] for _ in shape], 1 if axis is None else shape[axis]
    for i in reversed([i for i in range(len(shape)) if i != axis]):
        step = max(1, _PIECE // elements)
        choices[i] = [slice(start, start + step) for start in range(0, shape[i], step)]
        elements *= min(step, shape[i])
    return itertools.product(*choices)


_PIECE = 2**18  # 1 MiB of float32


def _one_class(
    z: Tensor,
    y: Tensor,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Loss of the labelled class alone, and its gradient."""
    y = y.unsqueeze(axis)
    # a clone keeps the strides of channels_last, and scatter does not; vmap needs scatter
    others = (
        z.clone().scatter_(axis, y, -torch.inf) if _is_plain(z) else z.scatter(axis, y, -torch.inf)
    )
    z_y = z.gather(axis, y)
    a, b, Δ = (None if v is None else v.unsqueeze(axis) for v in (a, b, Δ))
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y = z_y.masked_fill(masked.unsqueeze(axis), 0.0)
        others.masked_fill_(masked.unsqueeze(axis), -torch.inf)
    M = others.detach().amax(axis, keepdim=True).clamp(min=-_LARGE)
    d, x = _difference(z_y, M), others.sub_(M)

    losses, slopes, exps, factors = [], [], [], []
    if a is not None and Δ is not None:
        e, S = _exp_and_sum(x * (s * _LOG2E), axis)
        ldam, slope = _ldam(s * (d - Δ) - torch.log1p(S - 1), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
        exps.append(e)
        factors.append(slopes[-1] / -S)
    if b is not None:
        e, S = _exp_and_sum(x.mul_(_LOG2E), axis)
        focal, slope = _focal(d - torch.log1p(S - 1), γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
        exps.append(e)
        factors.append(slopes[-1] / -S)
    if not losses:
        return torch.zeros_like(z_y).squeeze(axis), torch.zeros_like(z)
    factors = [factor.to(z.dtype) for factor in factors]
    slope = _sum(slopes).to(z.dtype)
    if _is_plain(exps[0]) and not torch.is_grad_enabled():  # nobody else holds the exponentials
        grad = exps.pop().mul_(factors.pop())
        for e, c in zip(exps, factors, strict=True):
            grad.addcmul_(e, c)
        grad.scatter_(axis, y, slope)
    else:
        grad = _sum([e * c for e, c in zip(exps, factors, strict=True)]).scatter(axis, y, slope)
    return _sum(losses).to(z.dtype).squeeze(axis), grad


def _exp_and_sum(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """2^x, overwriting x, and its sum along the axis.

    On CPUs ``exp2`` is several times faster than ``exp``, whose results near the smallest normal
    number are slower still, as is every later operation on them: 2^-70 is far below any epsilon.
    """
    e = torch.clamp_min_(x, -70).exp2_()
    return e, _at_least_1(e.sum(axis, keepdim=True))


def _at_least_1(S: Tensor) -> Tensor:
    """A sum of exponentials, which is 1 or more unless no other class is possible.

    ``clamp`` would halve or drop the derivative where the sum rounds to 1.
    """
    return torch.where(S < 1, 1.0, S)


def _all_classes(
    z: Tensor,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Loss of every class, summed, and its gradient.

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    top = z.detach().argmax(axis, keepdim=True)
    is_top = torch.zeros_like(z, dtype=torch.bool).scatter(axis, top, True)
    others = z.masked_fill(is_top, -torch.inf)
    M = z.detach().amax(axis, keepdim=True)
    M_others = others.detach().amax(axis, keepdim=True).clamp(min=-_LARGE)
    x, x_others = z - M, others - M_others
    d = _difference(z, torch.where(is_top, M_others, M))

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = torch.exp(s * x), torch.exp(s * x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        ldam, slope = _ldam(s * (d - Δ) - torch.log1p(S - 1), s)
        losses.append(_times(a, ldam))
        grads.append(_chain(a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = torch.exp(x), torch.exp(x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        focal, slope = _focal(d - torch.log1p(S - 1), γ)
        losses.append(_times(b, focal))
        grads.append(_chain(b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return torch.zeros_like(z).sum(axis), torch.zeros_like(z)
    return _sum(losses).sum(axis).to(z.dtype), _sum(grads).to(z.dtype)


def _sigmoid(
    x: Tensor,
    positive: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
) -> tuple[Tensor, Tensor]:
    """Loss of each element as a positive or a negative, or of both summed, and its gradient."""
    if positive is None:
        sign = torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device).view(2, *[1] * x.dim())
    else:
        sign = torch.where(positive, 1.0, -1.0).to(x.dtype)
    ω = _widened(sign * x)

    losses, slopes = [], []
    if a is not None and Δ is not None:
        ldam, slope = _ldam(s * (ω - Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
    if b is not None:
        focal, slope = _focal(ω, γ)
        losses.append(_times(b, focal))
        slopes.append(b * slope)
    if not losses:
        return torch.zeros_like(x), torch.zeros_like(x)
    loss, grad = _sum(losses), sign * _sum(slopes)
    if positive is None:
        loss, grad = loss.sum(0), grad.sum(0)
    return loss.to(x.dtype), grad.to(x.dtype)


def _sums_of_others(
    e: Tensor, e_others: Tensor, is_top: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = _at_least_1(e_others.sum(axis, keepdim=True))
    return torch.where(is_top, S_others, e.sum(axis, keepdim=True) - e), S_others


def _chain(G: Tensor, e: Tensor, S: Tensor, r_top: Tensor, is_top: Tensor, axis: int) -> Tensor:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = torch.where(is_top, 0.0, G / S)
    G_top = torch.where(is_top, G, 0.0).sum(axis, keepdim=True)
    return G - e * (t.sum(axis, keepdim=True) - t) - r_top * G_top


def _difference(z: Tensor, M: Tensor) -> Tensor:
    """z - M, and with it all that follows, in float64: s multiplies float32's rounding errors."""
    return _widened(z) - _widened(M)


def _widened(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _ldam(τ: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    # sigmoid(-τ) may underflow where s times it does not, its root cannot
    root = torch.exp2(_softplus(τ) * (-_LOG2E / 2))
    return _softplus(-τ), -(s * root) * root


def _focal(ω: Tensor, γ: float) -> tuple[Tensor, Tensor]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    ce, modulation = _softplus(-ω), torch.exp2(_softplus(ω) * (-γ * _LOG2E))
    slope = -modulation * (γ * torch.sigmoid(ω) * ce.clamp(max=_LARGE) + torch.sigmoid(-ω))
    return modulation * ce, slope


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=80)  # the default, 20, costs float64 six digits


_LOG2E = math.log2(math.e)
# Beyond every log-odds that matters, and small enough for products with it to stay finite.
_LARGE = 1e18


def _times(coefficient: Tensor, term: Tensor) -> Tensor:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term == torch.inf)
    return torch.where(nothing, 0.0, coefficient * term)


def _sum(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
