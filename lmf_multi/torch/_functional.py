"""The steps of ``lmf_multi.reference`` in PyTorch; what is said here is only what differs.

The class axis stays where it is, so no layout is copied.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmf_multi.spec import (
    Reduction,
    as_numpy,
    check_ignored,
    check_inputs,
    check_label_range,
    check_parameters,
    check_reduction,
    check_vectors,
)
from lmf_multi.torch._closed_form import as_long, is_plain, loss_dtype, mixture, readable
from lmf_multi.torch._cpu import check_memory, has_kernel_for, has_operator_for, kernel_loss
from lmf_multi.torch._distributed import check_shards, loss_of_shards, whole
from lmf_multi.torch._eager import SMALL, small_loss
from lmf_multi.torch._triton import fused_loss, supports


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

    >>> logits = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    >>> lmf_loss(logits, torch.tensor([0, 1]), margins=[0.1, 0.5])
    tensor(0.5775)
    """
    check_given(margins=margins, class_weight=class_weight)
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
    check_given(margins=margins, class_weight=class_weight)
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
    check_given(class_weight=class_weight)
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
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``lmf_loss`` in the layout and with the mask of ``cross_entropy``."""
    input, target = plain_tensors(input=input, target=target)
    check_reduction(reduction)
    ignore_index = check_ignored("ignore_index", ignore_index)
    sharded = check_shards(input, target=target)
    axis, numbers = min(1, input.dim() - 1), (alpha, beta, gamma, scale, label_smoothing)
    check = _check_inputs_of_axis_1
    Δ, w, soft = checked(check, input, target, margins, class_weight, axis, None, numbers)
    if soft:
        _check_ignores_none(ignore_index)
    if sharded:
        return loss_of_shards(
            lambda z, y, totals: masked_loss(z, y, Δ, w, *numbers, ignore_index, reduction, totals),
            lambda y: total_weight_and_examples(y, w, ignore_index),
            input,
            (target,),
            axis,
            reduction,
            totals,
        )

    def plain(z: Tensor) -> Tensor:
        loss: Tensor = compute_loss(
            z,
            target,
            Δ,
            w,
            *numbers,
            axis=axis,
            ignore_index=ignore_index,
            reduction=reduction,
            totals=totals,
        )
        return loss if reduction == "none" else total(loss)

    loss, one_class = None, not soft and label_smoothing == 0
    terms = (Δ, w, alpha, beta, gamma, scale, axis, ignore_index)
    on_cpu = one_class and readable(input) and readable(target)
    in_pass = on_cpu and has_kernel_for(input, target, axis)
    if in_pass or (one_class and has_operator_for(input, target)):
        loss = kernel_loss(input, target, *terms, reduction, totals, plain)
    elif on_cpu and input.numel() <= SMALL:
        loss = small_loss(input, target, *terms, reduction, totals, plain)
    elif _is_on_gpu(input) and supports(input, target, axis, label_smoothing):
        loss = fused_loss(
            input,
            target,
            Δ,
            w,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            scale=scale,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            plain=plain,
            ignore_index=ignore_index,
            totals=totals,
        )
    return plain(input) if loss is None else loss


def _is_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is one of numbers on a CUDA device."""
    return x.is_cuda and is_plain(x)


def total_weight_and_examples(
    target: Tensor, class_weight: Any, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """What the means of ``lmf_loss`` sum up: each example's class weight and its presence."""
    (target,) = plain_tensors(target=target)
    target, ignore_index = whole(target), check_ignored("ignore_index", ignore_index)
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # MPS has no float64
    w = vector("class_weight", class_weight, dtype, target.device)
    if target.is_floating_point():
        _check_ignores_none(ignore_index)
        axis = min(1, target.dim() - 1)
        q, presence = _soft_targets(target, axis, None, dtype)
        by_class = [-1] + [1] * (target.dim() - 1 - axis)
        return (q if w is None else q * w.view(by_class)).sum(axis), presence
    C = torch.iinfo(torch.int64).max if w is None else len(w)  # the loss itself checks the labels
    mask_name = f"ignore_index={ignore_index}"
    y, presence, _ = _targets(target, C, None, ignore_index, mask_name, dtype)
    return presence if w is None else presence * _at(w, y), presence


def plain_tensors(**tensors: Any) -> list[Tensor]:
    """The arguments as plain tensors; refuses what is no tensor or has lost its memory."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    plain = {name: _as_plain(value) for name, value in tensors.items()}
    check_memory(**plain)
    return list(plain.values())


def _as_plain(x: Tensor) -> Tensor:
    """The numbers of a subclass that adds to them, as MONAI's and torchvision's do.

    Such a class has a say in every operation, which takes time, and compiled code takes some of its
    attributes for the numbers. Not of one that holds its numbers elsewhere, as DTensor does.
    """
    kind = type(x)
    if kind in (Tensor, torch.nn.Parameter) or kind.__torch_dispatch__ != Tensor.__torch_dispatch__:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        same: Tensor = torch.ops.aten.alias(x)
    return same


def check_given(**vectors: Any) -> None:
    """Refuse what callers of functions must not give: ``check_vectors``, of CPU tensors too.

    The classes have checked theirs, and pay nothing for it at each call.
    """
    look = not torch.compiler.is_compiling()
    # a transform would wrap what is read
    look_at_tensors = look and not torch._C._are_functorch_transforms_active()
    for name, value in vectors.items():
        if look_at_tensors and isinstance(value, Tensor) and readable(value):
            check_memory(**{name: value})
            if _are_positive(value):
                continue
            value = as_numpy(value)
        check_vectors(look, **{name: value})


def _are_positive(x: Tensor) -> bool:
    """Whether they are finite too, as nearly always, and much faster to see than all rules."""
    if not x.is_floating_point() or not x.numel():
        return False
    smallest, largest = torch.aminmax(x.detach())
    return smallest.item() > 0 and largest.item() < math.inf


_check_inputs_of_axis_1 = partial(check_inputs, axis_is_given=False)


def _check_ignores_none(ignore_index: int) -> None:
    """Refuse, as ``cross_entropy`` does, a label to ignore where there are distributions."""
    if ignore_index >= 0:
        raise ValueError(
            "ignore_index needs integer labels, got distributions and "
            f"ignore_index={ignore_index}; leave such examples out of the batch"
        )


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
    where: Tensor | None = None,
    ignore_index: int | None = None,
    mask_name: str | None = None,
    reduction: Reduction,
    totals: tuple[Tensor, Tensor] | None = None,
    look: bool = True,
    combine: Callable[..., Any] = mixture,
) -> Any:
    """What each example contributes to the reduced loss; ``reduction`` is their sum.

    Examples take no part where ``where`` is False or an integer label is ``ignore_index``.
    ``totals`` replaces the batch's total class weight and number of examples in the means.
    Without a ``look`` at the labels those out of range give NaN. ``combine`` takes what ``mixture``
    takes.
    """
    z, y = plain_tensors(logits=z, labels=y)
    numbers = (alpha, beta, gamma, scale, label_smoothing)
    Δ, w, soft = checked(check_inputs, z, y, margins, class_weight, axis, where, numbers)

    axis = axis % z.dim()
    C, by_class = z.shape[axis], [-1] + [1] * (z.dim() - 1 - axis)
    if soft:
        q, presence = _soft_targets(y, axis, where, loss_dtype(z))
        present = presence.unsqueeze(axis)
        W = (q if w is None else q * w.view(by_class)).sum(axis)
    else:
        mask_name = mask_name or f"ignore_index={ignore_index}"
        y, presence, masked = _targets(y, C, where, ignore_index, mask_name, loss_dtype(z), look)
        W = presence if w is None else presence * _at(w, y)
    by_weight, by_examples = normalizers(W, presence, reduction, totals)

    if not soft and label_smoothing == 0:
        a = None if alpha == 0 else W * (alpha / by_weight)
        b = None if beta == 0 else W * (beta / by_examples)
        return combine(z, y, masked, None if Δ is None else _at(Δ, y), a, b, gamma, scale, axis)

    if not soft:
        present = presence.unsqueeze(axis)
        q = torch.zeros_like(z, dtype=loss_dtype(z)).scatter(axis, y.unsqueeze(axis), 1.0) * present
    q = (1 - label_smoothing) * q + label_smoothing / C * present
    share = q if w is None else q * w.view(by_class)
    a = None if alpha == 0 else share * (alpha / by_weight)
    b = None if beta == 0 else share * (beta / by_examples)
    z, Δ = torch.where(present == 0, 0.0, z), None if Δ is None else Δ.view(by_class)
    return combine(z, None, None, Δ, a, b, gamma, scale, axis)


def checked(
    check: Callable[..., bool],
    z: Tensor,
    y: Tensor,
    margins: Any,
    class_weight: Any,
    axis: int,
    where: Tensor | None,
    numbers: tuple[float, ...],
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Margins and class weights where the logits are, and whether labels are distributions."""
    names = ("alpha", "beta", "gamma", "scale", "label_smoothing")
    check_parameters(**dict(zip(names, numbers, strict=True)))
    Δ = vector("margins", margins, loss_dtype(z), z.device)
    w = vector("class_weight", class_weight, loss_dtype(z), z.device)
    of_vectors = tuple(None if v is None else v.shape for v in (Δ, w))
    of_where = None if where is None else (where.shape, where.dtype)
    look = _check_once if is_plain(z) else _check
    return Δ, w, look(check, (z.shape, z.dtype), (y.shape, y.dtype), axis, of_vectors, of_where)


def _check(
    check: Callable[..., bool],
    logits: tuple[torch.Size, torch.dtype],
    labels: tuple[torch.Size, torch.dtype],
    axis: int,
    vectors: tuple[torch.Size | None, ...],
    where: tuple[torch.Size, torch.dtype] | None,
) -> bool:
    """Check shapes and dtypes, for which ``spec`` wants plain tuples."""
    logits_, labels_ = ((tuple(shape), dtype) for shape, dtype in (logits, labels))
    shapes = (None if shape is None else tuple(shape) for shape in vectors)
    named = dict(zip(("margins", "class_weight"), shapes, strict=True))
    return check(logits_, labels_, axis, named, where and (tuple(where[0]), where[1]))


_check_once = lru_cache(maxsize=256)(_check)  # a training run has few shapes


def vector(name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A constant array over the classes, where and how the logits need it."""
    if values is None:
        return None
    values = whole(values)
    if isinstance(values, Tensor):
        (values,) = plain_tensors(**{name: values})
        if values.requires_grad:
            raise ValueError(f"{name} must be constant, got a tensor that requires grad; detach it")
    elif isinstance(values, np.ndarray):
        values = np.array(values)  # a spec's arrays are read-only, which PyTorch warns of
    return torch.as_tensor(values, dtype=dtype, device=device)


def _at(vector: Tensor, y: Tensor) -> Tensor:
    """``vector[y]``, which vmap cannot batch for a single label."""
    return vector.index_select(0, y.reshape(-1)).view(y.shape)


def _soft_targets(
    y: Tensor, axis: int, where: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Distributions, 0 for masked examples, and each example's presence."""
    presence = torch.ones_like(y.select(axis, 0), dtype=dtype, requires_grad=False)
    presence = presence if where is None else where.to(dtype)
    return torch.where(presence.unsqueeze(axis) == 0, 0.0, y.to(dtype)), presence


def _targets(
    y: Tensor,
    C: int,
    where: Tensor | None,
    ignore_index: int | None,
    mask_name: str,
    dtype: torch.dtype,
    look: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Class indices; each example's presence, 1, 0 for a masked one, NaN out of range; the mask."""
    look = look and readable(y)
    if look and y.numel() and where is None:
        smallest, largest = _bounds(y)
        if ignore_index is None or not smallest <= ignore_index <= largest:
            check_label_range(smallest, largest, C, mask_name)
            return y.long(), torch.ones((), dtype=dtype, device=y.device).expand(y.shape), None
    y = as_long(y)
    if ignore_index is not None:
        valid = y != ignore_index
        where = valid if where is None else where & valid
    masked = None if where is None else ~where
    y = y if masked is None else y.masked_fill(masked, 0)
    presence = torch.ones_like(y, dtype=dtype) if where is None else where.to(dtype)
    if not look:
        return y.clamp(0, C - 1), torch.where((y >= 0) & (y < C), presence, torch.nan), masked
    if y.numel():
        check_label_range(*_bounds(y), C, mask_name)
    return y, presence, masked


def _bounds(y: Tensor) -> tuple[int, int]:
    """The smallest and the largest label."""
    if y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch does not compare them
        labels = y.clone().numpy()  # or the caller could not resize the storage any more
        return int(labels.min()), int(labels.max())
    smallest, largest = torch.aminmax(y)
    return int(smallest), int(largest)


def normalizers(
    W: Tensor, presence: Tensor, reduction: Reduction, totals: tuple[Tensor, Tensor] | None
) -> tuple[Any, Any]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    if totals is not None:
        W, presence = (each.to(W.device, W.dtype) for each in totals)
    elif readable(W) and not W.requires_grad:  # numbers, whose arithmetic costs nothing
        n = max(presence.sum().item(), 1.0)
        return n if reduction == "batch_mean" else W.sum().item() or 1.0, n
    N = total(presence).clamp(min=1)
    if reduction == "batch_mean":
        return N, N
    by_weight = total(W)
    return torch.where(by_weight == 0, 1.0, by_weight), N


def total(x: Tensor) -> Tensor:
    """Their sum, of which compiled code for a CPU would add thousands to one float32 after another.

    Eager code sums in pairs, and GPUs sum in many threads: both stay exact without this.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(dtype=torch.float64).to(x.dtype)
    return x.sum()
