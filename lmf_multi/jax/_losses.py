"""The losses as pytrees: arrays from class counts, remembered for ``lmf_loss``."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lmf_multi._constructors import (
    FocalConstructors,
    LDAMConstructors,
    LMFConstructors,
    Parameters,
    SigmoidConstructors,
    arguments,
)
from lmf_multi._terms import Numbers, Options, Vectors, numbers_of
from lmf_multi.jax._functional import (
    compute_loss,
    compute_sigmoid_loss,
    total_sigmoid_weight_and_examples,
    total_weight_and_examples,
)
from lmf_multi.spec import Counts, Reduction, Weights, check_reduction, short

_LEAVES = (*Vectors._fields, *Numbers._fields)
_STATIC = ("axis", "reduction", "axis_name")


@dataclass(frozen=True, eq=False, repr=False)
class _Loss:
    """A pytree: arrays and hyper-parameters are leaves, the rest is static.

    One jitted function thus serves new values without a recompile, and ``jax.vmap`` runs over
    what ``stack_losses`` returns. ``replace`` gives a copy with other leaves.
    """

    margins: Any
    class_weight: Any
    # with a value for losses that were pickled before there was any
    logit_adjustment: Any = field(default=None, kw_only=True)
    alpha: Any
    beta: Any
    gamma: Any
    scale: Any
    label_smoothing: Any
    axis: int
    reduction: Reduction
    axis_name: Any

    _compute = staticmethod(compute_loss)
    _count = staticmethod(total_weight_and_examples)

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda loss: (
                [(jax.tree_util.GetAttrKey(name), getattr(loss, name)) for name in _LEAVES],
                tuple(getattr(loss, name) for name in _STATIC),
            ),
            lambda static, children: cls._of(
                dict(zip((*_LEAVES, *_STATIC), (*children, *static), strict=True))
            ),
        )

    def _set(self, parameters: Parameters, axis: int, reduction: Reduction, axis_name: Any) -> None:
        check_reduction(reduction)
        if axis_name is not None and reduction == "none":
            raise ValueError(
                "axis_name needs a reduction over the batch, got reduction 'none'; "
                "use 'mean', 'batch_mean' or 'sum'"
            )
        static = {"axis": axis, "reduction": reduction, "axis_name": axis_name}
        leaves = parameters.vectors._asdict() | parameters.numbers._asdict()
        vars(self).update(leaves | static)  # past the frozen __setattr__

    @classmethod
    def _of(cls, attributes: dict[str, Any]) -> Self:
        """A loss with these attributes, which inside JAX may be anything and are not checked."""
        loss = object.__new__(cls)
        vars(loss).update(attributes)
        return loss

    def replace(self, **changes: Any) -> Self:
        """A copy in which the named attributes have other values.

        Raises:
            TypeError: a name is no attribute of the loss.
        """
        attributes = {each.name: getattr(self, each.name) for each in fields(_Loss)}
        for name in changes:
            if name not in attributes:
                raise TypeError(
                    f"replace takes {', '.join(attributes)}, got {name!r}; "
                    "build a new loss for other class counts"
                )
        return self._of(attributes | changes)

    @classmethod
    def from_arrays(
        cls,
        *,
        margins: Any,
        class_weight: Any,
        alpha: Any,
        beta: Any,
        gamma: Any,
        scale: Any,
        label_smoothing: Any,
        logit_adjustment: Any = None,
        axis: int = -1,
        reduction: Reduction = "mean",
        axis_name: Any = None,
    ) -> Self:
        """A loss from its attributes, as ``repr`` shows them; lists become arrays.

        Raises:
            TypeError: a list in short, as ``repr`` shows one of more than 20 classes.
        """
        vectors = Vectors(margins, class_weight, logit_adjustment)
        arrays = vectors._asdict()
        for name, values in arrays.items():
            if isinstance(values, list) and ... in values:
                raise TypeError(f"{name} must be numbers, got {short(values)}; pickle the loss")
            arrays[name] = np.array(values) if isinstance(values, list) else values
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        static = {"axis": axis, "reduction": reduction, "axis_name": axis_name}
        return cls._of(arrays | numbers._asdict() | static)

    def __repr__(self) -> str:
        attributes = {each.name: _plain(getattr(self, each.name)) for each in fields(_Loss)}
        return f"{type(self).__name__}.from_arrays({arguments(attributes)})"

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        normalizers: tuple[Array, Array] | None = None,
    ) -> Array:
        """The loss of logits (..., C) and labels, as :func:`lmf_loss` takes them, reduced.

        Args:
            logits: float (..., C), nats.
            labels: integer (...), or float of the logits' shape.
            where: bool (...), the examples that count.
            normalizers: what ``normalizers`` returns for a larger batch, of which this is a part;
                the parts' losses then sum to its mean.
        """
        if normalizers is not None and self.reduction not in ("mean", "batch_mean"):
            raise ValueError(
                f"normalizers need the reduction 'mean' or 'batch_mean', got {self.reduction!r}"
            )
        if self.axis_name is not None and self.reduction != "sum":
            normalizers = normalizers or self.normalizers(labels, where=where)
        vectors = Vectors(self.margins, self.class_weight, self.logit_adjustment)
        options = Options(self.axis, where, reduction=self.reduction, totals=normalizers)
        loss = self._compute(logits, labels, vectors, numbers_of(self), options)
        if self.reduction == "none":
            return loss
        total = loss.sum()
        if self.axis_name is not None:
            total *= jax.lax.psum(1, self.axis_name)  # type: ignore[no-untyped-call]
        return total

    def normalizers(
        self, labels: ArrayLike, *, where: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """What a batch with these labels divides its means by; add them up over micro-batches.

        Returns:
            Total class weight and number of examples, () each; of all devices with ``axis_name``.
        """
        totals = self._count(labels, self.class_weight, Options(self.axis, where))
        if self.axis_name is not None:
            totals = jax.lax.psum(totals, self.axis_name)  # type: ignore[no-untyped-call]
        return totals


def _plain(value: Any) -> Any:
    """Arrays as lists and numbers, which ``eval`` reads; tracers as they are."""
    concrete = isinstance(value, np.ndarray | Array) and not isinstance(value, jax.core.Tracer)
    return value.tolist() if concrete else value


class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    Args:
        class_counts: training examples of each class (C,), in label order, at least 1 each.
        axis: the class axis of the logits.
        reduction: ``"mean"``, ``"batch_mean"``, ``"sum"`` or ``"none"``, see the reference.
        axis_name: the mapped axis (of ``shard_map``, ``pmap`` or ``vmap``) that the batch is split
            over: ``jax.lax.pmean`` of the losses, and of their gradients, is then that of the whole
            batch. Not needed under ``jit`` with sharded arrays.

    >>> import jax.numpy as jnp
    >>> loss = LMFLoss([90, 10])
    >>> loss(jnp.array([[2.0, 0.0], [0.5, 1.0]]), jnp.array([0, 1])).round(4)
    Array(0.6874, dtype=float32)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = "margin",
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
        axis_name: Any = None,
    ) -> None:
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        self._set(parameters, axis, reduction, axis_name)


class LDAMLoss(LDAMConstructors, _Loss):
    """``ldam_loss`` with margins and class weights from class counts; arguments as ``LMFLoss``.

    >>> import jax.numpy as jnp
    >>> LDAMLoss([90, 10], scale=1.0)(jnp.zeros((1, 2)), jnp.array([1])).round(4)
    Array(0.9741, dtype=float32)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
        axis_name: Any = None,
    ) -> None:
        numbers = Numbers(scale=scale, label_smoothing=label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        self._set(parameters, axis, reduction, axis_name)


class FocalLoss(FocalConstructors, _Loss):
    """``focal_loss`` with class weights; only named class weights need the counts.

    >>> import jax.numpy as jnp
    >>> FocalLoss(gamma=2.0)(jnp.zeros((1, 2)), jnp.array([0])).round(4)
    Array(0.1733, dtype=float32)
    """

    def __init__(
        self,
        class_counts: Counts = None,
        *,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
        axis_name: Any = None,
    ) -> None:
        numbers = Numbers(gamma=gamma, label_smoothing=label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        self._set(parameters, axis, reduction, axis_name)


class SigmoidLMFLoss(SigmoidConstructors, _Loss):
    """``sigmoid_lmf_loss`` with margins and class weights from the counts of each label.

    Args:
        positive_counts: training examples in which the label is positive, at least 1: a number, or
            (L,) for the L labels along ``axis``.
        negative_counts: likewise; examples without an annotation belong to neither.
        class_weight: a scheme's name, computed for each label from its two counts; float (2,) or
            (L, 2), of negative and positive; or None.

    The other arguments as ``LMFLoss``.

    >>> import jax.numpy as jnp
    >>> loss = SigmoidLMFLoss(positive_counts=10, negative_counts=90)
    >>> loss(jnp.array([-2.0, 0.5]), jnp.array([0, 1])).round(4)
    Array(0.6874, dtype=float32)
    """

    _compute = staticmethod(compute_sigmoid_loss)
    _count = staticmethod(total_sigmoid_weight_and_examples)

    def __init__(
        self,
        positive_counts: Any,
        negative_counts: Any,
        *,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = "margin",
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
        axis_name: Any = None,
    ) -> None:
        counts = (positive_counts, negative_counts)
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(*counts, numbers, *others)
        self._set(parameters, axis, reduction, axis_name)


def stack_losses(losses: Sequence[_Loss]) -> Any:
    """One batched loss from several, over which ``jax.vmap`` runs: many trainings in one program.

    Each has the value and the gradients that it has by itself; ``jax.tree.map`` would refuse losses
    of different kinds, or of which only some have class weights.

    Args:
        losses: K losses, of any kinds and values, but with the same number of classes, ``axis``,
            ``reduction`` and ``axis_name``; sigmoid losses with none but their own kind.

    Returns:
        ``LMFLoss`` whose vectors are (K, C), or ``SigmoidLMFLoss`` whose are (K, 2) or (K, L, 2),
        and numbers (K,). Class weights of None become ones, margins and logit adjustments of None
        zeros, unless no loss has any.

    Raises:
        ValueError: losses that do not go together, or none.
        TypeError: what is no loss of this package.

    >>> import jax.numpy as jnp
    >>> losses = stack_losses([LMFLoss([90, 10], scale=1.0), FocalLoss(gamma=2.0)])
    >>> each = jax.vmap(lambda loss: loss(jnp.array([[0.5, 1.0]]), jnp.array([0])))(losses)
    >>> [round(loss, 4) for loss in each.tolist()]
    [1.883, 0.3774]
    """
    losses = list(losses)
    if not losses:
        raise ValueError("losses must hold at least one loss, got none")
    for loss in losses:
        _check_together(losses[0], loss)
    kind = SigmoidLMFLoss if isinstance(losses[0], SigmoidLMFLoss) else LMFLoss
    sizes = {size for loss in losses for size in _sizes(loss)}
    if len(sizes) > 1:
        what = "labels" if kind is SigmoidLMFLoss else "classes"
        raise ValueError(
            f"losses must have the same number of {what}, "
            f"got {' and '.join(map(str, sorted(sizes)))}; stack those that agree"
        )
    static = {name: getattr(losses[0], name) for name in _STATIC}
    leaves = {name: _stacked([getattr(loss, name) for loss in losses], name) for name in _LEAVES}
    return kind._of(leaves | static)


def _check_together(first: _Loss, loss: Any) -> None:
    if not isinstance(loss, _Loss):
        raise TypeError(f"losses must be losses of lmf_multi.jax, got {loss!r}")
    if isinstance(loss, SigmoidLMFLoss) != isinstance(first, SigmoidLMFLoss):
        raise ValueError(
            f"losses must all be sigmoid losses or none, got {type(first).__name__} and "
            f"{type(loss).__name__}; stack each kind for itself"
        )
    for name in _STATIC:
        one, other = getattr(first, name), getattr(loss, name)
        if other != one:
            raise ValueError(
                f"losses must have the same {name}, got {one!r} and {other!r}; "
                "stack those that agree"
            )
    for name in Numbers._fields:
        if shape := np.shape(getattr(loss, name)):
            raise ValueError(
                f"losses must not be stacked yet, got {name} of shape {shape}; "
                "stack all of them at once"
            )


def _sizes(loss: _Loss) -> list[int]:
    """The number of classes, or of labels in the sigmoid form, as each vector has it."""
    of_both = {"margins": 1, "class_weight": 1} if isinstance(loss, SigmoidLMFLoss) else {}
    shapes = {name: np.shape(getattr(loss, name)) for name in Vectors._fields}
    given = [shape[: len(shape) - of_both.get(name, 0)] for name, shape in shapes.items()]
    return [shape[0] for shape in given if shape]


def _stacked(values: list[Any], name: str) -> Any:
    """A leaf of all losses (K, …), or None where no loss has it; some may be tracers."""
    given = [np.shape(value) for value in values if value is not None]
    if not given:
        return None
    shape, dtype = max(given, key=len), jnp.result_type(float)
    missing = 1.0 if name == "class_weight" else 0.0
    arrays = [jnp.asarray(missing if value is None else value, dtype) for value in values]
    return jnp.stack([jnp.broadcast_to(array, shape) for array in arrays])
