"""What every framework does to build a loss: its parameters, and other ways to build it.

``options`` are the framework's own arguments (``reduction``, ``ignore_index``, ``axis``, …).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lmf_multi.spec import (
    Counts,
    Floats,
    LMFSpec,
    Weights,
    as_counts,
    as_label_counts,
    as_numpy,
    check_parameters,
    focal_weights,
    short,
)


@dataclass(frozen=True)
class Parameters:
    """What a loss remembers for ``lmf_loss``, and the plain arguments that would build it again."""

    margins: Floats | None
    class_weight: Floats | None
    alpha: float
    beta: float
    gamma: float
    scale: float
    label_smoothing: float
    config: dict[str, Any]


def lmf_parameters(
    class_counts: Counts,
    alpha: float,
    beta: float,
    gamma: float,
    max_margin: float,
    scale: float,
    class_weight: Weights,
    label_smoothing: float,
) -> Parameters:
    """Parameters of every ``LMFLoss``."""
    spec = LMFSpec(
        class_counts,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        max_margin=max_margin,
        scale=scale,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
    )
    config = {
        "class_counts": list(spec.class_counts),
        "alpha": spec.alpha,
        "beta": spec.beta,
        "gamma": spec.gamma,
        "max_margin": spec.max_margin,
        "scale": spec.scale,
        "class_weight": _plain(spec.class_weight),
        "label_smoothing": spec.label_smoothing,
    }
    weights = None if spec.class_weight is None else spec.weights
    return Parameters(
        spec.margins,
        weights,
        spec.alpha,
        spec.beta,
        spec.gamma,
        spec.scale,
        spec.label_smoothing,
        config,
    )


def ldam_parameters(
    class_counts: Counts,
    max_margin: float,
    scale: float,
    class_weight: Weights,
    label_smoothing: float,
) -> Parameters:
    """Parameters of every ``LDAMLoss``."""
    lmf = lmf_parameters(
        class_counts, 1.0, 0.0, 0.0, max_margin, scale, class_weight, label_smoothing
    )
    of_focal = ("alpha", "beta", "gamma")
    config = {name: value for name, value in lmf.config.items() if name not in of_focal}
    return replace(lmf, config=config)


def focal_parameters(
    class_counts: Counts,
    gamma: float,
    max_margin: float,
    class_weight: Weights,
    label_smoothing: float,
) -> Parameters:
    """Parameters of every ``FocalLoss``."""
    check_parameters(gamma=gamma, max_margin=max_margin, label_smoothing=label_smoothing)
    weights = focal_weights(class_counts, class_weight, max_margin)
    config = {
        "class_counts": None if class_counts is None else list(as_counts(class_counts)),
        "gamma": float(gamma),
        "max_margin": float(max_margin),
        "class_weight": class_weight if isinstance(class_weight, str) else _plain(weights),
        "label_smoothing": float(label_smoothing),
    }
    return Parameters(None, weights, 0.0, 1.0, float(gamma), 1.0, float(label_smoothing), config)


def sigmoid_parameters(
    positive_counts: Any,
    negative_counts: Any,
    alpha: float,
    beta: float,
    gamma: float,
    max_margin: float,
    scale: float,
    class_weight: Weights,
    label_smoothing: float,
) -> Parameters:
    """Parameters of every ``SigmoidLMFLoss``: for each label those of its two classes."""
    positive = as_label_counts("positive_counts", positive_counts)
    negative = as_label_counts("negative_counts", negative_counts)
    shape = np.shape(positive)
    if np.shape(negative) != shape:
        raise ValueError(
            "positive_counts and negative_counts must have the same shape, "
            f"got {shape} and {np.shape(negative)}"
        )
    n = np.stack([np.atleast_1d(negative), np.atleast_1d(positive)], -1)
    rows = [class_weight] * len(n)
    if not (class_weight is None or isinstance(class_weight, str)):
        w = as_numpy(class_weight)
        if w.shape not in ((2,), (*shape, 2)):
            raise ValueError(
                f"class_weight must have shape (2,){f' or {(*shape, 2)}' if shape else ''}, "
                f"negative and positive, got {w.shape}"
            )
        rows = list(np.broadcast_to(w, n.shape))
        class_weight = w.astype(np.float64).tolist()
    labels = [
        lmf_parameters(counts, alpha, beta, gamma, max_margin, scale, row, label_smoothing)
        for counts, row in zip(n, rows, strict=True)
    ]
    margins, weights = (
        None if values[0] is None else np.stack(values).reshape(*shape, 2)
        for values in zip(*((each.margins, each.class_weight) for each in labels), strict=True)
    )
    config = {
        "positive_counts": n[:, 1].tolist() if shape else positive,
        "negative_counts": n[:, 0].tolist() if shape else negative,
        **labels[0].config,
        "class_weight": class_weight,
    }
    del config["class_counts"]
    return replace(labels[0], margins=margins, class_weight=weights, config=config)


def current(config: dict[str, Any], loss: Any) -> dict[str, Any]:
    """The arguments that would build ``loss`` as it is now: hyper-parameters may have been set."""
    names = ("alpha", "beta", "gamma", "scale", "label_smoothing")
    return config | {name: getattr(loss, name) for name in names if name in config}


def arguments(config: dict[str, Any]) -> str:
    """Plain arguments as they are written in a call, long lists of numbers in short."""
    return ", ".join(f"{name}={short(value)}" for name, value in config.items())


def _plain(weights: Weights) -> Any:
    """A name, None or a list of floats: what survives JSON."""
    return weights if weights is None or isinstance(weights, str) else [float(w) for w in weights]


class _Constructors:
    build: ClassVar[Callable[..., Parameters]]

    if TYPE_CHECKING:  # each framework's class brings its own __init__

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class LMFConstructors(_Constructors):
    """Constructors of every ``LMFLoss``."""

    build = staticmethod(lmf_parameters)

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The loss that ``spec`` describes."""
        return cls(
            spec.class_counts,
            alpha=spec.alpha,
            beta=spec.beta,
            gamma=spec.gamma,
            max_margin=spec.max_margin,
            scale=spec.scale,
            class_weight=spec.class_weight,
            label_smoothing=spec.label_smoothing,
            **options,
        )

    @classmethod
    def from_legacy(
        cls,
        cls_num_list: Counts,
        weight: Weights = None,
        alpha: float = 1,
        beta: float = 1,
        gamma: float = 2,
        max_m: float = 0.5,
        s: float = 30,
        **options: Any,
    ) -> Self:
        """From the arguments of the widespread clones, in which **alpha weights focal, beta LDAM**.

        Same hyper-parameters, right numbers: clones take p_t from the weighted cross-entropy and
        apply focal to the batch's mean; this loss does neither.
        """
        return cls(
            cls_num_list,
            alpha=beta,
            beta=alpha,
            gamma=gamma,
            max_margin=max_m,
            scale=s,
            class_weight=weight,
            **options,
        )

    @classmethod
    def from_official(
        cls,
        class_counts: Counts,
        weight: Weights = "margin",
        alpha: float = 1,
        beta: float = 1,
        gamma: float = 1.5,
        max_m: float = 0.5,
        s: float = 30,
        **options: Any,
    ) -> Self:
        """From the arguments of the authors' code, in which alpha weights LDAM, as in the paper.

        The authors' ``LDAMLoss`` is handed margins under the name ``cls_num_list``; pass the class
        counts here, and ``max_m`` takes effect.
        """
        return cls(
            class_counts,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            max_margin=max_m,
            scale=s,
            class_weight=weight,
            **options,
        )


class LDAMConstructors(_Constructors):
    """Constructors of every ``LDAMLoss``."""

    build = staticmethod(ldam_parameters)

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The LDAM term of the loss that ``spec`` describes, without its factor alpha."""
        return cls(
            spec.class_counts,
            max_margin=spec.max_margin,
            scale=spec.scale,
            class_weight=spec.class_weight,
            label_smoothing=spec.label_smoothing,
            **options,
        )

    @classmethod
    def from_legacy(
        cls,
        cls_num_list: Counts,
        max_m: float = 0.5,
        weight: Weights = None,
        s: float = 30,
        **options: Any,
    ) -> Self:
        """From the arguments of the LDAM-DRW repository and its clones."""
        return cls(cls_num_list, max_margin=max_m, scale=s, class_weight=weight, **options)

    @classmethod
    def from_official(
        cls,
        class_counts: Counts,
        max_m: float = 0.5,
        weight: Weights = "margin",
        s: float = 30,
        **options: Any,
    ) -> Self:
        """From the arguments of the LMF authors' code; pass counts where it is handed margins."""
        return cls.from_legacy(class_counts, max_m, weight, s, **options)


class FocalConstructors(_Constructors):
    """Constructors of every ``FocalLoss``."""

    @staticmethod
    def build(class_counts: Counts, *, class_weight: Weights, **numbers: Any) -> Parameters:
        """Parameters with other class weights, of which only the named ones take the counts."""
        counts = class_counts if isinstance(class_weight, str) else None
        return focal_parameters(counts, class_weight=class_weight, **numbers)

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The focal term of the loss that ``spec`` describes, without its factor beta."""
        return cls(
            spec.class_counts if isinstance(spec.class_weight, str) else None,
            gamma=spec.gamma,
            max_margin=spec.max_margin,
            class_weight=spec.class_weight,
            label_smoothing=spec.label_smoothing,
            **options,
        )

    @classmethod
    def from_legacy(cls, weight: Weights = None, gamma: float = 0.0, **options: Any) -> Self:
        """From the arguments of the LDAM-DRW repository and its clones."""
        return cls(gamma=gamma, class_weight=weight, **options)

    @classmethod
    def from_official(cls, weight: Weights = None, gamma: float = 1.5, **options: Any) -> Self:
        """From the arguments of the LMF authors' code."""
        return cls.from_legacy(weight, gamma, **options)


class SigmoidConstructors(_Constructors):
    """What every ``SigmoidLMFLoss`` is built from."""

    build = staticmethod(sigmoid_parameters)
