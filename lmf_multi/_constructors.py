"""What every framework does to build a loss: its parameters, and other ways to build it.

``options`` are the framework's own arguments (``reduction``, ``ignore_index``, ``axis``, …).
"""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from lmf_multi._terms import Numbers, Vectors, numbers_of
from lmf_multi.spec import (
    Counts,
    LMFSpec,
    Weights,
    as_counts,
    as_label_counts,
    as_numpy,
    check_parameters,
    focal_weights,
    log_priors,
    short,
)

_FOCAL = ("alpha", "beta", "gamma")  # what LDAM does not have


class Parameters(NamedTuple):
    """What a loss remembers for ``lmf_loss``, and the plain arguments that would build it again."""

    vectors: Vectors
    numbers: Numbers
    config: dict[str, Any]


def lmf_parameters(
    class_counts: Counts,
    numbers: Numbers,
    max_margin: float,
    class_weight: Weights,
    logit_adjustment: float = 0.0,  # which losses that were pickled before have not
) -> Parameters:
    """Parameters of every ``LMFLoss``."""
    options: Any = {"max_margin": max_margin, "class_weight": class_weight}
    options["logit_adjustment"] = logit_adjustment
    spec = LMFSpec(class_counts, **options, **numbers._asdict())
    config = _arguments_of(spec) | {"class_counts": list(spec.class_counts)}
    config["class_weight"] = _plain(spec.class_weight)
    weights = None if spec.class_weight is None else spec.weights
    adjustments = spec.adjustments if spec.logit_adjustment else None
    return Parameters(Vectors(spec.margins, weights, adjustments), numbers_of(spec), config)


def _arguments_of(spec: LMFSpec, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a loss that ``spec`` describes."""
    if not isinstance(spec, LMFSpec):
        raise TypeError(
            f"spec must be an LMFSpec, got {short(spec)}; "
            "pass class counts to LMFSpec, or to the loss itself"
        )
    names = [field.name for field in fields(spec)]
    return {name: getattr(spec, name) for name in names if name not in without}


def ldam_parameters(
    class_counts: Counts,
    numbers: Numbers,
    max_margin: float,
    class_weight: Weights,
    logit_adjustment: float = 0.0,  # which losses that were pickled before have not
) -> Parameters:
    """Parameters of every ``LDAMLoss``, with scale and label smoothing from ``numbers``."""
    numbers = numbers._replace(alpha=1.0, beta=0.0, gamma=0.0)
    options = (max_margin, class_weight, logit_adjustment)
    parameters = lmf_parameters(class_counts, numbers, *options)
    config = {k: value for k, value in parameters.config.items() if k not in _FOCAL}
    return parameters._replace(config=config)


def focal_parameters(
    class_counts: Counts,
    numbers: Numbers,
    max_margin: float,
    class_weight: Weights,
    logit_adjustment: float = 0.0,  # which losses that were pickled before have not
) -> Parameters:
    """Parameters of every ``FocalLoss``, with γ and label smoothing from ``numbers``."""
    γ, ε, τ = numbers.gamma, numbers.label_smoothing, logit_adjustment
    check_parameters(gamma=γ, max_margin=max_margin, label_smoothing=ε, logit_adjustment=τ)
    weights = focal_weights(class_counts, class_weight, max_margin, τ)
    adjustments = τ * log_priors(class_counts) if τ else None
    config = {
        "class_counts": None if class_counts is None else list(as_counts(class_counts)),
        "gamma": float(γ),
        "max_margin": float(max_margin),
        "class_weight": class_weight if isinstance(class_weight, str) else _plain(weights),
        "label_smoothing": float(ε),
        "logit_adjustment": float(τ),
    }
    vectors = Vectors(None, weights, adjustments)
    return Parameters(vectors, Numbers(0.0, 1.0, float(γ), 1.0, float(ε)), config)


def sigmoid_parameters(
    positive_counts: Any,
    negative_counts: Any,
    numbers: Numbers,
    max_margin: float,
    class_weight: Weights,
    logit_adjustment: float = 0.0,  # which losses that were pickled before have not
) -> Parameters:
    """Parameters of every ``SigmoidLMFLoss``: for each label those of its two classes.

    What is added to its logit is τ log(n⁺/n⁻), as a constant for both classes changes nothing.
    """
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
        lmf_parameters(counts, numbers, max_margin, row, logit_adjustment)
        for counts, row in zip(n, rows, strict=True)
    ]
    margins, weights, adjustments = (
        None if values[0] is None else np.stack(values).reshape(*shape, 2)
        for values in zip(*(each.vectors for each in labels), strict=True)
    )
    if adjustments is not None:
        adjustments = np.asarray(adjustments[..., 1] - adjustments[..., 0])
    config = {
        "positive_counts": n[:, 1].tolist() if shape else positive,
        "negative_counts": n[:, 0].tolist() if shape else negative,
        **labels[0].config,
        "class_weight": class_weight,
    }
    del config["class_counts"]
    return Parameters(Vectors(margins, weights, adjustments), labels[0].numbers, config)


def remember(loss: Any, parameters: Parameters) -> None:
    """Set the hyper-parameters as a loss's attributes, which users may change."""
    for name, number in parameters.numbers._asdict().items():
        setattr(loss, name, number)
    loss._config = parameters.config


def current(config: dict[str, Any], loss: Any) -> dict[str, Any]:
    """The arguments that would build ``loss`` as it is now: hyper-parameters may have been set."""
    return config | {name: getattr(loss, name) for name in Numbers._fields if name in config}


def arguments(config: dict[str, Any]) -> str:
    """Plain arguments as they are written in a call, long lists of numbers in short."""
    return ", ".join(f"{name}={short(value)}" for name, value in config.items())


def _plain(weights: Weights) -> Any:
    """A name, None or a list of floats: what survives JSON."""
    return weights if weights is None or isinstance(weights, str) else [float(w) for w in weights]


class _Constructors:
    _build: ClassVar[Callable[..., Parameters]]
    alpha: Any
    beta: Any
    gamma: Any
    scale: Any
    label_smoothing: Any

    if TYPE_CHECKING:  # each framework's class brings its own __init__

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def build(cls, config: dict[str, Any]) -> Parameters:
        """The parameters of the loss that plain arguments would build."""
        numbers = {name: config[name] for name in Numbers._fields if name in config}
        others = {name: value for name, value in config.items() if name not in numbers}
        return cls._build(numbers=Numbers(**numbers), **others)


class LMFConstructors(_Constructors):
    """Constructors of every ``LMFLoss``."""

    _build = staticmethod(lmf_parameters)

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The loss that ``spec`` describes."""
        return cls(**_arguments_of(spec), **options)

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
        return cls.from_official(
            cls_num_list, weight, alpha=beta, beta=alpha, gamma=gamma, max_m=max_m, s=s, **options
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
        others = {"max_margin": max_m, "scale": s, "class_weight": weight}
        return cls(class_counts, alpha=alpha, beta=beta, gamma=gamma, **others, **options)


class LDAMConstructors(_Constructors):
    """Constructors of every ``LDAMLoss``."""

    _build = staticmethod(ldam_parameters)

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The LDAM term of the loss that ``spec`` describes, without its factor alpha."""
        return cls(**_arguments_of(spec, without=_FOCAL), **options)

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

    _build = staticmethod(focal_parameters)

    @classmethod
    def build(cls, config: dict[str, Any]) -> Parameters:
        """As any other, but only named class weights and logit adjustment take the counts."""
        takes_counts = isinstance(config["class_weight"], str) or config.get("logit_adjustment")
        return super().build(config if takes_counts else config | {"class_counts": None})

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The focal term of the loss that ``spec`` describes, without its factor beta."""
        arguments = _arguments_of(spec, without=("alpha", "beta", "scale"))
        if not (isinstance(spec.class_weight, str) or spec.logit_adjustment):
            arguments["class_counts"] = None
        return cls(**arguments, **options)

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

    _build = staticmethod(sigmoid_parameters)
