"""From a checked batch to what the arithmetic takes: labels, masks, what the terms count for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmf_multi._terms import Labels, Numbers, Options, Terms
from lmf_multi.spec import PROBABILITY_SLACK, check_label_range, check_probability_range
from lmf_multi.torch._closed_form import by_class, is_class, value_and_grad, weights, wide_dtype
from lmf_multi.torch._tensors import as_long, bounds, readable, total


class Batch(NamedTuple):
    """All of a loss but its logits, checked.

    y: labels as they were given, (N,) classes or (N, C) distributions; (N,) in the sigmoid form.
    is_soft: whether they are distributions, or probabilities.
    axis: the class axis, which the sigmoid form has not.
    look: whether labels may be looked at; those out of range give NaN otherwise.
    """

    y: Tensor
    Δ: Tensor | None
    w: Tensor | None
    o: Tensor | None
    numbers: Numbers
    options: Options
    is_soft: bool
    axis: int | None
    is_sigmoid: bool = False
    look: bool = True


def is_learned(batch: Batch) -> bool:
    """Whether gradients are wanted for more than the logits, which autograd must see to."""
    others = (batch.y, *(batch.options.totals or ()))
    return torch.is_grad_enabled() and any(x.requires_grad for x in others)


def gradient(z: Tensor, batch: Batch) -> Tensor:
    """Of the examples' contributions, added (N, C), in operations that can be differentiated."""
    return value_and_grad(*prepare(z, batch), batch.axis)[1]


def prepare(z: Tensor, batch: Batch) -> tuple[Tensor, Labels, Terms]:
    """Logits, labels and terms, as the arithmetic takes them."""
    (_, Δ, w, o, (α, β, γ, s, ε), options, *_), axis = batch, batch.axis
    C, dtype = 2 if axis is None else z.shape[axis], wide_dtype(z.dtype)
    Δ, w, o = (None if v is None else v.to(dtype) for v in (Δ, w, o))
    labels, W, presence = read(Batch(batch.y, Δ, w, o, *batch[4:]), C, dtype)
    if axis is None:
        Δ, w = (None if v is None else by_label(v, z.dim(), options.axis) for v in (Δ, w))
        o = None if o is None else along(o, z.dim(), options.axis)
    by_weight, by_examples = normalizers(W, presence, options)
    a, b = α / by_weight if α else None, β / by_examples if β else None
    terms = Terms(Δ=Δ, w=w, a=a, b=b, γ=γ, s=s, o=o, ε=ε if axis is None else 0.0)
    if labels.q is None and ε == 0:
        return z, labels, terms

    present, q = presence.unsqueeze(axis or 0), labels.q
    if q is None:
        y = labels.y
        is_y = torch.stack([y != 1, y == 1]) if axis is None else is_class(y, z, axis)
        q = torch.where(is_y, present, 0.0)
    if axis is not None:
        q = (1 - ε) * q + ε / C * present
    return torch.where((presence if axis is None else present) == 0, 0.0, z), Labels(q=q), terms


def read(batch: Batch, C: int, dtype: torch.dtype) -> tuple[Labels, Tensor, Tensor]:
    """Labels before smoothing; what means sum up: class weights W (N,) and presence (N,).

    Presence is 1, 0 for a masked example, and NaN for a label out of range.
    """
    y, w, axis = batch.y, batch.w, batch.options.axis
    if batch.is_sigmoid:
        labels, presence = sigmoid_targets(y, batch, dtype)
        w, axis = None if w is None else by_label(w, y.dim(), axis), 0
    elif batch.is_soft:
        labels, presence = soft_targets(y, batch.options, dtype)
        w = None if w is None else by_class(w, y.dim(), axis)
    else:
        labels = targets(y, C, batch)
        presence = weights(labels, None, dtype)
    if labels.q is not None and (w is not None or not batch.is_sigmoid):
        # without weights too, as rounded distributions need not sum to 1
        W = (labels.q if w is None else labels.q * w).sum(axis)
    else:
        W = presence if w is None else weights(labels, w, dtype)
    return labels, W, presence


def soft_targets(y: Tensor, options: Options, dtype: torch.dtype) -> tuple[Labels, Tensor]:
    """Distributions q (N, C), 0 for masked examples, and each example's presence (N,)."""
    presence = torch.ones_like(y.select(options.axis, 0), dtype=dtype, requires_grad=False)
    presence = presence if options.where is None else options.where.to(dtype)
    q = torch.where(presence.unsqueeze(options.axis) == 0, 0.0, y.to(dtype))
    return Labels(q=q), presence


def targets(y: Tensor, C: int, batch: Batch) -> Labels:
    """Class indices (N,), 0 for a masked example, -1 for one out of range; and the mask."""
    where, ignored, name = batch.options.where, batch.options.ignore_index, batch.options.mask_name
    look = batch.look and readable(y) and y.numel() > 0
    if look and where is None:
        smallest, largest = bounds(y)
        if ignored is None or not smallest <= ignored <= largest:
            check_label_range(smallest, largest, C, name)
            return Labels(y.long())
    y = as_long(y)
    if ignored is not None:
        where = y != ignored if where is None else where & (y != ignored)
    masked = None if where is None else ~where
    y = y if masked is None else y.masked_fill(masked, 0)
    if look:
        check_label_range(*bounds(y), C, name)
        return Labels(y, masked)
    return Labels(torch.where((y >= 0) & (y < C), y, -1), masked)


def sigmoid_targets(t: Tensor, batch: Batch, dtype: torch.dtype) -> tuple[Labels, Tensor]:
    """0 and 1 (N,), or distributions over negative and positive (2, …); and presence (N,)."""
    where, ignored = batch.options.where, batch.options.ignore_index
    if ignored is not None and t.dtype != torch.bool:
        valid = (t if t.is_floating_point() else as_long(t)) != ignored
        where = valid if where is None else valid & where
    p = t.to(dtype) if where is None else torch.where(where, t.to(dtype), 0.0)
    presence = torch.ones_like(p, requires_grad=False) if where is None else where.to(dtype)
    if not (batch.look and readable(p)):
        inside = (p >= -PROBABILITY_SLACK) & (p <= 1 + PROBABILITY_SLACK)
        presence = torch.where(inside, presence, torch.nan)
    elif p.numel():
        check_probability_range(*bounds(p), batch.options.mask_name)
    if batch.is_soft:
        return Labels(q=torch.stack([1 - p, p]) * presence), presence
    y = torch.where(presence.isnan(), -1, (p == 1).long())
    return Labels(y, None if where is None else ~where), presence


def by_label(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.dim() == 1:
        return vector.view(2, *[1] * ndim)
    return along(vector.T, ndim, axis)


def along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """(…, L), or () for one of all labels, with L along the axis of the logits."""
    if vector.dim() == 0:
        return vector
    shape = [-1 if i == axis % ndim else 1 for i in range(ndim)]
    return vector.reshape([*vector.shape[:-1], *shape])


def normalizers(W: Tensor, presence: Tensor, options: Options) -> tuple[Any, Any]:
    """What the sums over LDAM and over focal are divided by, () each."""
    if options.reduction in ("none", "sum"):
        return 1.0, 1.0
    if options.totals is not None:
        W, presence = (each.to(W.device, W.dtype) for each in options.totals)
    elif readable(W) and not W.requires_grad:  # numbers, whose arithmetic costs nothing
        n = max(presence.sum().item(), 1.0)
        return n if options.reduction == "batch_mean" else W.sum().item() or 1.0, n
    N = total(presence).clamp(min=1)
    if options.reduction == "batch_mean":
        return N, N
    by_weight = total(W)
    return torch.where(by_weight == 0, 1.0, by_weight), N
