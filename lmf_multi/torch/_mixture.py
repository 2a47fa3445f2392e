"""The loss by operations, and how PyTorch is told its derivatives.

The gradient's closed form is computed together with the value, so that the backward pass is one
product. Second derivatives are those of the closed form, which is recorded then.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi._terms import Labels, Terms
from lmf_multi.torch._closed_form import sum_of, value_and_grad
from lmf_multi.torch._preparation import Batch, gradient, is_learned, prepare
from lmf_multi.torch._tensors import at_trace_time, is_plain, readable

try:  # PyTorch's own names, which an upgrade may move: without them nests are not told apart
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    CAN_TELL_NESTS = True
except ImportError:
    CAN_TELL_NESTS = False


def by_operations(z: Tensor, batch: Batch) -> Tensor:
    """What each example contributes to the reduced loss (N,)."""
    if is_plain(z) and not is_learned(batch):
        known = value_and_grad(*prepare(z.detach(), batch), batch.axis)
        loss: Tensor = Known.apply(z, known, batch)
        return loss
    return mixture(*prepare(z, batch), batch.axis)


def mixture(z: Tensor, labels: Labels, terms: Terms, axis: int | None) -> Tensor:
    """Σ_j q_j w_j (a LDAM_j + b Focal_j) of each example (N,), where traced or transformed."""
    learned = (x for x in (labels.q, terms.a, terms.b) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
        # a distribution that is learned too: leave all gradients to autograd
        return value_and_grad(z, labels, terms, axis)[0]
    if (nodes := _quadrature()) is not None:
        return _expanded(z, labels, terms, axis, nodes)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return value_and_grad(z, labels, terms, axis)[0]  # the compiler leaves the gradient out
    function = _ClosedForm if torch.compiler.is_compiling() else _ClosedFormForward
    loss: Tensor = function.apply(z, *labels, *terms, axis)[0]
    return loss


# --- where a gradient is known already: tensors of numbers, by operations or by a kernel


class Known(torch.autograd.Function):
    """A loss and its gradient, computed already."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        known: tuple[Tensor, Tensor | None],  # no input, which the caller could not change in place
        batch: Batch,
    ) -> Tensor:
        loss, grad = known
        keep(ctx, z, batch, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            z, batch = kept(ctx)
            grad = along_classes(upstream, batch.axis) * gradient(z, batch)
            return grad.to(z.dtype), None, None
        return chained(ctx, upstream, ctx.saved_tensors[0]), None, None


def keep(ctx: Any, z: Tensor, batch: Batch, *read: Tensor | None) -> None:
    """Save what the backward pass reads, and what second derivatives alone read.

    The logits may be changed in place before the backward pass, as they may be with
    ``cross_entropy``. ``save_for_backward`` would refuse, for it returns all or nothing; only where
    hooks take what it saves (of checkpointing, say) it gets the logits too, and compares nothing.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    is_hooked = hooks is None or hooks(False) is not None
    ctx.logits, ctx.batch, ctx.dtype = None if is_hooked else z, batch, z.dtype
    ctx.versions = _versions(z, batch)
    ctx.save_for_backward(*read, *([z] if is_hooked else []))


def kept(ctx: Any) -> tuple[Tensor, Batch]:
    """The logits and their batch, if they are as they were."""
    z, batch = ctx.saved_tensors[-1] if ctx.logits is None else ctx.logits, ctx.batch
    now = _versions(ctx.logits, batch)  # of hooks' own logits nothing is known
    for name, before, after in zip(("logits", "labels", "masks"), ctx.versions, now, strict=True):
        if None not in (before, after) and after != before:
            raise RuntimeError(
                f"the {name} must be as they were where the gradient is differentiated too, "
                f"got them changed in place {after - before} times; change a clone"
            )
    return z, batch


def _versions(z: Tensor | None, batch: Batch) -> list[Any]:
    """How often logits, labels and mask were changed in place, as far as PyTorch counts that."""
    tensors = (z, batch.y, batch.options.where)
    return [None if x is None or x.is_inference() else x._version for x in tensors]


def chained(ctx: Any, upstream: Tensor, grad: Tensor) -> Tensor:
    """Upstream times gradient (N, C), in place where nobody will ask for the gradient again."""
    axis, is_kept = ctx.batch.axis, _graph_is_kept()
    if not is_kept:
        ctx.logits = ctx.batch = None  # as autograd frees what it saved
    if is_kept or not is_plain(upstream):
        grad = along_classes(upstream, axis) * grad
    elif not _is_one(upstream):
        grad.mul_(along_classes(upstream, axis))
    if grad.dtype == ctx.dtype:
        return grad
    return grad.to(ctx.dtype) if is_kept else _rounded(grad, ctx.dtype)


def _rounded(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``grad.to(dtype)``, for a half type in the gradient's own memory, of which it takes half.

    Numbers from n to 2 n go where those up to n have been read, so that no block is overwritten.
    """
    if dtype.itemsize >= grad.itemsize or not readable(grad):
        return grad.to(dtype)
    n, storage = grad.numel(), grad.untyped_storage()
    if storage.nbytes() != n * grad.itemsize:
        return grad.to(dtype)
    each, end = grad.as_strided((n,), (1,)), min(n, 2**12)
    halves = each.view(dtype)
    halves[:end] = each[:end].clone()
    while end < n:
        begin, end = end, min(2 * end, n)
        halves[begin:end] = each[begin:end]
    like = torch.empty(0, dtype=dtype, device=grad.device)
    return like.set_(storage, 0, grad.shape, grad.stride())


def along_classes(upstream: Tensor, axis: int | None) -> Tensor:
    """An upstream gradient, () or (N,), as it broadcasts against the logits."""
    return upstream if axis is None or upstream.dim() == 0 else upstream.unsqueeze(axis)


def _is_one(upstream: Tensor) -> bool:
    """Whether numbers are a single one, repeated, and 1; a CPU can tell without waiting."""
    if not upstream.is_cpu or upstream.numel() == 0 or any(upstream.stride()):
        return False
    return upstream[(0,) * upstream.dim()].item() == 1 if upstream.dim() else upstream.item() == 1


def _graph_is_kept() -> bool:
    """Whether a second backward pass may need what this one saved."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return is_kept is None or is_kept()


# --- where operations are recorded: compiled code, and the transforms of torch.func


class _ClosedForm(torch.autograd.Function):
    """The value, with the gradient kept for the backward pass; differentiable again and again.

    Its inputs are logits, the fields of labels and of terms, and the axis.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return value_and_grad(*_fields(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or the backward pass gets zeros of the logits' size
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.others)
        *tensors, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: let autograd see it
            grad = value_and_grad(*_fields(_restored(ctx, tensors)))[1]
        grad = along_classes(upstream, ctx.others[-1]) * grad
        return grad.to(tensors[0].dtype), *[None] * (len(ctx.others) - 1)


class _ClosedFormForward(_ClosedForm):
    """With forward-mode derivatives, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        return _change(_restored(ctx, ctx.saved_tensors[:-1]), tangents), None


def _fields(inputs: Any) -> tuple[Tensor, Labels, Terms, int | None]:
    """The flat inputs of a function, by what they are."""
    z, *others, axis = inputs
    labels, terms = others[: len(Labels._fields)], others[len(Labels._fields) :]
    return z, Labels(*labels), Terms(*terms), axis


def _restored(ctx: Any, tensors: Any) -> list[Any]:
    """The flat inputs, from what was saved of them."""
    return [x if t is None else t for t, x in zip(tensors, ctx.others, strict=True)]


def _change(inputs: list[Any], tangents: Any) -> Tensor:
    """The loss's derivative (N,) along the inputs' tangents, differentiable again."""
    z, labels, terms, axis = _fields(inputs)
    dz, dlabels, dterms, _ = _fields(tangents)
    changes = []
    if dz is not None:
        change = value_and_grad(z, labels, terms, axis)[1] * dz
        changes.append(change if axis is None else change.sum(axis))
    if dlabels.q is not None:  # in which the loss is linear
        changes.append(value_and_grad(z, Labels(q=dlabels.q), terms, axis)[0])
    if dterms.a is not None or dterms.b is not None:  # and in these
        along = terms._replace(a=dterms.a, b=dterms.b)
        changes.append(value_and_grad(z, labels, along, axis)[0])
    result: Tensor = sum_of(changes)
    return result


@at_trace_time
def _quadrature() -> tuple[Any, ...] | None:
    """Nodes and weights for ``_expanded``, or None where an ``autograd.Function`` serves.

    Under ``torch.func`` PyTorch can neither compile one that is batched or differentiated twice,
    nor differentiate its forward mode.
    """
    if not CAN_TELL_NESTS:
        return None
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


def _expanded(
    z: Tensor,
    labels: Labels,
    terms: Terms,
    axis: int | None,
    nodes: tuple[tuple[float, float], ...],
) -> Tensor:
    """The loss (N,), with the closed form for its derivative, in operations alone.

    That is L(z₀) + ∫₀¹ ∇L(z₀ + t δ)·δ dt, where δ = z - z₀ = 0. Its value is exact; its derivatives
    are up to the order for which the nodes were chosen, of which the first needs none.
    """
    z_0 = z.detach()
    loss, grad = value_and_grad(z_0, labels, terms, axis)
    δ = torch.where(z_0 == -torch.inf, 0.0, z - z_0)  # an impossible class stays one
    if nodes:
        each = [c * value_and_grad(z_0 + t * δ, labels, terms, axis)[1] for t, c in nodes]
        grad = sum_of(each)
    change = grad * δ
    return loss + (change if axis is None else change.sum(axis))
