"""The steps of ``lmf_multi.reference`` in PyTorch; what is said here is only what differs.

The class axis stays where it is, so no layout is copied. The gradient's closed form is computed
together with the value, so that the backward pass is one product.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from lmf_multi.spec import (
    Reduction,
    check_inputs,
    check_label_range,
    check_parameters,
    check_reduction,
)


def lmf_loss(
    input: Tensor,
    target: Tensor,
    margins: Any,
    class_weight: Any = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Large-margin and focal losses, mixed, as :func:`lmf_multi.reference.lmf_loss` defines them.

    Args:
        input: float (N, C), (N, C, d1, …) or (C,), logits, nats; half types compute in float32.
        target: integer (N,), (N, d1, …) or (), each in [0, C) or ``ignore_index``; or float of the
            input's shape, a distribution over the classes.
        margins: float (C,), logit units, before scaling.
        class_weight: float (C,), at least 0, or None for ones.
        alpha: share of the LDAM term; 0 leaves it out.
        beta: share of the focal term; 0 leaves it out.
        gamma: focusing exponent, at least 0.
        scale: factor on the logits inside the LDAM term, positive.
        label_smoothing: ε, in [0, 1].
        ignore_index: examples with this integer label take no part, whatever their logits.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batch_mean"``, see the reference.

    Returns:
        float32, or float64 for float64 input: one value for each example for ``"none"``, else a
        scalar. The gradient with respect to the input has the input's dtype.

    Raises:
        ValueError: shapes disagree, a parameter breaks its rule, or a label of an eager CPU tensor
            is out of range; compiled, under ``vmap`` and on an accelerator such a label gives NaN.
        TypeError: a dtype of the wrong kind.

    >>> logits = torch.tensor([[2.0, 0.0], [0.5, 1.0]], requires_grad=True)
    >>> lmf_loss(logits, torch.tensor([0, 1]), margins=[0.1, 0.5])
    tensor(0.5775, grad_fn=<SumBackward0>)
    """
    return masked_loss(
        input,
        target,
        margins,
        class_weight,
        alpha,
        beta,
        gamma,
        scale,
        label_smoothing,
        ignore_index,
        reduction,
    )


def ldam_loss(
    input: Tensor,
    target: Tensor,
    margins: Any,
    class_weight: Any = None,
    *,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> ldam_loss(torch.tensor([[0.2, 0.0]]), torch.tensor([0]), [0.2, 0.5], scale=2.0)
    tensor(0.6931)
    """
    return masked_loss(
        input,
        target,
        margins,
        class_weight,
        1.0,
        0.0,
        0.0,
        scale,
        label_smoothing,
        ignore_index,
        reduction,
    )


def focal_loss(
    input: Tensor,
    target: Tensor,
    class_weight: Any = None,
    *,
    gamma: float = 1.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0)
    tensor(0.1733)
    """
    return masked_loss(
        input,
        target,
        None,
        class_weight,
        0.0,
        1.0,
        gamma,
        1.0,
        label_smoothing,
        ignore_index,
        reduction,
    )


def masked_loss(
    input: Tensor,
    target: Tensor,
    margins: Any,
    class_weight: Any,
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """``lmf_loss`` in the layout and with the mask of ``cross_entropy``."""
    check_reduction(reduction)
    loss = compute_loss(
        input,
        target,
        margins,
        class_weight,
        alpha,
        beta,
        gamma,
        scale,
        label_smoothing,
        axis=min(1, input.dim() - 1),
        where=None if target.is_floating_point() else target != ignore_index,
        mask_name=f"ignore_index={ignore_index}",
        reduction=reduction,
    )
    return loss if reduction == "none" else loss.sum()


def compute_loss(
    z: Tensor,
    y: Tensor,
    margins: Any,
    class_weight: Any,
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    label_smoothing: float,
    *,
    axis: int,
    where: Tensor | None,
    mask_name: str,
    reduction: Reduction,
) -> Tensor:
    """What each example contributes to the reduced loss; ``reduction`` is their sum."""
    check_parameters(
        alpha=alpha, beta=beta, gamma=gamma, scale=scale, label_smoothing=label_smoothing
    )
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    Δ = _vector("margins", margins, dtype, z.device)
    w = _vector("class_weight", class_weight, dtype, z.device)
    soft = check_inputs(
        (tuple(z.shape), z.dtype),
        (tuple(y.shape), y.dtype),
        axis,
        {
            "margins": None if Δ is None else tuple(Δ.shape),
            "class_weight": None if w is None else tuple(w.shape),
        },
        None if where is None else (tuple(where.shape), where.dtype),
    )

    axis = axis % z.dim()
    C, by_class = z.shape[axis], [-1] + [1] * (z.dim() - 1 - axis)
    if soft:
        presence = torch.ones_like(z.select(axis, 0), dtype=dtype)
        presence = presence if where is None else where.to(dtype)
        present = presence.unsqueeze(axis)
        q = torch.where(present == 0, 0.0, y.to(dtype))
        W = (q if w is None else q * w.view(by_class)).sum(axis)
    else:
        y, presence, masked = _targets(y, C, where, mask_name, dtype)
        W = presence if w is None else presence * _at(w, y)
    by_weight, by_examples = _normalisers(W, presence, reduction)

    if not soft and label_smoothing == 0:
        a = None if alpha == 0 else W * (alpha / by_weight)
        b = None if beta == 0 else W * (beta / by_examples)
        return _mixture(z, y, masked, None if Δ is None else _at(Δ, y), a, b, gamma, scale, axis)

    if not soft:
        present = presence.unsqueeze(axis)
        q = torch.zeros_like(z, dtype=dtype).scatter(axis, y.unsqueeze(axis), 1.0) * present
    q = (1 - label_smoothing) * q + label_smoothing / C * present
    share = q if w is None else q * w.view(by_class)
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    z, Δ = torch.where(present == 0, 0.0, z), None if Δ is None else Δ.view(by_class)
    return _mixture(z, None, None, Δ, a, b, gamma, scale, axis)


def _vector(name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A constant array over the classes, where and how the logits need it."""
    if values is None:
        return None
    if isinstance(values, Tensor) and values.requires_grad:
        raise ValueError(f"{name} must be constant, got a tensor that requires grad; detach it")
    if isinstance(values, np.ndarray):
        values = np.array(values)  # a spec's arrays are read-only, which PyTorch warns of
    return torch.as_tensor(values, dtype=dtype, device=device)


def _at(vector: Tensor, y: Tensor) -> Tensor:
    """``vector[y]``, which vmap cannot batch for a single label."""
    return vector.gather(0, y.reshape(-1)).view(y.shape)


def _targets(
    y: Tensor, C: int, where: Tensor | None, mask_name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Class indices; each example's presence, 1, 0 for a masked one, NaN out of range; the mask."""
    if _readable(y) and (where is None or bool(where.all())):
        where = None
    masked = None if where is None else ~where
    y = y.long() if masked is None else y.long().masked_fill(masked, 0)
    presence = torch.ones_like(y, dtype=dtype) if where is None else where.to(dtype)
    if not _readable(y):
        return y.clamp(0, C - 1), torch.where((y >= 0) & (y < C), presence, torch.nan), masked
    if y.numel():
        smallest, largest = torch.aminmax(y)
        check_label_range(int(smallest), int(largest), C, mask_name)
    return y, presence, masked


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return _is_plain(x) and x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is one of numbers, neither traced nor batched."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _normalisers(
    W: Tensor, presence: Tensor, reduction: Reduction
) -> tuple[Tensor | float, Tensor | float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    N = presence.sum().clamp(min=1)
    if reduction == "batch_mean":
        return N, N
    total = W.sum()
    return torch.where(total == 0, 1.0, total), N


def _mixture(
    z: Tensor,
    y: Tensor | None,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int,
) -> Tensor:
    """a LDAM_y + b Focal_y of each example, or with ``y=None`` the sum of it over the classes."""
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
        if y is None or not _readable(z) or z.numel() <= _PIECE:
            return _value_and_grad(*inputs)
        return _value_and_grad_in_pieces(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, γ, s, axis = inputs
        ctx.settings, ctx.axis = (γ, s, axis), axis
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        z, y, masked, Δ, a, b, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = _value_and_grad(z, y, masked, Δ, a, b, *ctx.settings)[1]
        return (upstream.unsqueeze(ctx.axis) * grad).to(z.dtype), *[None] * 8


class _ClosedFormForward(_ClosedForm):
    """With forward-mode derivatives, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        return (ctx.saved_tensors[-1] * tangent).sum(ctx.axis), None


def _value_and_grad(
    z: Tensor,
    y: Tensor | None,
    masked: Tensor | None,
    Δ: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    γ: float,
    s: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    z = z if z.dtype == torch.float64 else z.float()
    if y is None:
        return _all_classes(z, Δ, a, b, γ, s, axis)
    return _one_class(z, y, masked, Δ, a, b, γ, s, axis)


def _value_and_grad_in_pieces(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time: on a CPU their intermediates then stay in its cache."""
    arrays, (γ, s, axis) = arguments[:5], arguments[5:]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    loss, grad = torch.empty_like(arrays[0], dtype=dtype), torch.empty_like(z, dtype=dtype)
    for piece in _pieces(z.shape, axis):
        rows = piece[:axis] + piece[axis + 1 :]
        y, masked, Δ, a, b = (None if array is None else array[rows] for array in arrays)
        loss[rows], grad[piece] = _value_and_grad(z[piece], y, masked, Δ, a, b, γ, s, axis)
    return loss, grad


def _pieces(shape: torch.Size, axis: int) -> Iterator[tuple[slice, ...]]:
    """Slices over all axes but the class axis, of at most ``_PIECE`` elements where possible."""
    choices, elements = [[slice(None)] for _ in shape], shape[axis]
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
    z_y, others = z.gather(axis, y), z.scatter(axis, y, -torch.inf)
    a, b, Δ = (None if v is None else v.unsqueeze(axis) for v in (a, b, Δ))
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y = z_y.masked_fill(masked.unsqueeze(axis), 0.0)
        others.masked_fill_(masked.unsqueeze(axis), -torch.inf)
    M = others.detach().amax(axis, keepdim=True).clamp(min=-_LARGE)
    x = others.sub_(M)

    losses, slopes, exps, factors = [], [], [], []
    if a is not None and Δ is not None:
        e, S = _exp_and_sum(x * (s * _LOG2E), axis)
        ldam, slope = _ldam(_log_odds(z_y, M, S, s, Δ), s)
        losses.append(_times(a, ldam))
        slopes.append(a * slope)
        exps.append(e)
        factors.append(slopes[-1] / -S)
    if b is not None:
        e, S = _exp_and_sum(x.mul_(_LOG2E), axis)
        focal, slope = _focal(_log_odds(z_y, M, S), γ)
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
    # the sum is 1 or more unless no other class is possible
    return e, e.sum(axis, keepdim=True).clamp(min=1)


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
    x, x_others, M_j = z - M, others - M_others, torch.where(is_top, M_others, M)

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = torch.exp(s * x), torch.exp(s * x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        ldam, slope = _ldam(_log_odds(z, M_j, S, s, Δ), s)
        losses.append(_times(a, ldam))
        grads.append(_chain(a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = torch.exp(x), torch.exp(x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        focal, slope = _focal(_log_odds(z, M_j, S), γ)
        losses.append(_times(b, focal))
        grads.append(_chain(b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return torch.zeros_like(z).sum(axis), torch.zeros_like(z)
    return _sum(losses).sum(axis).to(z.dtype), _sum(grads).to(z.dtype)


def _sums_of_others(
    e: Tensor, e_others: Tensor, is_top: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """Σ_{k≠j} of the exponentials for every j, and the one of the largest class by itself."""
    S_others = e_others.sum(axis, keepdim=True).clamp(min=1)
    return torch.where(is_top, S_others, e.sum(axis, keepdim=True) - e), S_others


def _chain(G: Tensor, e: Tensor, S: Tensor, r_top: Tensor, is_top: Tensor, axis: int) -> Tensor:
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = torch.where(is_top, 0.0, G / S)
    G_top = torch.where(is_top, G, 0.0).sum(axis, keepdim=True)
    return G - e * (t.sum(axis, keepdim=True) - t) - r_top * G_top


def _log_odds(z: Tensor, M: Tensor, S: Tensor, s: float = 1.0, Δ: Tensor | float = 0.0) -> Tensor:
    """s (z - M - Δ) - log S, from here on in float64: s multiplies the rounding errors."""
    if z.device.type != "mps":  # which has no float64
        z, M = z.double(), M.double()
    return s * (z - M - Δ) - torch.log1p(S - 1)


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
