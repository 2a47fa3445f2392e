"""Other ways to build the losses, the same in every framework: from a spec, from earlier code.

``options`` are the framework's own arguments (``reduction``, ``ignore_index``, ``axis``, …).
"""

from typing import TYPE_CHECKING, Any, Self

from lmf_multi.spec import Counts, LMFSpec, Weights


class _Constructors:
    if TYPE_CHECKING:  # each framework's class brings its own __init__

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class LMFConstructors(_Constructors):
    """Constructors of every ``LMFLoss``."""

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

    @classmethod
    def from_spec(cls, spec: LMFSpec, **options: Any) -> Self:
        """The focal term of the loss that ``spec`` describes, without its factor beta."""
        return cls(
            spec.class_counts,
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
