"""The parameters of the loss: every check, and margins and weights from class counts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Shape = tuple[int | None, ...]
Reduction = Literal["none", "sum", "mean", "batch_mean"]

# What users hold: lists, tuples, arrays and tensors of every framework; mappings of counts.
Counts = Any
Weights = Any

REDUCTIONS = ("none", "sum", "mean", "batch_mean")
SCHEMES = ("margin", "complement", "balanced", "effective")
_COMPUTED_BY = {
    "margins": "class_margins",
    "class_weight": "class_weights",
    "logit_adjustment": "log_priors",
}
# How far mixing labels in half precision may round beyond 0 or 1.
PROBABILITY_SLACK = 0.01
LOGIT_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Of numbers, and of arrays inside a compiler.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha": ("at least 0", lambda value: value >= 0),
    "beta": ("at least 0", lambda value: value >= 0),
    "gamma": ("at least 0", lambda value: value >= 0),
    "max_margin": ("positive", lambda value: value > 0),
    "scale": ("positive", lambda value: value > 0),
    "label_smoothing": ("between 0 and 1", lambda value: (value >= 0) & (value <= 1)),
    "logit_adjustment": ("a number", lambda value: value == value),
    "tau": ("a number", lambda value: value == value),
    "effective_beta": ("at least 0 and less than 1", lambda value: (value >= 0) & (value < 1)),
}


@dataclass(frozen=True)
class LMFSpec:
    r"""The Large Margin aware Focal loss for one training set: checked once, never changed.

    The defaults are the published configuration, in which the margins are the class weights too.

    Args:
        class_counts: training examples of each class, at least 1 each, in label order: a list, a
            tuple, a 1-D array or tensor of any framework, or a mapping from class to count, such
            as a ``Counter`` or what pandas' ``value_counts`` returns.
        alpha: share of the LDAM term, at least 0.
        beta: share of the focal term, at least 0.
        gamma: focusing exponent, at least 0; 0 turns the focal term into cross-entropy.
        max_margin: margin of the rarest class, in logit units, before scaling.
        scale: factor on the logits inside the LDAM term; 30 was made for cosine logits.
        class_weight: ``"margin"`` (published), ``"complement"``, ``"balanced"``, ``"effective"``,
            one number for each class, or None.
        label_smoothing: share of every target that is spread evenly over the classes, in [0, 1].
        logit_adjustment: τ; τ log π_j, with π_j the share of class j in the counts, is added to the
            logits before both terms. The model's own logits are then those of a decision in which
            every class counts alike (τ = 1). 0 leaves it out, as published.

    Raises:
        ValueError: a value breaks its rule.
        TypeError: a value is not of the right kind.

    Source: Sadi et al., LMFLOSS, arXiv 2212.12741; logit adjustment: Menon et al., arXiv
    2007.07314. With alpha 0, gamma 0, no class weights and logit_adjustment 1 the loss is balanced
    softmax (Ren et al., arXiv 2007.10740).

    >>> spec = LMFSpec([625, 16, 1])
    >>> spec.margins
    array([0.1 , 0.25, 0.5 ])
    >>> spec.num_classes
    3
    >>> LMFSpec({0: 625, 1: 16, 2: 1}) == spec
    True
    """

    class_counts: Counts
    _: KW_ONLY
    alpha: float = 1.5
    beta: float = 1.0
    gamma: float = 1.5
    max_margin: float = 0.5
    scale: float = 30.0
    class_weight: Weights = "margin"
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name in RULES):
            check_parameters(**{name: getattr(self, name)})
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "class_counts", as_counts(self.class_counts))
        weights = class_weights(self.class_counts, self.class_weight, max_margin=self.max_margin)
        if self.class_weight is not None and not isinstance(self.class_weight, str):
            object.__setattr__(self, "class_weight", tuple(weights.tolist()))

    @classmethod
    def recommended(cls, class_counts: Counts) -> Self:
        """What this package's study recommends: margins on adjusted logits, without class weights.

        LDAM alone with scale 1 on logits adjusted by τ = 1, for ``from_spec`` of every framework's
        ``LMFLoss``; ``dataclasses.replace`` changes a number of it. Tune the decision's τ by
        ``tune_adjustment``, whatever the loss.

        Evidence: of 13 losses, each with 24 random settings, for linear heads on frozen features
        (20 seeds), it had the best validation macro-F1 of three datasets together. Its test
        macro-F1 less cross-entropy's, τ tuned for both, with 95 % intervals over seeds and images:

        - HAM10000: +0.020 (-0.003 to +0.046)
        - blood cells, 100 to 1: +0.010 (-0.001 to +0.022)
        - breast ultrasound, 3 to 1: +0.022 (+0.000 to +0.048)
        - their mean: +0.018 (+0.006 to +0.030)

        Less that of adjusted logits without margins the mean is +0.002 (-0.006 to +0.011), and of
        a CNN from scratch on the blood cells -0.006 (-0.017 to +0.003): the gain is the
        adjustment's. From scratch neither gains clearly on any of the three once τ is tuned.
        docs/choose-a-loss.md has all of it.

        Args:
            class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.

        Raises:
            ValueError: a count breaks its rule.
            TypeError: counts that are no numbers.

        >>> LMFSpec.recommended([90, 10]).adjustments.round(3)
        array([-0.105, -2.303])
        """
        return cls(
            class_counts,
            alpha=1.0,
            beta=0.0,
            scale=1.0,
            class_weight=None,
            logit_adjustment=1.0,
        )

    def __repr__(self) -> str:
        arguments = (f"{field.name}={short(getattr(self, field.name))}" for field in fields(self))
        return f"LMFSpec({', '.join(arguments)})"

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_counts)

    @cached_property
    def margins(self) -> Floats:
        """float64 (C,), logit units before scaling; read-only."""
        return _frozen(class_margins(self.class_counts, self.max_margin))

    @cached_property
    def weights(self) -> Floats:
        """float64 (C,), all ones for ``class_weight=None``; read-only."""
        w = class_weights(self.class_counts, self.class_weight, max_margin=self.max_margin)
        return _frozen(w)

    @cached_property
    def adjustments(self) -> Floats:
        """float64 (C,), nats, what is added to the logits: τ log π; read-only."""
        return _frozen(self.logit_adjustment * log_priors(self.class_counts))


def class_margins(class_counts: Counts, max_margin: float = 0.5) -> Floats:
    r"""LDAM margins: the rarer the class, the wider.

    .. math:: \Delta_j = \mathrm{max\_margin}\,(\min_k n_k / n_j)^{1/4}

    Args:
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        max_margin: margin of the rarest class, in logit units, positive.

    Returns:
        float64 (C,), logit units, before scaling.

    Raises:
        ValueError: a count is below 1, or max_margin is not positive.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
    arXiv 1906.07413, equation 13.

    >>> class_margins([10000, 625, 1])
    array([0.05, 0.1 , 0.5 ])
    """
    check_parameters(max_margin=max_margin)
    n: Floats = np.array(as_counts(class_counts), np.float64)
    margins: Floats = max_margin * (n.min() / n) ** 0.25
    return margins


def log_priors(class_counts: Counts) -> Floats:
    r"""Logarithms of the classes' shares, which logit adjustment adds to logits, times τ.

    .. math:: \log \pi_j = \log \left(n_j / \textstyle\sum_k n_k\right)

    Args:
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.

    Returns:
        float64 (C,), nats.

    Raises:
        ValueError: a count is below 1.

    Source: Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314.

    >>> log_priors([90, 10]).round(4)
    array([-0.1054, -2.3026])
    """
    n: Floats = np.array(as_counts(class_counts), np.float64)
    priors: Floats = np.log(n / n.sum())
    return priors


def class_weights(
    class_counts: Counts,
    scheme: Weights,
    *,
    max_margin: float = 0.5,
    effective_beta: float = 0.9999,
) -> Floats:
    """A weight for each class, from the class counts.

    ========== ====================================================================
    margin     the margins themselves, as published for LMF
    complement (1 - n_j / sum(n)) / (C - 1), the LMF paper's BWCCE baseline
    balanced   sum(n) / (C n_j), as scikit-learn
    effective  (1 - b) / (1 - b^n_j), b = ``effective_beta``, scaled to sum to C
    an array   as given: (C,), finite, at least 0, not all 0
    None       all ones
    ========== ====================================================================

    Args:
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        scheme: a name from the table, an array, or None.
        max_margin: for ``"margin"``, the margin of the rarest class.
        effective_beta: for ``"effective"``, in [0, 1).

    Returns:
        float64 (C,).

    Raises:
        ValueError: an unknown name, or a value that breaks its rule.

    Source: Sadi et al., arXiv 2212.12741 (margin, complement); Cui et al., Class-Balanced Loss
    Based on Effective Number of Samples, arXiv 1901.05555, equation 2 (effective).

    >>> class_weights([6, 3, 1], "complement")
    array([0.2 , 0.35, 0.45])
    """
    check_parameters(max_margin=max_margin, effective_beta=effective_beta)
    counts = as_counts(class_counts)
    n: Floats = np.array(counts, np.float64)
    w: Floats
    if scheme is None:
        w = np.ones(len(n))
    elif not isinstance(scheme, str):
        w = _as_weights(scheme, len(n))
    elif scheme == "margin":
        w = class_margins(counts, max_margin)
    elif scheme == "complement":
        w = (1 - n / n.sum()) / (len(n) - 1)
    elif scheme == "balanced":
        w = n.sum() / (len(n) * n)
    elif scheme == "effective":
        # 1 - b^n without the cancellation that b close to 1 would bring
        inverse = np.ones(len(n))
        if effective_beta > 0:
            inverse = -1 / np.expm1(n * math.log(effective_beta))
        w = inverse * (len(n) / inverse.sum())
    else:
        raise ValueError(
            f"class_weight must be one of {', '.join(SCHEMES)}, an array or None, got {scheme!r}"
        )
    return w


def focal_weights(
    class_counts: Counts, class_weight: Weights, max_margin: float, logit_adjustment: float
) -> Floats | None:
    """Class weights where the named schemes and logit adjustment take the counts, and need them."""
    named = isinstance(class_weight, str)
    if class_counts is not None and not named and not logit_adjustment:
        raise ValueError(
            "class_counts has no effect without a named class_weight or logit_adjustment, "
            f"got class_counts={short(class_counts)} and class_weight={short(class_weight)}; "
            "pass numbers as class_weight=[...], or name a scheme, as class_weight='balanced'"
        )
    if class_counts is None and logit_adjustment:
        raise ValueError(
            "logit_adjustment is computed from class counts, "
            f"got class_counts=None and logit_adjustment={logit_adjustment}; pass class_counts"
        )
    if class_weight is None:
        return None
    if class_counts is not None:
        return class_weights(class_counts, class_weight, max_margin=max_margin)
    if named:
        raise ValueError(
            f"class_weight {class_weight!r} is computed from class counts, got class_counts=None; "
            "pass class_counts, or as an array what lmf_multi.class_weights computes"
        )
    return _as_weights(class_weight, None)


def class_counts(
    labels: Any, num_classes: int | None = None, *, ignore_index: int | None = None
) -> NDArray[np.int64]:
    """Count the examples (or pixels) of each class.

    Args:
        labels: integers of any shape, each in [0, C); an array or tensor of any framework.
        num_classes: C, for a class without examples to count 0; default: largest label + 1.
        ignore_index: a label that is not counted.

    Returns:
        int64 (C,).

    Raises:
        ValueError: a label outside [0, C), or no label from which C could be told.
        TypeError: labels that are not integers.

    >>> class_counts([0, 2, 2, -100], num_classes=4, ignore_index=-100)
    array([1, 0, 2, 0])
    """
    ignore_index = check_ignored("ignore_index", ignore_index, or_none=True)
    if num_classes is not None and (num_classes != int(num_classes) or num_classes < 1):
        raise ValueError(f"num_classes must be a positive whole number, got {num_classes}")
    y = as_numpy(labels)
    if y.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {y.dtype}; take argmax of one-hot labels")
    y = y.ravel()
    if ignore_index is not None:
        y = y[y != ignore_index]
    if num_classes is None:
        if y.size == 0:
            raise ValueError("labels must not be empty, got none; pass num_classes")
        num_classes = int(y.max()) + 1
    if y.size:
        check_label_range(int(y.min()), int(y.max()), num_classes, "ignore_index")
    return np.bincount(y.astype(np.int64), minlength=num_classes)  # which refuses uint64


# --- checks, for every framework: numbers, shapes as tuples and dtypes as names, so that a check
# --- costs nothing under a compiler


def check_parameters(**parameters: Any) -> None:
    """Refuse a hyper-parameter that is no number or breaks its rule."""
    for name, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        rule, holds = RULES[name]
        if not -math.inf < value < math.inf:  # comparisons trace under torch.compile
            raise ValueError(f"{name} must be finite, got {value}")
        if not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value}")


def check_reduction(reduction: str | None, allowed: tuple[str | None, ...] = REDUCTIONS) -> None:
    """Refuse an unknown reduction."""
    if reduction not in allowed:
        names = ", ".join(str(name) for name in allowed)
        raise ValueError(f"reduction must be one of {names}, got {reduction!r}")


def check_ignored(name: str, value: Any, or_none: bool = False) -> Any:
    """Refuse what is no label to ignore; a label of NumPy's becomes Python's."""
    if value is None and or_none:
        return None
    if not _is_whole(value):
        none = "None" if or_none else "a label that does not occur, as -100,"
        raise TypeError(
            f"{name} must be a whole number, got {value!r}; pass {none} to ignore no label"
        )
    return int(value) if isinstance(value, np.integer) else value


def check_whole(smallest: int, remedy: str = "", **numbers: Any) -> None:
    """Refuse a size, say, that is no whole number, or smaller."""
    for name, value in numbers.items():
        if not _is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}{remedy}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_vectors(look: bool = True, **vectors: Any) -> None:
    """Refuse names, as functions have no class counts, and numbers that break their rule.

    Numbers are looked at by themselves, in lists and in NumPy arrays alone: a look at a tensor may
    wait for its device or break a trace. Without a ``look`` they are not, either.
    """
    for name, value in vectors.items():
        if isinstance(value, str):
            raise TypeError(
                f"{name} must be an array (C,) in functions, got {value!r}; "
                f"compute it with lmf_multi.{_COMPUTED_BY[name]} or use LMFLoss"
            )
        if not look or not isinstance(value, (list, tuple, np.ndarray, float, int)):
            continue
        if isinstance(value, (list, tuple)) and _are_positive(value):
            continue  # as nearly always, and much faster to see
        if _is_on_host(value):
            numbers = as_numpy(value)
            if numbers.dtype.kind not in "iuf":
                raise TypeError(f"{name} must be numbers, got {short(value)}")
            _check_numbers(name, numbers)


def _are_positive(values: list[Any] | tuple[Any, ...]) -> bool:
    return len(values) > 0 and all(type(x) is float and 0 < x < math.inf for x in values)


def _is_on_host(values: Any) -> bool:
    """Whether these are of Python or NumPy, and none of them is a tensor."""
    if isinstance(values, (list, tuple)):
        return all(map(_is_on_host, values))
    return isinstance(values, (np.ndarray, np.generic)) or not hasattr(values, "dtype")


def _check_numbers(name: str, values: NDArray[Any]) -> None:
    """Refuse what is not finite, and class weights that are negative, or all of them 0."""
    lowest = 0.0 if name == "class_weight" else -math.inf
    smallest, largest = (values.min(), values.max()) if values.size else (1, 1)
    if not (smallest >= lowest and smallest > -math.inf and largest < math.inf):  # NaN is neither
        place = np.argwhere(~(np.isfinite(values) & (values >= lowest)))[0].tolist()
        *label, j = place or [None]
        raise ValueError(
            f"{name} must be finite{' and at least 0' if lowest == 0 else ''}, "
            f"got {values[tuple(place)]}{'' if j is None else f' for class {j}'}"
            f"{f' of label {label[0]}' if label else ''}"
        )
    if lowest == largest:
        raise ValueError(f"{name} must be positive for at least one class, got all 0")


def check_inputs(
    logits: tuple[Shape, Any],
    labels: tuple[Shape, Any],
    axis: int,
    vectors: Mapping[str, Shape | None],
    where: tuple[Shape, Any] | None = None,
    axis_is_given: bool = True,
) -> bool:
    """Check shapes and dtypes of one call; tell whether the labels are distributions.

    Args:
        logits: shape and dtype of the logits; a None in a shape is a size not known yet.
        labels: shape and dtype of the labels.
        axis: the class axis of the logits.
        vectors: shapes of the per-class arrays by their names, None for an absent one.
        where: shape and dtype of the mask over examples, if there is one.
        axis_is_given: whether the caller's function or class has an argument ``axis``.

    Returns:
        True for distributions of the logits' shape, False for integer labels.
    """
    shape, dtype = logits[0], _dtype_name(logits[1])
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be one of {', '.join(LOGIT_DTYPES)}, got {dtype}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"logits must have the class axis {axis}, got shape {shape}")
    num_classes = shape[axis]
    if num_classes is not None and num_classes < 2:
        raise ValueError(
            f"logits must have at least 2 classes along axis {axis}, got shape {shape}; "
            "give a binary problem two logits"
        )
    for name, vector in vectors.items():
        if vector is not None and not _agree(vector, (num_classes,)):
            fitting = [j for j, size in enumerate(shape) if (size,) == vector]
            remedy = _other_axis(shape, axis, fitting, axis_is_given)
            raise ValueError(
                f"{name} must have shape ({num_classes},), one number for each class of the "
                f"logits {shape}, got {vector}{remedy or '; check class_counts'}"
            )
    kind = _dtype_name(labels[1])
    distribution = _check_labels(labels[0], kind, shape, axis, axis_is_given)
    check_mask(where, _without(shape, axis))
    return distribution


def described(array: Any) -> Any:
    """Shape and dtype of an array of any framework, as the checks take them; None of None."""
    return None if array is None else (tuple(array.shape), array.dtype)


def shapes_of(
    margins: Any, class_weight: Any, logit_adjustment: Any = None
) -> dict[str, Shape | None]:
    """Shapes of the vectors by their names, as the checks take them."""
    vectors = (margins, class_weight, logit_adjustment)
    shapes = (None if v is None else tuple(v.shape) for v in vectors)
    return dict(zip(_COMPUTED_BY, shapes, strict=True))


def check_mask(
    where: tuple[Shape, Any] | None, examples: Shape, what: str = "one value for each example"
) -> None:
    """Refuse a mask that is not boolean or has another shape."""
    if where is None:
        return
    if _dtype_name(where[1]) != "bool":
        raise TypeError(f"where must be bool, got {_dtype_name(where[1])}; use mask != 0")
    if not _agree(where[0], examples):
        remedy = _squeezed("where", where[0], examples)
        raise ValueError(f"where must have shape {examples}, {what}, got {where[0]}{remedy}")


def _check_labels(labels: Shape, dtype: str, logits: Shape, axis: int, axis_is_given: bool) -> bool:
    soft, examples = dtype in LOGIT_DTYPES, _without(logits, axis)
    if not soft and not dtype.startswith(("int", "uint")):
        raise TypeError(f"labels must be integers or distributions in floating point, got {dtype}")
    if _agree(labels, logits if soft else examples):
        return soft
    fitting = [j for j in range(len(logits)) if _agree(labels, _without(logits, j))]
    remedy = _squeezed("labels", labels, examples)
    remedy = remedy or _other_axis(logits, axis, fitting, axis_is_given)
    if soft:
        indices = remedy or _agree(labels, examples)
        cast = f"{' and' if remedy else ';'} cast class indices to integers" if indices else ""
        raise ValueError(
            f"floating labels are distributions and must have the logits' shape {logits}, "
            f"got {labels}{remedy}{cast}"
        )
    if not remedy and _agree(labels, logits):
        remedy = "; cast one-hot labels to floating point"
    raise ValueError(
        f"integer labels must have shape {examples}, the logits' without the class axis, "
        f"got {labels}{remedy}"
    )


def _other_axis(
    shape: Shape, axis: int, fitting: list[int], axis_is_given: bool, what: str = "class"
) -> str:
    """The remedy where another usual axis for classes, the last or 1, is ``fitting``, or ""."""
    for j in (len(shape) - 1, 1):
        # an axis of two that fits may as well be the batch
        if len(shape) > 2 and j != axis % len(shape) and j in fitting:
            call = f"axis={j}" if axis_is_given else f"logits.movedim({j}, {axis})"
            return f"; the {what} axis is {axis}, not {j}: pass {call}"
    return ""


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis:][1:]


def _squeezed(name: str, shape: Shape, expected: Shape) -> str:
    """The remedy where an axis of size 1 too many is all that is wrong, or ""."""
    for j, size in enumerate(shape):
        if size == 1 and _agree(_without(shape, j), expected):
            return f"; remove the axis of size 1 with {name}.squeeze({j})"
    return ""


def check_sigmoid_inputs(
    logits: tuple[Shape, Any],
    labels: tuple[Shape, Any],
    axis: int,
    vectors: Mapping[str, Shape | None],
    where: tuple[Shape, Any] | None = None,
    axis_is_given: bool = True,
) -> bool:
    """As ``check_inputs``, for the sigmoid form: labels, mask and loss have the logits' shape.

    Args:
        axis: the label axis of the logits, for per-label arrays (L, 2).
        vectors: shapes of the arrays over negative and positive, None for an absent one; that of
            logit_adjustment is () or (L,).

    Returns:
        True for labels in floating point, False for booleans and integers.
    """
    shape, dtype = logits[0], _dtype_name(logits[1])
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be one of {', '.join(LOGIT_DTYPES)}, got {dtype}")
    for name, vector in vectors.items():
        is_added = name == "logit_adjustment"  # to the logit, which negative and positive share
        each, what = ((), "one number for") if is_added else ((2,), "negative and positive of")
        if vector is None or _agree(vector, each):
            continue
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"logits must have the label axis {axis}, got shape {shape}")
        if not _agree(vector, (shape[axis], *each)):
            fitting = [j for j, size in enumerate(shape) if (size, *each) == vector]
            remedy = _other_axis(shape, axis, fitting, axis_is_given, "label")
            raise ValueError(
                f"{name} must have shape {each} or {(shape[axis], *each)}, {what} each "
                f"label of the logits {shape}, got {vector}{remedy or '; check positive_counts'}"
            )
    kind = _dtype_name(labels[1])
    soft = kind in LOGIT_DTYPES
    if not soft and not kind.startswith(("bool", "int", "uint")):
        raise TypeError(f"labels must be 0 and 1, bool or probabilities, got {kind}")
    if not _agree(labels[0], shape):
        remedy = _squeezed("labels", labels[0], shape)
        for j, size in enumerate(shape):
            if size == 1 and _agree(labels[0], _without(shape, j)):
                remedy = f"; add the axis of size 1 with labels[{':, ' * j}None]"
        raise ValueError(f"labels must have the logits' shape {shape}, got {labels[0]}{remedy}")
    check_mask(where, shape, "the logits' shape")
    return soft


def check_probability_range(smallest: float, largest: float, mask: str) -> None:
    """Refuse labels of the sigmoid form outside [0, 1]; NaN is left to spoil its own loss."""
    if smallest < -PROBABILITY_SLACK or largest > 1 + PROBABILITY_SLACK:
        got = smallest if smallest < -PROBABILITY_SLACK else largest
        remedy = _masking(mask, int(got)) if float(got).is_integer() else mask
        raise ValueError(
            f"labels must be in [0, 1], got {got:g}; mask labels that were not annotated "
            f"with {remedy}"
        )


def check_label_range(smallest: int, largest: int, num_classes: int, mask: str) -> None:
    """Refuse labels outside [0, C); the bounds are those of the labels that are not masked."""
    if smallest < 0 or largest >= num_classes:
        got = smallest if smallest < 0 else largest
        from_1 = ", or subtract 1 if labels begin at 1" if got == num_classes else ""
        raise ValueError(
            f"labels must be in [0, {num_classes}), got {got}; mask examples without a class "
            f"with {_masking(mask, got)}{from_1}"
        )


def _masking(mask: str, label: int) -> str:
    """How a caller masks this label: ``mask`` names the argument, and perhaps its value now."""
    if "=" in mask:  # whose labels are at most int64's
        return f"{mask}, or pass ignore_index={label}" if label < 2**63 else mask
    return f"where=labels != {label}" if mask == "where" else f"{mask}={label}"


def _agree(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        size is None or other is None or size == other
        for size, other in zip(shape, expected, strict=True)
    )


def _dtype_name(dtype: Any) -> str:
    """``torch.float32``, ``dtype('float32')`` and ``<dtype: 'float32'>`` are float32."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def as_numpy(values: Any) -> NDArray[Any]:
    """An array of numbers in any form that users hold them."""
    if hasattr(values, "detach"):  # a PyTorch tensor, perhaps on a GPU
        if values.is_meta:
            raise ValueError(
                "a tensor on the meta device holds no numbers, "
                f"got shape {tuple(values.shape)}; pass a list"
            )
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    array = np.asarray(values)
    if array.dtype.kind == "V" and array.dtype.name == "bfloat16":
        array = array.astype(np.float64)
    return array


def short(value: Any) -> str:
    """``repr``, but of more than 20 numbers the first and last three, as NumPy prints many."""
    if not isinstance(value, (list, tuple)):
        return repr(value)
    shown = [*map(short, value if len(value) <= 20 else [*value[:3], *value[-3:]])]
    if len(value) > 20:
        shown.insert(3, "...")
    if isinstance(value, list):
        return f"[{', '.join(shown)}]"
    return f"({', '.join(shown)}{',' * (len(value) == 1)})"


def _frozen(values: Floats) -> Floats:
    values.setflags(write=False)
    return values


def as_counts(class_counts: Counts) -> tuple[int, ...]:
    """Class counts in any form that ``LMFSpec`` takes, checked."""
    if isinstance(class_counts, LMFSpec):
        raise TypeError("class_counts must be numbers, got an LMFSpec; pass it to from_spec")
    if hasattr(class_counts, "to_dict"):  # pandas' value_counts, in order of frequency
        class_counts = class_counts.to_dict()
    if isinstance(class_counts, Mapping):
        class_counts = _mapped_counts(class_counts)
    n = as_numpy(class_counts)
    if n.dtype.kind not in "iuf":
        raise TypeError(f"class_counts must be numbers, got {short(class_counts)}")
    if n.ndim != 1 or n.size < 2:
        raise ValueError(
            "class_counts must hold one count for each of at least 2 classes, "
            f"got shape {n.shape}; count labels with lmf_multi.class_counts"
        )
    return _whole(n, "class_counts", "class", "drop the class or merge it with another")


def as_label_counts(name: str, counts: Any) -> tuple[int, ...] | int:
    """Positives or negatives of one label (a number) or of each label (L,), checked."""
    n = as_numpy(counts)
    if n.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be numbers, got {short(counts)}")
    if n.ndim > 1 or n.size == 0:
        raise ValueError(
            f"{name} must be a number, or hold one for each label, got shape {n.shape}"
        )
    whole = _whole(n.reshape(-1), name, "label", "leave the label out of the loss")
    return whole[0] if n.ndim == 0 else whole


def _whole(n: NDArray[Any], name: str, what: str, remedy: str) -> tuple[int, ...]:
    for j, count in enumerate(n.tolist()):
        if not math.isfinite(count) or count != int(count):
            raise ValueError(
                f"{name} must be whole numbers, got {count} for {what} {j}; "
                "pass numbers of examples, not frequencies"
            )
        if count < 1:
            raise ValueError(
                f"{name} must be at least 1 for every {what}, got {int(count)} for {what} {j}; "
                f"{remedy}"
            )
    return tuple(int(count) for count in n.tolist())


def _mapped_counts(counts: Mapping[Any, Any]) -> list[Any]:
    for key in counts:
        if not _is_whole(key):
            raise TypeError(
                f"class_counts must be keyed by the integer labels, got key {key!r}; "
                "pass a list in label order"
            )
    largest = max(counts, default=-1)
    if min(counts, default=0) < 0:
        raise ValueError(
            f"class_counts must be keyed by labels from 0 on, got key {min(counts)}; drop the key"
        )
    for j in range(largest):
        if j not in counts:
            raise ValueError(
                f"class_counts must name every class from 0 to {largest}, got none for class {j}; "
                "add its count"
            )
    return [counts[j] for j in range(largest + 1)]


def _as_weights(class_weight: Weights, num_classes: int | None) -> Floats:
    w = as_numpy(class_weight)
    if w.dtype.kind not in "iuf":
        raise TypeError(f"class_weight must be numbers, a name or None, got {short(class_weight)}")
    if w.ndim != 1 or (num_classes is not None and w.size != num_classes):
        size = "C" if num_classes is None else num_classes
        raise ValueError(
            f"class_weight must have shape ({size},), one number for each class, got {w.shape}"
        )
    _check_numbers("class_weight", w)
    return w.astype(np.float64)
