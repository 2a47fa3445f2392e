"""The sigmoid form in PyTorch, in the steps of ``lmf_multi.reference``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmf_multi.spec import (
    PROBABILITY_SLACK,
    Reduction,
    check_ignored,
    check_mask,
    check_probability_range,
    check_reduction,
    check_sigmoid_inputs,
)
from lmf_multi.torch._closed_form import as_long, loss_dtype, mixture, readable
from lmf_multi.torch._distributed import check_shards, loss_of_shards, whole
from lmf_multi.torch._functional import (
    check_given,
    checked,
    normalizers,
    plain_tensors,
    total,
    vector,
)


def sigmoid_lmf_loss(
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
    where: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The sigmoid form, as :func:`lmf_multi.reference.sigmoid_lmf_loss` defines it.

    Args:
        input: float, any shape, log-odds of the positive, nats.
        target: the input's shape: 0 and 1, bool, or float, the probability of the positive.
        margins: float (2,), or (L, 2) for the L labels along axis 1 (axis 0 of 1-D input): of the
            negative and of the positive.
        class_weight: float (2,) or (L, 2), at least 0, or None for ones.
        where: bool, the input's shape; False leaves an element out.
        ignore_index: elements with this target take no part either.

    The other arguments, results and errors as :func:`lmf_loss`; "none" gives the input's shape.

    >>> logits, labels = torch.tensor([-2.0, 0.5]), torch.tensor([0, 1])
    >>> sigmoid_lmf_loss(logits, labels, margins=[0.1, 0.5])
    tensor(0.5775)
    """
    check_given(margins=margins, class_weight=class_weight)
    return masked_sigmoid_loss(
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
        where=where,
    )


def masked_sigmoid_loss(
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
    totals: tuple[Tensor, Tensor] | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """``sigmoid_lmf_loss`` with both its masks."""
    input, target = plain_tensors(input=input, target=target)
    check_reduction(reduction)
    axis, numbers = min(1, max(input.dim() - 1, 0)), (alpha, beta, gamma, scale, label_smoothing)
    if check_shards(input, target=target, where=where):
        check = _check_inputs_of_axis_1
        Δ, w, _ = checked(check, input, target, margins, class_weight, axis, where, numbers)
        by_label = any(v is not None and v.dim() == 2 for v in (Δ, w))
        return loss_of_shards(
            lambda x, t, where, totals: masked_sigmoid_loss(
                x, t, Δ, w, *numbers, ignore_index, reduction, totals, where
            ),
            lambda t, where: total_sigmoid_weight_and_examples(t, w, ignore_index, where),
            input,
            (target, where),
            axis if by_label else None,
            reduction,
            totals,
        )
    loss = compute_sigmoid_loss(
        input,
        target,
        margins,
        class_weight,
        *numbers,
        axis=axis,
        where=_annotated(target, ignore_index, where),
        mask_name=f"where or ignore_index={ignore_index}",
        reduction=reduction,
        totals=totals,
        check=_check_inputs_of_axis_1,
    )
    return loss if reduction == "none" else total(loss)


_check_inputs_of_axis_1 = partial(check_sigmoid_inputs, axis_is_given=False)


def total_sigmoid_weight_and_examples(
    target: Tensor, class_weight: Any, ignore_index: int, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for the sigmoid form."""
    (target,) = plain_tensors(target=target)
    target, where = whole(target), whole(where)
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # MPS has no float64
    w = vector("class_weight", class_weight, dtype, target.device)
    w = None if w is None else _by_label(w, target.dim(), min(1, max(target.dim() - 1, 0)))
    where = _annotated(target, ignore_index, where)
    t, presence = _targets(target, where, f"where or ignore_index={ignore_index}", dtype)
    return _weights(t, presence, w), presence


def _annotated(target: Tensor, ignore_index: int, where: Tensor | None) -> Tensor | None:
    """The elements that neither mask leaves out."""
    ignore_index = check_ignored("ignore_index", ignore_index)
    if where is not None:
        (where,) = plain_tensors(where=where)
        check_mask((tuple(where.shape), where.dtype), tuple(target.shape), "the labels' shape")
    if target.dtype == torch.bool:
        return where
    valid = (target if target.is_floating_point() else as_long(target)) != ignore_index
    return valid if where is None else valid & where


def compute_sigmoid_loss(
    x: Tensor,
    t: Tensor,
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
    totals: tuple[Tensor, Tensor] | None = None,
    check: Callable[..., bool] = check_sigmoid_inputs,
) -> Tensor:
    """What each element contributes to the reduced loss, as ``compute_loss``."""
    x, t = plain_tensors(logits=x, labels=t)
    numbers = (alpha, beta, gamma, scale, label_smoothing)
    Δ, w, soft = checked(check, x, t, margins, class_weight, axis, where, numbers)

    Δ, w = (None if v is None else _by_label(v, x.dim(), axis) for v in (Δ, w))
    t, presence = _targets(t, where, mask_name, loss_dtype(x))
    W = _weights(t, presence, w)
    by_weight, by_examples = normalizers(W, presence, reduction, totals)
    x = x if where is None else torch.where(where, x, 0.0)

    if not soft and label_smoothing == 0:
        positive = t == 1
        a = None if alpha == 0 else W * (alpha / by_weight)
        b = None if beta == 0 else W * (beta / by_examples)
        Δ = None if Δ is None else torch.where(positive, Δ[1], Δ[0])
        return mixture(x, positive, None, Δ, a, b, gamma, scale, None)

    q = torch.stack([1 - t, t])
    q = ((1 - label_smoothing) * q + label_smoothing / 2) * presence
    share = q if w is None else q * w
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    return mixture(x, None, None, Δ, a, b, gamma, scale, None)


def _by_label(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.dim() == 1:
        return vector.view(2, *[1] * ndim)
    return vector.T.reshape(2, *[-1 if i == axis % ndim else 1 for i in range(ndim)])


def _targets(
    t: Tensor, where: Tensor | None, mask_name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Probabilities; each element's presence, 1, 0 for a masked one, NaN out of range."""
    t = t.to(dtype) if where is None else torch.where(where, t.to(dtype), 0.0)
    presence = torch.ones_like(t, requires_grad=False) if where is None else where.to(dtype)
    if not readable(t):
        inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
        return t, torch.where(inside, presence, torch.nan)
    if t.numel():
        smallest, largest = torch.aminmax(t.detach())
        check_probability_range(float(smallest), float(largest), mask_name)
    return t, presence


def _weights(t: Tensor, presence: Tensor, w: Tensor | None) -> Tensor:
    """Each element's class weight; exactly that of its class where t is 0 or 1."""
    return presence if w is None else presence * ((1 - t) * w[0] + t * w[1])
