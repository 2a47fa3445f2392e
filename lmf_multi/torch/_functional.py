"""The steps of ``lmf_multi.reference`` in PyTorch; what is said here is only what differs.

The class axis stays where it is, so no layout is copied.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi.spec import (
    Reduction,
    check_inputs,
    check_label_range,
    check_parameters,
    check_reduction,
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
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
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
