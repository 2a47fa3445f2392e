"""The steps of ``lmf_multi.reference`` in PyTorch; what is said here is only what differs.

The class axis stays where it is, so no layout is copied.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi.spec import (
    PROBABILITY_SLACK,
    Reduction,
    check_inputs,
    check_label_range,
    check_mask,
    check_parameters,
    check_probability_range,
    check_reduction,
    check_sigmoid_inputs,
    check_vectors,
)
from lmf_multi.torch._closed_form import mixture, readable


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
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``lmf_loss`` in the layout and with the mask of ``cross_entropy``."""
    _check_tensors(input=input, target=target)
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
        totals=totals,
    )
    return loss if reduction == "none" else loss.sum()


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
    _check_tensors(input=input, target=target)
    check_reduction(reduction)
    loss = compute_sigmoid_loss(
        input,
        target,
        margins,
        class_weight,
        alpha,
        beta,
        gamma,
        scale,
        label_smoothing,
        axis=min(1, max(input.dim() - 1, 0)),
        where=annotated(target, ignore_index, where),
        mask_name=f"where or ignore_index={ignore_index}",
        reduction=reduction,
        totals=totals,
    )
    return loss if reduction == "none" else loss.sum()


def total_weight_and_examples(
    target: Tensor, class_weight: Any, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """What the means of ``lmf_loss`` sum up: each example's class weight and its presence."""
    _check_tensors(target=target)
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # MPS has no float64
    w = _vector("class_weight", class_weight, dtype, target.device)
    if target.is_floating_point():
        axis = min(1, target.dim() - 1)
        q, presence = _soft_targets(target, axis, None, dtype)
        by_class = [-1] + [1] * (target.dim() - 1 - axis)
        return (q if w is None else q * w.view(by_class)).sum(axis), presence
    C = torch.iinfo(target.dtype).max if w is None else len(w)  # the loss itself checks the labels
    where, mask_name = target != ignore_index, f"ignore_index={ignore_index}"
    y, presence, _ = _targets(target, C, where, mask_name, dtype)
    return presence if w is None else presence * _at(w, y), presence


def total_sigmoid_weight_and_examples(
    target: Tensor, class_weight: Any, ignore_index: int, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for the sigmoid form."""
    _check_tensors(target=target)
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # MPS has no float64
    w = _vector("class_weight", class_weight, dtype, target.device)
    w = None if w is None else by_label(w, target.dim(), min(1, max(target.dim() - 1, 0)))
    where = annotated(target, ignore_index, where)
    t, presence = sigmoid_targets(target, where, f"where or ignore_index={ignore_index}", dtype)
    return sigmoid_weights(t, presence, w), presence


def _check_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def annotated(target: Tensor, ignore_index: int, where: Tensor | None) -> Tensor | None:
    """The elements that neither mask leaves out."""
    if where is not None:
        _check_tensors(where=where)
        check_mask((tuple(where.shape), where.dtype), tuple(target.shape), "the labels' shape")
    if target.dtype == torch.bool:
        return where
    valid = target != ignore_index
    return valid if where is None else valid & where


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
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What each example contributes to the reduced loss; ``reduction`` is their sum.

    ``totals`` replaces the batch's total class weight and number of examples in the means.
    """
    check_parameters(
        alpha=alpha, beta=beta, gamma=gamma, scale=scale, label_smoothing=label_smoothing
    )
    check_vectors(margins=margins, class_weight=class_weight)
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
        q, presence = _soft_targets(y, axis, where, dtype)
        present = presence.unsqueeze(axis)
        W = (q if w is None else q * w.view(by_class)).sum(axis)
    else:
        y, presence, masked = _targets(y, C, where, mask_name, dtype)
        W = presence if w is None else presence * _at(w, y)
    by_weight, by_examples = _normalizers(W, presence, reduction, totals)

    if not soft and label_smoothing == 0:
        a = None if alpha == 0 else W * (alpha / by_weight)
        b = None if beta == 0 else W * (beta / by_examples)
        return mixture(z, y, masked, None if Δ is None else _at(Δ, y), a, b, gamma, scale, axis)

    if not soft:
        present = presence.unsqueeze(axis)
        q = torch.zeros_like(z, dtype=dtype).scatter(axis, y.unsqueeze(axis), 1.0) * present
    q = (1 - label_smoothing) * q + label_smoothing / C * present
    share = q if w is None else q * w.view(by_class)
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    z, Δ = torch.where(present == 0, 0.0, z), None if Δ is None else Δ.view(by_class)
    return mixture(z, None, None, Δ, a, b, gamma, scale, axis)


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
) -> Tensor:
    """What each element contributes to the reduced loss, as ``compute_loss``."""
    check_parameters(
        alpha=alpha, beta=beta, gamma=gamma, scale=scale, label_smoothing=label_smoothing
    )
    check_vectors(margins=margins, class_weight=class_weight)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    Δ = _vector("margins", margins, dtype, x.device)
    w = _vector("class_weight", class_weight, dtype, x.device)
    soft = check_sigmoid_inputs(
        (tuple(x.shape), x.dtype),
        (tuple(t.shape), t.dtype),
        axis,
        {
            "margins": None if Δ is None else tuple(Δ.shape),
            "class_weight": None if w is None else tuple(w.shape),
        },
        None if where is None else (tuple(where.shape), where.dtype),
    )

    Δ, w = (None if v is None else by_label(v, x.dim(), axis) for v in (Δ, w))
    t, presence = sigmoid_targets(t, where, mask_name, dtype)
    W = sigmoid_weights(t, presence, w)
    by_weight, by_examples = _normalizers(W, presence, reduction, totals)
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


def by_label(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.dim() == 1:
        return vector.view(2, *[1] * ndim)
    return vector.T.reshape(2, *[-1 if i == axis % ndim else 1 for i in range(ndim)])


def sigmoid_targets(
    t: Tensor, where: Tensor | None, mask_name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Probabilities; each element's presence, 1, 0 for a masked one, NaN out of range."""
    t = t.to(dtype) if where is None else torch.where(where, t, 0).to(dtype)
    presence = torch.ones_like(t, requires_grad=False) if where is None else where.to(dtype)
    if not readable(t):
        inside = (t >= -PROBABILITY_SLACK) & (t <= 1 + PROBABILITY_SLACK)
        return t, torch.where(inside, presence, torch.nan)
    if t.numel():
        smallest, largest = torch.aminmax(t.detach())
        check_probability_range(float(smallest), float(largest), mask_name)
    return t, presence


def sigmoid_weights(t: Tensor, presence: Tensor, w: Tensor | None) -> Tensor:
    """Each element's class weight; exactly that of its class where t is 0 or 1."""
    return presence if w is None else presence * ((1 - t) * w[0] + t * w[1])


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


def _soft_targets(
    y: Tensor, axis: int, where: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Distributions, 0 for masked examples, and each example's presence."""
    presence = torch.ones_like(y.select(axis, 0), dtype=dtype, requires_grad=False)
    presence = presence if where is None else where.to(dtype)
    return torch.where(presence.unsqueeze(axis) == 0, 0.0, y.to(dtype)), presence


def _targets(
    y: Tensor, C: int, where: Tensor | None, mask_name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Class indices; each example's presence, 1, 0 for a masked one, NaN out of range; the mask."""
    if readable(y) and (where is None or bool(where.all())):
        where = None
    masked = None if where is None else ~where
    y = y.long() if masked is None else y.long().masked_fill(masked, 0)
    presence = torch.ones_like(y, dtype=dtype) if where is None else where.to(dtype)
    if not readable(y):
        return y.clamp(0, C - 1), torch.where((y >= 0) & (y < C), presence, torch.nan), masked
    if y.numel():
        smallest, largest = torch.aminmax(y)
        check_label_range(int(smallest), int(largest), C, mask_name)
    return y, presence, masked


def _normalizers(
    W: Tensor, presence: Tensor, reduction: Reduction, totals: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | float, Tensor | float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    if totals is not None:
        W, presence = (total.to(W.device, W.dtype) for total in totals)
    N = presence.sum().clamp(min=1)
    if reduction == "batch_mean":
        return N, N
    total = W.sum()
    return torch.where(total == 0, 1.0, total), N
