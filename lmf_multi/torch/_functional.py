"""Public functions, the checks of what they are given, and the choice of what computes it."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmf_multi._terms import Numbers, Options, Vectors
from lmf_multi.spec import (
    Reduction,
    check_ignored,
    check_inputs,
    check_mask,
    check_parameters,
    check_reduction,
    check_sigmoid_inputs,
)
from lmf_multi.torch._cpu import kernel_loss, takes_kernel
from lmf_multi.torch._distributed import Shards, check_shards, whole
from lmf_multi.torch._mixture import by_operations
from lmf_multi.torch._preparation import Batch, read
from lmf_multi.torch._tensors import check_given, is_plain, plain_tensor, total, vector, widest
from lmf_multi.torch._triton import fused_loss, takes_fused


class _Form(NamedTuple):
    """What the checks must know of the form of the loss, and of the function that was called."""

    is_sigmoid: bool
    axis_is_given: bool  # whether it has an argument axis


_SOFTMAX, _SIGMOID = _Form(False, False), _Form(True, False)


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
    logit_adjustment: Any = None,
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
        logit_adjustment: float (C,), nats, added to the logits before both terms, such as τ times
            ``lmf_multi.log_priors``; or None.
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
    vectors = Vectors(margins, class_weight, logit_adjustment)
    check_given(**vectors.by_name())
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(1, ignore_index=ignore_index, reduction=reduction)
    return softmax_loss(input, target, vectors, numbers, options)


def ldam_loss(
    input: Tensor,
    target: Tensor,
    margins: Any,
    class_weight: Any = None,
    *,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> ldam_loss(torch.tensor([[0.2, 0.0]]), torch.tensor([0]), [0.2, 0.5], scale=2.0)
    tensor(0.6931)
    """
    vectors = Vectors(margins, class_weight, logit_adjustment)
    check_given(**vectors.by_name())
    numbers = Numbers(1.0, 0.0, 0.0, scale, label_smoothing)
    options = Options(1, ignore_index=ignore_index, reduction=reduction)
    return softmax_loss(input, target, vectors, numbers, options)


def focal_loss(
    input: Tensor,
    target: Tensor,
    class_weight: Any = None,
    *,
    gamma: float = 1.5,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0)
    tensor(0.1733)
    """
    vectors = Vectors(None, class_weight, logit_adjustment)
    check_given(**vectors.by_name())
    numbers = Numbers(0.0, 1.0, gamma, 1.0, label_smoothing)
    options = Options(1, ignore_index=ignore_index, reduction=reduction)
    return softmax_loss(input, target, vectors, numbers, options)


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
    logit_adjustment: Any = None,
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
        logit_adjustment: float () or (L,), nats, added to the logits, such as τ log(n⁺ / n⁻).
        where: bool, the input's shape; False leaves an element out.
        ignore_index: elements with this target take no part either.

    The other arguments, results and errors as :func:`lmf_loss`; "none" gives the input's shape.

    >>> logits, labels = torch.tensor([-2.0, 0.5]), torch.tensor([0, 1])
    >>> sigmoid_lmf_loss(logits, labels, margins=[0.1, 0.5])
    tensor(0.5775)
    """
    vectors = Vectors(margins, class_weight, logit_adjustment)
    check_given(**vectors.by_name())
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(1, where, ignore_index, reduction=reduction)
    return sigmoid_loss(input, target, vectors, numbers, options)


# --- the layout and the masks of cross_entropy, which modules call too


def softmax_loss(
    input: Tensor, target: Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> Tensor:
    """``lmf_loss``, the classes along axis 1."""
    input, target = plain_tensor("input", input), plain_tensor("target", target)
    check_reduction(options.reduction)
    ignored = check_ignored("ignore_index", options.ignore_index)
    axis, masks = min(1, input.dim() - 1), (None, ignored, f"ignore_index={ignored}")
    options = Options(axis, *masks, options.reduction, options.totals)
    sharded = check_shards(input, target=target)
    batch = checked(input, target, vectors, numbers, options, _SOFTMAX)
    if batch.is_soft:
        _check_ignores_none(ignored)
    return loss_of_shards(input, batch) if sharded else reduced(input, batch)


def sigmoid_loss(
    input: Tensor, target: Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> Tensor:
    """``sigmoid_lmf_loss`` with both its masks, the labels along axis 1."""
    input, target = plain_tensor("input", input), plain_tensor("target", target)
    check_reduction(options.reduction)
    axis = min(1, max(input.dim() - 1, 0))
    if check_shards(input, target=target, where=options.where):
        options = options.but(axis=axis)
        return loss_of_shards(input, checked(input, target, vectors, numbers, options, _SIGMOID))
    options = _annotated(target, options).but(axis=axis)
    return reduced(input, checked(input, target, vectors, numbers, options, _SIGMOID))


def reduced(z: Tensor, batch: Batch) -> Tensor:
    """The reduced loss: of a kernel where one takes these tensors, else of the operations."""
    loss = None
    if takes_kernel(z, batch):
        loss = kernel_loss(z, batch)
    elif takes_fused(z, batch):
        loss = fused_loss(z, batch)
    if loss is None:
        loss = by_operations(z, batch)
        loss = loss if batch.options.reduction == "none" else total(loss)
    return loss


def loss_of_shards(z: Any, batch: Batch) -> Tensor:
    """The reduced loss of a ``DTensor``: each process computes what its shard contributes."""
    options, (y, where) = batch.options, (batch.y, batch.options.where)
    vectors = ((batch.Δ, 2), (batch.w, 2), (batch.o, 1))  # and what each has of axes by label
    needs_axis = not batch.is_sigmoid or any(v is not None and v.dim() == n for v, n in vectors)
    shards = Shards.of(z, options.axis if needs_axis else None)
    y, where = shards.local(y), None if where is None else shards.local(where)
    options = options.but(where=where)
    options = _annotated(y, options) if batch.is_sigmoid else options
    batch = batch._replace(y=y, options=options)
    if options.totals is None and options.reduction in ("mean", "batch_mean"):
        _, *each = read(batch, z.shape[options.axis], widest(y.device))
        options = options.but(totals=tuple(shards.total(x.sum()).to_local() for x in each))
    loss = reduced(shards.local(z), batch._replace(options=options))
    return shards.joined(loss, options.reduction)


def counted(
    target: Tensor, class_weight: Any, options: Options, is_sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """What the means of a batch with these labels sum up: class weights (N,) and presence (N,)."""
    target, where = whole(plain_tensor("target", target)), whole(options.where)
    ignored = check_ignored("ignore_index", options.ignore_index)
    axis: int | None = min(1, max(target.dim() - 1, 0))
    name = f"ignore_index={ignored}"
    options = options.but(axis=axis, where=where, ignore_index=ignored, mask_name=name)
    if is_sigmoid:
        options, axis = _annotated(target, options), None
    elif target.is_floating_point():
        _check_ignores_none(ignored)
    dtype = widest(target.device)
    w = vector("class_weight", whole(class_weight), dtype, target.device)
    numbers, soft = Numbers(), target.is_floating_point()
    kind: Any = {"is_soft": soft, "axis": axis, "is_sigmoid": is_sigmoid}
    batch = Batch(target, None, w, None, numbers, options, **kind)
    # of as many classes as there may be: the loss itself checks the labels
    _, *each = read(batch, torch.iinfo(torch.int64).max if w is None else len(w), dtype)
    return each[0], each[1]


# --- any class axis and any mask, of each example, as Keras calls it


def compute_loss(
    z: Tensor, y: Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> Tensor:
    """What each example contributes to the reduced loss (N,); ``reduction`` is their sum."""
    z, y = plain_tensor("logits", z), plain_tensor("labels", y)
    return by_operations(z, checked(z, y, vectors, numbers, options, _Form(False, True)))


def compute_sigmoid_loss(
    x: Tensor, t: Tensor, vectors: Vectors, numbers: Numbers, options: Options
) -> Tensor:
    """What each element contributes to the reduced loss (N,), as ``compute_loss``."""
    x, t = plain_tensor("logits", x), plain_tensor("labels", t)
    return by_operations(x, checked(x, t, vectors, numbers, options, _Form(True, True)))


# --- checks


def checked(
    z: Tensor,
    y: Tensor,
    vectors: Vectors,
    numbers: Numbers,
    options: Options,
    form: _Form,
) -> Batch:
    """The batch, if shapes, dtypes and parameters keep their rules."""
    plain = is_plain(z)
    once = plain and {*map(type, numbers)} <= {float, int}
    (_check_numbers_once if once else _check_numbers)(*numbers)
    # kernels read them as modules keep them: a cast at each call takes as long as a small batch
    dtype = widest(z.device)
    Δ = vector("margins", whole(vectors.margins), dtype, z.device)
    w = vector("class_weight", whole(vectors.class_weight), dtype, z.device)
    o = vector("logit_adjustment", whole(vectors.logit_adjustment), dtype, z.device)
    look, where = _check_once if plain else _check, options.where
    shapes = tuple(None if x is None else (x.shape, x.dtype) for x in (z, y, where, Δ, w, o))
    is_soft = look(form, options.axis, shapes)
    if options.axis < 0:
        options = options.but(axis=options.axis % max(z.dim(), 1))
    axis = None if form.is_sigmoid else options.axis
    kind: Any = {"is_soft": is_soft, "axis": axis, "is_sigmoid": form.is_sigmoid}
    return Batch(y, Δ, w, o, numbers, options, **kind)


def _check(form: _Form, axis: int, shapes: tuple[Any, ...]) -> bool:
    """Whether labels are distributions, of shapes and dtypes, for which ``spec`` wants tuples."""
    z, y, where, *given = (x and (tuple(x[0]), x[1]) for x in shapes)
    check = check_sigmoid_inputs if form.is_sigmoid else check_inputs
    vectors = {name: v and v[0] for name, v in zip(Vectors._fields, given, strict=True)}
    return check(z, y, axis, vectors, where, form.axis_is_given)


_check_once = lru_cache(maxsize=256)(_check)  # a training run has few shapes


def _check_numbers(*numbers: Any) -> None:
    check_parameters(**Numbers(*numbers).by_name())


_check_numbers_once = lru_cache(maxsize=256)(_check_numbers)


def _check_ignores_none(ignore_index: int) -> None:
    """Refuse, as ``cross_entropy`` does, a label to ignore where there are distributions."""
    if ignore_index >= 0:
        raise ValueError(
            "ignore_index needs integer labels, got distributions and "
            f"ignore_index={ignore_index}; leave such examples out of the batch"
        )


def _annotated(target: Tensor, options: Options) -> Options:
    """With checked masks of the elements that either leaves out, and a name for them."""
    ignored, where = check_ignored("ignore_index", options.ignore_index), options.where
    if where is not None:
        where = plain_tensor("where", where)
        check_mask((tuple(where.shape), where.dtype), tuple(target.shape), "the labels' shape")
    name = f"where or ignore_index={ignored}"
    return options.but(where=where, ignore_index=ignored, mask_name=name)
