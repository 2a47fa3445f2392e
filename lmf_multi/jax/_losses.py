"""The losses as pytrees: arrays from class counts, remembered for ``lmf_loss``."""

from dataclasses import dataclass, fields
from typing import Any, Self

import jax
from jax import Array
from jax.typing import ArrayLike

from lmf_multi._constructors import (
    FocalConstructors,
    LDAMConstructors,
    LMFConstructors,
    Parameters,
    focal_parameters,
    ldam_parameters,
    lmf_parameters,
)
from lmf_multi.jax._functional import compute_loss
from lmf_multi.spec import (
    Counts,
    Reduction,
    Weights,
    check_reduction,
)

_STATIC = ("axis", "reduction")


@dataclass(frozen=True, eq=False)
class _Loss:
    """A pytree: arrays and hyper-parameters are leaves, ``axis`` and ``reduction`` are static.

    One jitted function thus serves new values without a recompile, and ``jax.vmap`` runs over
    losses stacked with ``jax.tree.map``. ``replace`` gives a copy with other leaves.
    """

    margins: Any
    class_weight: Any
    alpha: Any
    beta: Any
    gamma: Any
    scale: Any
    label_smoothing: Any
    axis: int
    reduction: Reduction

    def __init_subclass__(cls) -> None:
        leaves = [field.name for field in fields(_Loss) if field.name not in _STATIC]
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda loss: (
                [(jax.tree_util.GetAttrKey(name), getattr(loss, name)) for name in leaves],
                tuple(getattr(loss, name) for name in _STATIC),
            ),
            lambda static, children: cls._of(
                dict(zip((*leaves, *_STATIC), (*children, *static), strict=True))
            ),
        )

    def _set(self, parameters: Parameters, axis: int, reduction: Reduction) -> None:
        check_reduction(reduction)
        object.__setattr__(self, "axis", axis)
        object.__setattr__(self, "reduction", reduction)
        for field in fields(_Loss):
            if field.name not in _STATIC:
                object.__setattr__(self, field.name, getattr(parameters, field.name))

    @classmethod
    def _of(cls, attributes: dict[str, Any]) -> Self:
        """A loss with these attributes, which inside JAX may be anything and are not checked."""
        loss = object.__new__(cls)
        for name, value in attributes.items():
            object.__setattr__(loss, name, value)
        return loss

    def replace(self, **changes: Any) -> Self:
        """A copy in which the named attributes have other values.

        Raises:
            TypeError: a name is no attribute of the loss.
        """
        attributes = {field.name: getattr(self, field.name) for field in fields(_Loss)}
        for name in changes:
            if name not in attributes:
                raise TypeError(
                    f"replace takes {', '.join(attributes)}, got {name!r}; "
                    "build a new loss for other class counts"
                )
        return self._of(attributes | changes)

    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
    ) -> Array:
        """The loss of logits (..., C) and labels, as :func:`lmf_loss` takes them, reduced."""
        loss = compute_loss(
            logits,
            labels,
            self.margins,
            self.class_weight,
            self.alpha,
            self.beta,
            self.gamma,
            self.scale,
            self.label_smoothing,
            axis=self.axis,
            where=where,
            reduction=self.reduction,
        )
        return loss if self.reduction == "none" else loss.sum()


class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    Args:
        class_counts: training examples of each class (C,), in label order, at least 1 each.
        axis: the class axis of the logits.
        reduction: ``"mean"``, ``"batch_mean"``, ``"sum"`` or ``"none"``, see the reference.

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
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = lmf_parameters(
            class_counts, alpha, beta, gamma, max_margin, scale, class_weight, label_smoothing
        )
        self._set(parameters, axis, reduction)


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
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = ldam_parameters(class_counts, max_margin, scale, class_weight, label_smoothing)
        self._set(parameters, axis, reduction)


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
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        parameters = focal_parameters(
            class_counts, gamma, max_margin, class_weight, label_smoothing
        )
        self._set(parameters, axis, reduction)
