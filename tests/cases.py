"""One call of a loss, the same for every framework: its inputs, its exact result, its tolerance."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lmf_multi import class_margins, class_weights, log_priors, reference
from tests.checks import assert_within

# Relative to the exact value, and to the largest entry of the exact gradient's row.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}
# Half types compute in float32 and round the gradient once: half their epsilon on each entry.
ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-14,
}
LARGEST = {"float64": np.inf, "float32": np.inf, "bfloat16": np.inf, "float16": 65504.0}
NUMBERS = {
    "lmf": ("alpha", "beta", "gamma", "scale", "label_smoothing"),
    "ldam": ("scale", "label_smoothing"),
    "focal": ("gamma", "label_smoothing"),
    "sigmoid_lmf": ("alpha", "beta", "gamma", "scale", "label_smoothing"),
}
CLASSES = {
    "lmf": "LMFLoss",
    "ldam": "LDAMLoss",
    "focal": "FocalLoss",
    "sigmoid_lmf": "SigmoidLMFLoss",
}


def loss_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def rounded(values, dtype):
    """float64 numbers that ``dtype`` represents, near the given ones."""
    if dtype == "bfloat16":  # which NumPy lacks: float32 without the lower half of its bits
        bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return np.asarray(values, dtype).astype(np.float64)


class Result(NamedTuple):
    """What a backend computed, in float64, and the dtypes in which it came."""

    value: np.ndarray
    grad: np.ndarray
    value_dtype: str
    grad_dtype: str


@dataclass(frozen=True, eq=False)
class Case:
    """Arrays are float64 NumPy, classes last; ``dtype`` is the one that the framework gets."""

    logits: np.ndarray
    labels: np.ndarray
    class_counts: tuple[int, ...]
    class_weight: Any = None  # a scheme's name, an array or None
    term: str = "lmf"
    alpha: float = 1.5
    beta: float = 1.0
    gamma: float = 1.5
    scale: float = 30.0
    max_margin: float = 0.5
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0
    where: np.ndarray | None = None
    reduction: str = "none"
    upstream: np.ndarray | None = None  # for "none": what multiplies each example's loss
    dtype: str = "float32"
    label_dtype: str = "int32"
    axis: int = -1  # where the framework's class axis is, if it can be anywhere
    as_class: bool = False  # LMFLoss(class_counts) instead of lmf_loss(…, margins)

    by_element = False  # labels, mask and loss have the logits' shape
    value_and_grad = staticmethod(reference.lmf_loss_and_grad)

    @property
    def counts(self):
        """What the class is built from; focal takes counts only where something follows of them."""
        named = isinstance(self.class_weight, str)
        if self.term == "focal" and not (named or self.logit_adjustment):
            return ()
        return (self.class_counts,)

    @property
    def soft(self):
        return self.labels.dtype.kind == "f"

    @property
    def masked(self):
        return self.where is not None

    @property
    def batch_shape(self):
        return self.logits.shape[:-1]

    @property
    def numbers(self):
        """Hyper-parameters of the function that are numbers."""
        return {name: getattr(self, name) for name in NUMBERS[self.term]}

    @property
    def options(self):
        """Arguments of the class."""
        names = (*NUMBERS[self.term], "max_margin", "class_weight", "logit_adjustment")
        return {name: getattr(self, name) for name in names}

    @property
    def shares(self):
        """What LDAM and focal count for."""
        return {"lmf": (self.alpha, self.beta), "ldam": (1.0, 0.0), "focal": (0.0, 1.0)}[self.term]

    @cached_property
    def margins(self):
        margins = class_margins(self.class_counts, self.max_margin)
        return rounded(margins, loss_dtype(self.dtype))

    @cached_property
    def weights(self):
        if self.class_weight is None:
            return None
        w = class_weights(self.class_counts, self.class_weight, max_margin=self.max_margin)
        return rounded(w, loss_dtype(self.dtype))

    @cached_property
    def adjustments(self):
        """What is added to the logits, or None."""
        if not self.logit_adjustment:
            return None
        priors = log_priors(self.class_counts)
        return rounded(self.logit_adjustment * priors, loss_dtype(self.dtype))

    @property
    def vectors(self):
        """Arrays over the classes that the function takes by position."""
        return [self.weights] if self.term == "focal" else [self.margins, self.weights]

    @cached_property
    def exact(self):
        """Value and gradient of the reference."""
        value, grad = self._reference(
            self.labels,
            *self.shares,
            where=self.where,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
        return value, grad if self.upstream is None else grad * self.upstream[..., None]

    def _reference(self, labels, alpha, beta, **options):
        numbers = {"alpha": alpha, "beta": beta, "gamma": self.gamma, "scale": self.scale}
        return self.value_and_grad(
            self.logits,
            labels,
            self.margins,
            self.weights,
            logit_adjustment=self.adjustments,
            **numbers,
            **options,
        )

    @cached_property
    def gradient_size(self):
        """Size of each gradient row (..., 1), to which its error is relative.

        Of a distribution's row it is the sum of the classes' contributions, each by its largest
        entry: contributions of opposite signs cancel, their rounding errors do not.
        """
        if not self.soft and self.label_smoothing == 0:
            return np.abs(self.exact[1]).max(-1, keepdims=True, initial=0.0)
        C, (alpha, beta) = self.logits.shape[-1], self.shares
        where = np.ones(self.batch_shape, bool) if self.where is None else self.where
        q = self.labels if self.soft else np.eye(C)[np.where(where, self.labels, 0)]
        q = np.where(where[..., None], q, 0.0)
        w = np.ones(C) if self.weights is None else self.weights
        by_weight = (q @ w).sum() or 1.0 if self.reduction == "mean" else 1.0
        by_examples = max(where.sum(), 1) if "mean" in self.reduction else 1.0
        q = (1 - self.label_smoothing) * q + self.label_smoothing / C
        size = np.zeros((*where.shape, 1))
        for j in range(C):
            options = {"where": where, "reduction": "none"}
            labels = np.full(where.shape, j)
            _, ldam = self._reference(labels, alpha / by_weight, 0.0, **options)
            _, focal = self._reference(labels, 0.0, beta / by_examples, **options)
            largest = np.abs(ldam).max(-1) + np.abs(focal).max(-1)
            size[..., 0] += q[..., j] * largest
        return size if self.upstream is None else size * np.abs(self.upstream)[..., None]

    def check(self, result):
        """Require the exact value and gradient, in the right dtypes."""
        assert result.value_dtype == loss_dtype(self.dtype), f"the loss is {result.value_dtype}"
        assert result.grad_dtype == self.dtype, f"the gradient is {result.grad_dtype}"
        (value, grad), relative = self.exact, TOLERANCES[self.dtype]
        tiny = SMALLEST_NORMAL[loss_dtype(self.dtype)]
        assert result.value.shape == value.shape
        assert_within(result.value, value, relative * np.abs(value) + tiny, f"value of {self}")
        bound = relative * self.gradient_size + ROUNDING[self.dtype] * np.abs(grad)
        tiny = SMALLEST_NORMAL[self.dtype]
        # what half precision cannot hold is infinite, with its sign
        overflows = np.abs(grad) > LARGEST[self.dtype]
        grad = np.where(overflows, np.copysign(np.inf, grad), grad)
        assert_within(result.grad, grad, bound + tiny, f"gradient of {self}")


def masked_case(rng, shape, *, dtype, axis):
    """Random logits (…, C) with weights, a fifth of the examples masked."""
    logits, labels = rng.normal(0, 3, shape), rng.integers(0, shape[-1], shape[:-1])
    counts, weights = tuple(range(1, shape[-1] + 1)), np.linspace(0.5, 2, shape[-1])
    where = rng.random(labels.shape) > 0.2
    return Case(
        rounded(logits, dtype), labels, counts, weights, where=where, dtype=dtype, axis=axis
    )


@dataclass(frozen=True, eq=False)
class SigmoidCase(Case):
    """``class_counts`` are (negative, positive), numbers or (L,) each; labels are last."""

    term: str = "sigmoid_lmf"
    by_element = True
    value_and_grad = staticmethod(reference.sigmoid_lmf_loss_and_grad)

    @property
    def counts(self):
        negative, positive = self.class_counts
        return positive, negative

    @property
    def batch_shape(self):
        return self.logits.shape

    @property
    def shares(self):
        return self.alpha, self.beta

    @cached_property
    def margins(self):
        n = np.stack(self.class_counts, -1)
        margins = [class_margins(each, self.max_margin) for each in n.reshape(-1, 2).tolist()]
        return rounded(np.reshape(margins, n.shape), loss_dtype(self.dtype))

    @cached_property
    def weights(self):
        if self.class_weight is None or not isinstance(self.class_weight, str):
            w = self.class_weight
            return w if w is None else rounded(w, loss_dtype(self.dtype))
        n, options = np.stack(self.class_counts, -1), {"max_margin": self.max_margin}
        w = [class_weights(each, self.class_weight, **options) for each in n.reshape(-1, 2)]
        return rounded(np.reshape(w, n.shape), loss_dtype(self.dtype))

    @cached_property
    def adjustments(self):
        if not self.logit_adjustment:
            return None
        negative, positive = np.array(self.class_counts, np.float64)
        odds = np.log(positive / negative)
        return rounded(self.logit_adjustment * odds, loss_dtype(self.dtype))

    @property
    def vectors(self):
        return [self.margins, self.weights]

    @cached_property
    def exact(self):
        value, grad = super().exact if self.upstream is None else replace(self, upstream=None).exact
        return value, grad if self.upstream is None else grad * self.upstream

    @cached_property
    def gradient_size(self):
        """Sizes of the contributions of both classes and terms, which cancel, by element."""
        if not self.soft and self.label_smoothing == 0:
            return np.abs(self.exact[1])
        where = np.ones(self.batch_shape, bool) if self.where is None else self.where
        t = np.where(where, self.labels, 0.0)
        w = np.ones(2) if self.weights is None else self.weights
        W = ((1 - t) * w[..., 0] + t * w[..., 1]) * where
        by_weight = W.sum() or 1.0 if self.reduction == "mean" else 1.0
        by_examples = max(where.sum(), 1) if "mean" in self.reduction else 1.0
        t = (1 - self.label_smoothing) * t + self.label_smoothing / 2
        size = np.zeros(self.batch_shape)
        for label, q in ((0, 1 - t), (1, t)):
            options = {"where": where, "reduction": "none"}
            labels = np.full(where.shape, label)
            _, ldam = self._reference(labels, self.alpha / by_weight, 0.0, **options)
            _, focal = self._reference(labels, 0.0, self.beta / by_examples, **options)
            size += q * (np.abs(ldam) + np.abs(focal))
        return size if self.upstream is None else size * np.abs(self.upstream)
