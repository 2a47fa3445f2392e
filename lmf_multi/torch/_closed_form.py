"""The terms in PyTorch, with the gradient's closed form computed together with the value.

The backward pass is then one product. Under autograd the same steps are differentiable themselves,
which is what second derivatives use.
"""

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return is_plain(x) and x.device.type == "cpu"


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is one of numbers, neither traced nor batched."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
        # make_fx, torch.func.linearize and torch.jit.trace record the operations that they see
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0  # or it, or what it is combined with, may have a tangent
    )


def loss_dtype(z: Tensor) -> torch.dtype:
    """Half types are computed in float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def as_long(y: Tensor) -> Tensor:
    """Labels that can be compared: uint8's 156 with -100 would be equal.

    What is beyond int64 becomes its largest number, which is no label, instead of a negative one.
    """
    signed = y.long()
    if y.dtype != torch.uint64:
        return signed
    return signed.masked_fill(signed < 0, torch.iinfo(torch.int64).max)


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
    arguments = z, y, masked, Δ, a, b, γ, s, axis
    if torch.is_grad_enabled() and any(c is not None and c.requires_grad for c in (a, b)):
        # a distribution that is learned too: leave both gradients to autograd
        return _value_and_grad(*arguments)[0]
    if is_plain(z):
        loss: Tensor = _Eager.apply(*arguments, torch.is_grad_enabled() and z.requires_grad)
    elif (nodes := _quadrature()) is not None:
        loss = _expanded(*arguments, nodes=nodes)
    elif torch.compiler.is_compiling() and not torch.is_grad_enabled():
        loss, _ = _value_and_grad(*arguments)  # the compiler leaves the gradient out
    elif torch.compiler.is_compiling():
        loss, _ = _ClosedForm.apply(*arguments)
    else:
        loss, _ = _ClosedFormForward.apply(*arguments)
    return loss


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call it while it traces, and take what it returns for constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo, which takes seconds
    and imports Triton, which aborts the process where TensorFlow was imported first.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@at_trace_time
def _quadrature() -> tuple[tuple[float, float], ...] | None:
    """Nodes and weights for ``_expanded``, or None where an ``autograd.Function`` serves.

    Under ``torch.func`` PyTorch can neither compile one that is batched or differentiated twice,
    nor differentiate its forward mode.
    """
    transforms = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    levels = [each for each in transforms if each in (TransformType.Grad, TransformType.Jvp)]
    if not transforms:
        return None
    if torch.compiler.is_compiling():
        order = len(levels) + 1  # autograd comes after them, once
    elif TransformType.Jvp in levels[1:]:
        order = len(levels) + 2
    else:
        return None
    if order == 1:
        return ()
    nodes, weights = np.polynomial.legendre.leggauss((order + 1) // 2)
    return tuple(
        ((t + 1) / 2, c / 2) for t, c in zip(nodes.tolist(), weights.tolist(), strict=True)
    )


def _expanded(z: Tensor, *others: Any, nodes: tuple[tuple[float, float], ...]) -> Tensor:
    """The loss, with the closed form for its derivative, in operations alone.

    That is L(z₀) + ∫₀¹ ∇L(z₀ + t δ)·δ dt, where δ = z - z₀ = 0. Its value is exact; its derivatives
    are up to the order for which the nodes were chosen, of which the first needs none.
    """
    axis, z_0 = others[-1], z.detach()
    loss, grad = _value_and_grad(z_0, *others)
    δ = torch.where(z_0 == -torch.inf, 0.0, z - z_0)  # an impossible class stays one
    if nodes:
        grad = sum_of([c * _value_and_grad(z_0 + t * δ, *others)[1] for t, c in nodes])
    change = grad * δ
    loss = loss + (change if axis is None else change.sum(axis))
    return loss


class _ClosedForm(torch.autograd.Function):
    """The value, with the gradient kept for the backward pass; differentiable again and again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _value_and_grad(*inputs)

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
        *tensors, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = _value_and_grad(*tensors, *ctx.settings)[1]
        upstream = upstream if ctx.axis is None else upstream.unsqueeze(ctx.axis)
        return (upstream * grad).to(tensors[0].dtype), *[None] * 8


class _ClosedFormForward(_ClosedForm):
    """With forward-mode derivatives, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        return _change(ctx.saved_tensors[:6], ctx.settings, tangents), None


def _change(tensors: Any, settings: tuple[Any, ...], tangents: Any) -> Tensor:
    """The loss's derivative along tangents of logits and coefficients, differentiable again."""
    (z, y, masked, Δ, a, b), axis = tensors, settings[-1]
    dz, *_, da, db = tangents[:6]
    changes = []
    if dz is not None:
        change = _value_and_grad(*tensors, *settings)[1] * dz
        changes.append(change if axis is None else change.sum(axis))
    if da is not None or db is not None:  # the loss is linear in them
        da, db = (
            torch.zeros_like(c) if d is None and c is not None else d for c, d in ((a, da), (b, db))
        )
        changes.append(_value_and_grad(z, y, masked, Δ, da, db, *settings)[0])
    total: Tensor = sum_of(changes)
    return total


class _Eager(torch.autograd.Function):
    """The same for tensors of numbers, without what tracing needs and without further copies."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, γ, s, axis, with_grad = inputs
        ctx.settings, ctx.axis = (γ, s, axis), axis
        z, y, masked, Δ, a, b = tensors
        grad: Tensor | None
        if axis is not None and y is not None and z.device.type == "cpu":
            loss, grad = one_class_eager(z, y, masked, Δ, a, b, γ, s, axis, with_grad)
        else:
            loss, grad = _value_and_grad(z, y, masked, Δ, a, b, γ, s, axis)
        keep(ctx, z, grad, *tensors[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, *others = ctx.saved_tensors[:6]
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = _value_and_grad(logits_of(ctx), *others, *ctx.settings)[1]
        return chained(ctx, upstream, grad), *[None] * 9


def keep(ctx: Any, z: Tensor, *read: Tensor | None) -> None:
    """Save what the backward pass reads, and the logits, which second derivatives alone read.

    The logits may be changed in place before the backward pass, as they may be with
    ``cross_entropy``. ``save_for_backward`` would refuse, for it returns all or nothing; only where
    hooks take what it saves (of checkpointing, say) it gets the logits too, and compares nothing.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    is_hooked = hooks is None or hooks(False) is not None
    ctx.logits, ctx.dtype = None if is_hooked else z, z.dtype
    ctx.version = z._version if z.requires_grad else 0
    ctx.save_for_backward(*read, *([z] if is_hooked else []))


def logits_of(ctx: Any) -> Tensor:
    """The logits that were kept, if they are as they were."""
    if ctx.logits is None:
        z: Tensor = ctx.saved_tensors[-1]
        return z
    z = ctx.logits
    if z._version != ctx.version:
        raise RuntimeError(
            "the logits must be as they were where the gradient is differentiated too, "
            f"got them changed in place {z._version - ctx.version} times; change a clone"
        )
    return z


def chained(ctx: Any, upstream: Tensor, grad: Tensor) -> Tensor:
    """Their product, in place where nobody will ask for the gradient again."""
    is_kept = torch.is_grad_enabled() or _graph_is_kept()
    if not is_kept:
        ctx.logits = None  # as autograd frees what it saved
    if is_kept or not is_plain(upstream):
        by_row = ctx.axis is not None and upstream.dim() > 0
        grad = (upstream.unsqueeze(ctx.axis) if by_row else upstream) * grad
    elif not _is_one(upstream):
        by_row = ctx.axis is not None and upstream.dim() > 0
        grad.mul_(upstream.unsqueeze(ctx.axis) if by_row else upstream)
    return grad.to(ctx.dtype)


def _is_one(upstream: Tensor) -> bool:
    """Whether it is a single number, repeated, and 1; a CPU can tell without waiting."""
    single = readable(upstream) and upstream.numel() > 0 and not any(upstream.stride())
    return single and upstream[(0,) * upstream.dim()].item() == 1


def _graph_is_kept() -> bool:
    """Whether a second backward pass may need what this one saved."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return is_kept is None or is_kept()


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
    if axis is None:
        return _sigmoid(z, y, Δ, a, b, γ, s)
    if y is None:
        return _all_classes(z, Δ, a, b, γ, s, axis)
    return one_class(z, y, masked, Δ, a, b, γ, s, axis)


def one_class(
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
    z = z.to(loss_dtype(z))
    is_y = _is_class(y, z, axis)
    a, b, Δ = (None if v is None else v.unsqueeze(axis) for v in (a, b, Δ))
    z_y, ruled_out = z.gather(axis, y.unsqueeze(axis)), is_y
    if masked is not None:
        # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
        z_y = torch.where(masked.unsqueeze(axis), 0.0, z_y)
        ruled_out = is_y | masked.unsqueeze(axis)
    others = torch.where(ruled_out, -torch.inf, z)  # masked_fill would change the layout
    M = others.detach().amax(axis, keepdim=True).clamp(min=-LARGE)
    d, x = _widened(z_y) - _widened(M), others - M

    losses, slopes, grads = [], [], []
    if a is not None and Δ is not None:
        e, S = _exp_and_sum(s * x, axis)
        value, slope = ldam(torch.log(S) - s * (d - Δ), s, z.dtype)
        losses.append(_times(a, value))
        slopes.append(a * slope)
        grads.append(e * (a * slope / -S))
    if b is not None:
        e, S = _exp_and_sum(x, axis)
        value, slope = focal(torch.log(S) - d, γ, z.dtype)
        losses.append(_times(b, value))
        slopes.append(b * slope)
        grads.append(e * (b * slope / -S))
    if not losses:
        return torch.zeros_like(z_y).squeeze(axis), torch.zeros_like(z)
    return sum_of(losses).squeeze(axis), torch.where(is_y, sum_of(slopes), sum_of(grads))


def _is_class(y: Tensor, z: Tensor, axis: int) -> Tensor:
    """Boolean one-hot of the class indices, in the layout of the logits."""
    classes = torch.arange(z.shape[axis], device=y.device).view([-1] + [1] * (y.dim() - axis))
    # the first operand decides the layout, and with it that of what is selected
    return torch.zeros_like(z, dtype=torch.bool) | (y.unsqueeze(axis) == classes)


def _exp_and_sum(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """e^x, and its sum along the axis.

    Results near the smallest normal number, and products with them, are many times slower on CPUs;
    e^-48 is far below any epsilon.
    """
    e = torch.exp2((x * LOG2E).clamp(min=-70))
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
    z = z.to(loss_dtype(z))
    top = z.detach().argmax(axis, keepdim=True)
    is_top = torch.zeros_like(z, dtype=torch.bool).scatter(axis, top, True)
    others = torch.where(is_top, -torch.inf, z)
    M = z.detach().amax(axis, keepdim=True)
    M_others = others.detach().amax(axis, keepdim=True).clamp(min=-LARGE)
    x, x_others = z - M, others - M_others
    d = _widened(z) - _widened(torch.where(is_top, M_others, M))

    losses, grads = [], []
    if a is not None and Δ is not None:
        e, e_others = torch.exp(s * x), torch.exp(s * x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        value, slope = ldam(torch.log(S) - s * (d - Δ), s, z.dtype)
        losses.append(_times(a, value))
        grads.append(_chain(a * slope, e, S, e_others / S_others, is_top, axis))
    if b is not None:
        e, e_others = torch.exp(x), torch.exp(x_others)
        S, S_others = _sums_of_others(e, e_others, is_top, axis)
        value, slope = focal(torch.log(S) - d, γ, z.dtype)
        losses.append(_times(b, value))
        grads.append(_chain(b * slope, e, S, e_others / S_others, is_top, axis))
    if not losses:
        return torch.zeros_like(z).sum(axis), torch.zeros_like(z)
    return sum_of(losses).sum(axis), sum_of(grads)


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
    x = x.to(loss_dtype(x))
    if positive is None:
        sign = torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device).view(2, *[1] * x.dim())
    else:
        sign = 2 * positive.to(x.dtype) - 1
    ω = _widened(sign * x)

    losses, slopes = [], []
    if a is not None and Δ is not None:
        value, slope = ldam(-s * (ω - Δ), s, x.dtype)
        losses.append(_times(a, value))
        slopes.append(a * slope)
    if b is not None:
        value, slope = focal(-ω, γ, x.dtype)
        losses.append(_times(b, value))
        slopes.append(b * slope)
    if not losses:
        return torch.zeros_like(x), torch.zeros_like(x)
    loss, grad = sum_of(losses), sign * sum_of(slopes)
    if positive is None:
        loss, grad = loss.sum(0), grad.sum(0)
    return loss, grad


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


def _widened(x: Tensor) -> Tensor:
    """In float64, because the scale multiplies float32's rounding errors."""
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


# --- the terms, for tensors and NumPy arrays


def ldam(n: Any, s: float, dtype: Any) -> tuple[Any, Any]:
    """softplus(n) and its slope for the log-odds, with n = s Δ - ω(s z)."""
    loss, p_others, _ = _logistic(n, dtype)
    return loss, -s * p_others


def focal(n: Any, γ: float, dtype: Any) -> tuple[Any, Any]:
    """sigmoid(n)^γ softplus(n) and its slope for the log-odds, with n = -ω(z).

    The power in log space has no bad point; its logarithm is that of sigmoid(n) itself, as γ would
    multiply the rounding of n - softplus(n).
    """
    nx, (ce, p_others, p) = namespace(n), _logistic(n, dtype)
    log = nx.log(at_least(p_others, nx.finfo(dtype).tiny))
    modulation = nx.exp2(log * (γ * LOG2E))
    return modulation * ce, -modulation * (γ * p * at_most(ce, LARGE) + p_others)


def _logistic(n: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """softplus(n), sigmoid(n) and sigmoid(-n), from one exponential."""
    nx = namespace(n)
    e = nx.exp2(cast(at_most(n * LOG2E, 120), dtype))
    p = nx.reciprocal(1 + e)
    return nx.maximum(nx.log1p(e), cast(n, dtype)), e * p, p


def namespace(x: Any) -> Any:
    """The functions for an array: ``torch`` or ``numpy``."""
    return torch if isinstance(x, Tensor) else np


def cast(x: Any, dtype: Any) -> Any:
    """An array in another dtype."""
    return x.to(dtype) if isinstance(x, Tensor) else x.astype(dtype)


def at_most(x: Any, bound: float) -> Any:
    """The smaller of each number and the bound."""
    return x.clamp(max=bound) if isinstance(x, Tensor) else np.minimum(x, bound)


def at_least(x: Any, bound: float) -> Any:
    """The larger of each number and the bound."""
    return x.clamp(min=bound) if isinstance(x, Tensor) else np.maximum(x, bound)


LOG2E = math.log2(math.e)
# Beyond every log-odds that matters, and small enough for products with it to stay finite.
LARGE = 1e18


def _times(coefficient: Tensor, term: Tensor) -> Tensor:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    nothing = (coefficient == 0) & (term == torch.inf)
    return torch.where(nothing, 0.0, coefficient * term)


def sum_of(terms: list[Any]) -> Any:
    """The sum of at least one."""
    return reduce(add, terms)


from lmf_multi.torch._eager import one_class_eager  # noqa: E402  # it uses what is above
