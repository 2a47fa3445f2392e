"""The losses as ``keras.losses.Loss``: arrays from class counts, remembered for ``lmf_loss``."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask  # JAX's tensors take no attribute

from lmf_multi._constructors import (
    FocalConstructors,
    LDAMConstructors,
    LMFConstructors,
    Parameters,
    SigmoidConstructors,
    arguments,
    current,
    remember,
)
from lmf_multi._terms import Numbers, Options, Vectors, numbers_of
from lmf_multi.keras._functional import (
    as_tensor,
    compute_loss,
    compute_sigmoid_loss,
    of_whole_batch,
    over_replicas,
    sparse_or_soft,
    squeeze,
)
from lmf_multi.spec import Counts, Reduction, Weights, check_ignored, check_reduction

# Keras' names, of which these are the other frameworks' "mean"; "batch_mean" is theirs.
_MEANS = ("sum_over_batch_size", "mean")
_REDUCTIONS = (*_MEANS, "batch_mean", "sum", "mean_with_sample_weight", "none", None)


class _Options(NamedTuple):
    """Keras' options, by the names that every class and its config give them."""

    from_logits: bool
    ignore_class: int | None
    axis: int
    reduction: str | None
    name: str | None
    dtype: Any


class _Loss(keras.losses.Loss):  # type: ignore[misc]  # Keras carries no types
    """Arrays, hyper-parameters and Keras' options; labels and masks are brought into form here."""

    _config: dict[str, Any]
    build: Callable[..., Parameters]
    _compute = staticmethod(compute_loss)

    def __init__(self, parameters: Parameters, options: _Options) -> None:
        check_reduction(options.reduction, _REDUCTIONS)
        ignore_class = check_ignored("ignore_class", options.ignore_class, or_none=True)
        super().__init__(name=options.name, dtype=options.dtype)
        self.reduction, self.axis = options.reduction, options.axis
        self.from_logits, self.ignore_class = options.from_logits, ignore_class
        self.margins, self.class_weight, self.logit_adjustment = parameters.vectors
        remember(self, parameters)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of labels and predictions, reduced.

        Args:
            y_true: sparse (N, …) or (N, …, 1), one-hot or soft of ``y_pred``'s shape.
            y_pred: float (N, …, C), logits, or probabilities with ``from_logits=False``.
            sample_weight: float (N, …), multiplies each example's share in the sum; the means
                divide by what they divide by without it, as Keras does.
        """
        with keras.name_scope(self.name):
            if type(self).call is _Loss.call:
                is_divided = self.reduction in _MEANS
                each, mask = self._each(y_true, y_pred, "mean" if is_divided else "none")
            else:
                is_divided = False
                each, mask = self._each_of_subclass(y_true, y_pred)
            return self._reduce(each, sample_weight, mask, is_divided)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Each example's loss (N, …), 0 for a masked one.

        A subclass may override it. What it returns is reduced as Keras reduces, so that ``"mean"``
        is then ``"batch_mean"``: a term's own denominator is for the two terms of this class.
        """
        return self._each(y_true, y_pred, "none")[0]

    def _each(self, y_true: Any, y_pred: Any, reduction: Reduction) -> tuple[Any, Any]:
        """What each example contributes to the reduced loss, and the mask."""
        z = self._logits(y_pred)
        y = self._labels(y_true, z)
        mask = self._mask(get_keras_mask(y_pred), y, z)
        vectors = Vectors(self.margins, self.class_weight, self.logit_adjustment)
        options = Options(self.axis, mask, mask_name="ignore_class", reduction=reduction)
        return self._compute(z, y, vectors, numbers_of(self), options), mask

    def _each_of_subclass(self, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        """What an overridden ``call`` makes of tensors, and the mask, with one that it sets."""
        mask, y = get_keras_mask(y_pred), as_tensor("labels", y_true)
        z = as_tensor("predictions", y_pred, self.dtype)
        if _is_float(y):  # integers stay, because half types would round class indices
            y = ops.cast(y, self.dtype)
        if mask is not None and z is not y_pred:
            set_keras_mask(z, mask)
        each = self.call(y, z)
        y = y if self.ignore_class is None else self._labels(y, z)
        masks = [m for m in (self._mask(mask, y, z), get_keras_mask(each)) if m is not None]
        if not masks:
            return each, None
        mask = reduce(ops.logical_and, [ops.cast(m, "bool") for m in masks])
        for _ in range(len(mask.shape) - len(each.shape)):  # one loss for several that may count
            mask = ops.any(mask, -1)
        mask = _like_examples(mask, each)
        return ops.where(mask, each, ops.zeros_like(each)), mask

    def _logits(self, y_pred: Any) -> Any:
        # Keras' softmax leaves its input on its output where the backend's tensors allow it: exact
        # also where a probability has underflowed
        logits = y_pred if self.from_logits else getattr(y_pred, "_keras_logits", None)
        if logits is not None:
            return as_tensor("predictions", logits, self.dtype)
        return self._logits_of(as_tensor("predictions", y_pred, self.dtype))

    def _logits_of(self, p: Any) -> Any:
        # where keeps 1 / 0 out of the gradient
        log_p = ops.log(ops.where(p == 0, ops.ones_like(p), p))
        return log_p - _infinite(p == 0, p.dtype)

    def _labels(self, y_true: Any, z: Any) -> Any:
        y = as_tensor("labels", y_true)
        is_sparse, rank = len(y.shape) != len(z.shape), len(z.shape)
        if not is_sparse and -rank <= self.axis < rank:
            size = y.shape[self.axis]
            if size is None and self.ignore_class is None:
                return sparse_or_soft(y, z, self.axis)
            is_sparse = size is None or size == 1 != z.shape[self.axis]
            y = squeeze(y, self.axis) if is_sparse else y
        if not is_sparse:
            return y if _is_float(y) else ops.cast(y, "float32")
        if _is_float(y):
            # data pipelines often hand class indices over as floats
            _check_whole(y_true)
            fraction = -1 if self.ignore_class != -1 else -2  # out of range, and not to be ignored
            y = ops.where(y == ops.floor(y), y, fraction * ops.ones_like(y))
            y = ops.cast(y, "int32")
        return y

    def _mask(self, mask: Any, y: Any, z: Any) -> Any:
        if self.ignore_class is not None:
            if len(y.shape) == len(z.shape):
                raise ValueError(
                    "ignore_class needs sparse labels, "
                    f"got labels of the predictions' shape {tuple(z.shape)}; use sample_weight"
                )
            valid = y != self.ignore_class
            mask = valid if mask is None else ops.logical_and(ops.cast(mask, "bool"), valid)
        return None if mask is None else ops.cast(mask, "bool")

    def _reduce(self, each: Any, sample_weight: Any, mask: Any, is_divided: bool) -> Any:
        """The sum, over what the reduction divides by where the contributions are not divided."""
        if sample_weight is not None:
            sample_weight = as_tensor("sample_weight", sample_weight, each.dtype)
            sample_weight = _like_examples(sample_weight, each)
            each = each * sample_weight
        if self.reduction in (None, "none"):
            return each
        total = ops.sum(each)
        if is_divided or self.reduction == "sum":
            return of_whole_batch(total)
        shares = ops.ones_like(each)
        if self.reduction == "mean_with_sample_weight" and sample_weight is not None:
            shares = shares * sample_weight
        if mask is not None:
            shares = ops.where(mask, shares, ops.zeros_like(shares))
        (divisor,) = over_replicas([ops.sum(shares)])
        return of_whole_batch(_quotient(total, divisor))

    def set_class_weight(self, class_weight: Weights) -> None:
        """Replace the class weights; a step that Keras has traced keeps the old ones.

        ``DeferredReweighting`` calls this in ``fit``, and has the steps traced anew.

        Args:
            class_weight: what the constructor takes.
        """
        parameters = self.build(current(self._config, self) | {"class_weight": class_weight})
        self.class_weight = parameters.vectors.class_weight
        self._config = parameters.config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({arguments(self.get_config())})"

    def get_config(self) -> dict[str, Any]:
        """Plain numbers, names and lists, from which ``from_config`` rebuilds the loss."""
        options = {name: getattr(self, name) for name in _Options._fields}
        return current(self._config, self) | options

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The loss that ``get_config`` describes."""
        return cls(**config)


def _quotient(total: Any, divisor: Any) -> Any:
    """0 for a divisor of 0. Keras' ``divide_no_nan`` makes float32 of float64 on PyTorch."""
    is_zero = divisor == 0
    quotient = total / ops.where(is_zero, ops.ones_like(divisor), divisor)
    return ops.where(is_zero, ops.zeros_like(quotient), quotient)


def _infinite(condition: Any, dtype: Any) -> Any:
    """Infinity where a condition holds, else 0: a constant would set off TensorFlow's alarms."""
    return 1 / ops.cast(ops.logical_not(condition), dtype) - 1


def _check_whole(labels: Any) -> None:
    """Refuse fractions where they can be looked at without waiting."""
    if isinstance(labels, np.ndarray) and not (whole := labels == np.floor(labels)).all():
        raise ValueError(
            f"sparse labels must be whole numbers, got {labels[~whole][0]}; "
            "distributions must have the predictions' shape"
        )


def _is_float(tensor: Any) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)))


def _like_examples(values: Any, each: Any) -> Any:
    """A value for each example of the batch, or for each of its pixels, in the losses' rank."""
    if len(values.shape) == len(each.shape) + 1 and values.shape[-1] in (1, None):
        values = squeeze(values, -1)
    if len(values.shape) > len(each.shape):
        raise ValueError(
            f"sample_weight must have one value for each loss, of shape {tuple(each.shape)}, "
            f"got shape {tuple(values.shape)}"
        )
    for _ in range(len(each.shape) - len(values.shape)):
        values = ops.expand_dims(values, -1)
    return values


@keras.saving.register_keras_serializable(package="lmf_multi")
class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    Args:
        class_counts: training examples of each class (C,), in label order, at least 1 each.
        from_logits: False if the model ends in a softmax; the numbers are those of its logits.
        ignore_class: examples (or pixels) with this sparse label take no part.
        axis: the class axis of the predictions.
        reduction: ``"sum_over_batch_size"`` or ``"mean"``, the other frameworks' ``"mean"``;
            ``"batch_mean"``; ``"sum"``; ``"none"`` or None; ``"mean_with_sample_weight"``, the sum
            over the total sample weight.
        name: name of the loss in logs.
        dtype: dtype of the computation, Keras' floatx by default; half types compute in float32.

    >>> loss = LMFLoss([90, 10])
    >>> value = loss(ops.array([0, 1]), ops.array([[2.0, 0.0], [0.5, 1.0]]))
    >>> ops.convert_to_numpy(value).round(4)
    np.float32(0.6874)
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
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "lmf_loss",
        dtype: Any = None,
    ) -> None:
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        options = _Options(from_logits, ignore_class, axis, reduction, name, dtype)
        super().__init__(parameters, options)


@keras.saving.register_keras_serializable(package="lmf_multi")
class LDAMLoss(LDAMConstructors, _Loss):
    """``ldam_loss`` with margins and class weights from class counts; arguments as ``LMFLoss``."""

    def __init__(
        self,
        class_counts: Counts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "ldam_loss",
        dtype: Any = None,
    ) -> None:
        numbers = Numbers(scale=scale, label_smoothing=label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        options = _Options(from_logits, ignore_class, axis, reduction, name, dtype)
        super().__init__(parameters, options)


@keras.saving.register_keras_serializable(package="lmf_multi")
class FocalLoss(FocalConstructors, _Loss):
    """``focal_loss`` with class weights; only named class weights need the counts."""

    def __init__(
        self,
        class_counts: Counts = None,
        *,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "focal_loss",
        dtype: Any = None,
    ) -> None:
        numbers = Numbers(gamma=gamma, label_smoothing=label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *others)
        options = _Options(from_logits, ignore_class, axis, reduction, name, dtype)
        super().__init__(parameters, options)


@keras.saving.register_keras_serializable(package="lmf_multi")
class SigmoidLMFLoss(SigmoidConstructors, _Loss):
    """``sigmoid_lmf_loss`` with margins and class weights from the counts of each label.

    Args:
        positive_counts: training examples in which the label is positive, at least 1: a number, or
            (L,) for the L labels along ``axis``.
        negative_counts: likewise; examples without an annotation belong to neither.
        class_weight: a scheme's name, computed for each label from its two counts; float (2,) or
            (L, 2), of negative and positive; or None.
        from_logits: False if the model ends in a sigmoid; the numbers are those of its logits.
        ignore_class: elements with this label take no part.

    The other arguments as ``LMFLoss``; an element is what an example is there.

    >>> loss = SigmoidLMFLoss(positive_counts=10, negative_counts=90)
    >>> ops.convert_to_numpy(loss(ops.array([0, 1]), ops.array([-2.0, 0.5]))).round(4)
    np.float32(0.6874)
    """

    _compute = staticmethod(compute_sigmoid_loss)

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
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "sigmoid_lmf_loss",
        dtype: Any = None,
    ) -> None:
        counts = (positive_counts, negative_counts)
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        others = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(*counts, numbers, *others)
        options = _Options(from_logits, ignore_class, axis, reduction, name, dtype)
        super().__init__(parameters, options)

    def _logits_of(self, p: Any) -> Any:
        # where keeps 1 / 0 out of the gradient
        inner = ops.where((p == 0) | (p == 1), ops.full_like(p, 0.5), p)
        log_odds = ops.log(inner) - ops.log1p(-inner)
        return log_odds + _infinite(p == 1, p.dtype) - _infinite(p == 0, p.dtype)

    def _labels(self, y_true: Any, z: Any) -> Any:
        t, rank = as_tensor("labels", y_true), len(z.shape)
        # a size that is not known yet can only be 1 here; the core looks once it is known
        if len(t.shape) == rank - 1 and z.shape[-1] in (1, None):
            t = ops.expand_dims(t, -1)
        elif len(t.shape) == rank + 1 and t.shape[-1] in (1, None):
            t = squeeze(t, -1)
        return t

    def _mask(self, mask: Any, y: Any, z: Any) -> Any:
        if mask is not None:  # of whole examples or time steps
            mask = ops.cast(mask, "bool")
            for _ in range(len(z.shape) - len(mask.shape)):
                mask = ops.expand_dims(mask, -1)
            mask = ops.logical_and(mask, ops.ones_like(z, dtype="bool"))
        if self.ignore_class is None:
            return mask
        y = ops.cast(y, "int32") if keras.backend.standardize_dtype(y.dtype) == "bool" else y
        valid = y != self.ignore_class
        return valid if mask is None else ops.logical_and(mask, valid)
