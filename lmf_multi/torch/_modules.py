"""The losses as modules: arrays from class counts, remembered for ``lmf_loss``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from lmf_multi.spec import (
    Counts,
    Floats,
    Reduction,
    Weights,
    check_ignored,
    check_reduction,
)
from lmf_multi.torch._distributed import Group, check_group, group_size, group_totals
from lmf_multi.torch._functional import counted, sigmoid_loss, softmax_loss
from lmf_multi.torch._tensors import is_plain, widest


class _Loss(nn.Module):
    """Hyper-parameters, margins, class weights and logit adjustments as attributes.

    Those of the classes are no buffers: they follow from the class counts, whereas buffers are what
    casts round, what a start on the meta device leaves empty, and what loaders of models overwrite.
    The module keeps them in NumPy; tensors of them lie where the module or the last logits are, in
    float64 whatever the module is cast to, for a margin rounded to bfloat16 is another margin.
    """

    _exact: dict[str, Floats | None]
    _tensors: Vectors
    _config: dict[str, Any]
    build: Callable[..., Parameters]
    _is_sigmoid = False

    def __init__(
        self,
        parameters: Parameters,
        ignore_index: int,
        reduction: Reduction,
        process_group: Any,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self._exact = parameters.vectors._asdict()
        self._place(torch.device("cpu"))
        remember(self, parameters)
        self.ignore_index = check_ignored("ignore_index", ignore_index)
        self.reduction: Reduction = reduction
        self.process_group = process_group

    @property
    def margins(self) -> Tensor | None:
        """Of each class (C,), or of negative and positive (2,) or (L, 2); None without LDAM."""
        margins: Tensor | None = self._tensors.margins
        return margins

    @margins.setter
    def margins(self, value: Any) -> None:
        raise AttributeError("margins follow from the class counts; build a new loss for others")

    @property
    def class_weight(self) -> Tensor | None:
        """Likewise; None for ones. ``set_class_weight`` changes it."""
        class_weight: Tensor | None = self._tensors.class_weight
        return class_weight

    @class_weight.setter
    def class_weight(self, value: Any) -> None:
        raise AttributeError("class_weight must not be assigned; call set_class_weight")

    @property
    def logit_adjustment(self) -> Tensor | None:
        """What is added to the logits (C,), in the sigmoid form () or (L,); None for nothing."""
        logit_adjustment: Tensor | None = self._tensors.logit_adjustment
        return logit_adjustment

    @logit_adjustment.setter
    def logit_adjustment(self, value: Any) -> None:
        raise AttributeError(
            "logit_adjustment follows from the class counts; build a new loss for another"
        )

    @property
    def process_group(self) -> Any:
        """The processes whose batches the reduction is over."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        check_group(group, self.reduction)
        self._group = Group(group)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        normalizers: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss of logits (N, C, …) and labels, as :func:`lmf_loss` takes them.

        Args:
            input: float (N, C, …), logits, nats.
            target: integer (N, …), or float of the input's shape.
            normalizers: what ``normalizers`` returns for a larger batch, of which this is a part;
                the parts' losses then sum to its mean.
        """
        return self._reduced(input, target, None, normalizers)

    def normalizers(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch with these labels divides its means by; add them up over micro-batches.

        Returns:
            Total class weight and number of examples that are not ignored, () each; of the whole
            process group if there is one.
        """
        return self._totals(target)

    def set_class_weight(self, class_weight: Weights) -> None:
        """Replace the class weights, in place, so that a compiled step is not compiled again.

        Args:
            class_weight: what the constructor takes; None gives ones.
        """
        parameters = self.build(current(self._config, self) | {"class_weight": class_weight})
        (margins, weights, _), before = parameters.vectors, self.class_weight
        if weights is None:
            reference = self._exact["class_weight" if margins is None else "margins"]
            if reference is None:  # focal without weights, now as before
                return
            weights = np.ones(reference.shape)
        self._exact["class_weight"] = weights
        if before is None:
            self._place(self._device() or torch.device("cpu"))
        else:
            with torch.no_grad():
                before.copy_(torch.tensor(weights, dtype=torch.float64, device="cpu"))
        self._config = parameters.config

    def _reduced(
        self,
        input: Tensor,
        target: Tensor,
        where: Tensor | None,
        totals: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        averaged = self.reduction in ("mean", "batch_mean")
        if totals is not None and not averaged:
            raise ValueError(
                f"normalizers need the reduction 'mean' or 'batch_mean', got {self.reduction!r}"
            )
        if totals is None and averaged and self.process_group is not None:
            totals = self._totals(target, where)
        # of another class, which may have a say in what is asked of it, nothing is asked
        may_ask = type(input) in (Tensor, nn.Parameter)
        if may_ask and self._device() not in (None, input.device) and is_plain(input):
            self._place(input.device)
        function = sigmoid_loss if self._is_sigmoid else softmax_loss
        options = Options(1, where, self.ignore_index, reduction=self.reduction, totals=totals)
        loss = function(input, target, self._tensors, numbers_of(self), options)
        return loss if self.process_group is None else loss * group_size(self.process_group)

    def _totals(self, target: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = Options(1, where, self.ignore_index)
        each = counted(target, self.class_weight, options, self._is_sigmoid)
        return group_totals(each, self.process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Loss":
        self._place(fn(torch.empty(0, device=self._device() or "cpu")).device)
        return self

    def _device(self) -> torch.device | None:
        """Where the tensors lie, if there are any."""
        for v in self._tensors:
            if v is not None:
                device: torch.device = v.device
                return device
        return None

    def _place(self, device: torch.device) -> None:
        """Lay the tensors of the classes on a device, for all that may come."""
        if device.type == "meta":  # where nothing has a number
            device = torch.device("cpu")
        dtype = widest(device)
        with torch.inference_mode(False):
            self._tensors = Vectors(*(_constant(v, dtype, device) for v in self._exact.values()))

    def extra_repr(self) -> str:
        """What printing a model shows of it."""
        options = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        if self.process_group is not None:
            options["process_group"] = self.process_group
        return arguments(current(self._config, self) | options)


def _constant(values: Floats | None, dtype: torch.dtype, device: torch.device) -> Any:
    if values is None:
        return None
    vector: Any = torch.tensor(values, dtype=dtype, device=device)
    # to torch.compile a number of classes is a constant, as buffers' shapes are
    vector._dynamo_static_indices = set(range(vector.dim()))
    return vector


class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    Args:
        class_counts: training examples of each class (C,), in label order, at least 1 each.
        ignore_index: examples with this integer label take no part.
        reduction: ``"mean"``, ``"batch_mean"``, ``"sum"`` or ``"none"``.
        process_group: a ``torch.distributed`` process group, or ``"world"`` for all processes: the
            reduction is then over all their batches, so that the gradients that DDP averages are
            those of one process with the whole batch, and so are the averaged losses. Every process
            must call the loss, as they wait for one another; evaluate with a loss without a group
            where one process evaluates alone.

    >>> criterion = LMFLoss([90, 10])
    >>> criterion(torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 1]))
    tensor(0.6874)
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
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: Any = None,
    ) -> None:
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, ignore_index, reduction, process_group)


class LDAMLoss(LDAMConstructors, _Loss):
    """``ldam_loss`` with margins and class weights from class counts; arguments as ``LMFLoss``.

    >>> LDAMLoss([90, 10], scale=1.0)(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.9741)
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
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: Any = None,
    ) -> None:
        numbers = Numbers(scale=scale, label_smoothing=label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, ignore_index, reduction, process_group)


class FocalLoss(FocalConstructors, _Loss):
    """``focal_loss`` with class weights; only named class weights need the counts.

    >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.1733)
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
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: Any = None,
    ) -> None:
        numbers = Numbers(gamma=gamma, label_smoothing=label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, ignore_index, reduction, process_group)


class SigmoidLMFLoss(SigmoidConstructors, _Loss):
    """``sigmoid_lmf_loss`` with margins and class weights from the counts of each label.

    Args:
        positive_counts: training examples in which the label is positive, at least 1: a number, or
            (L,) for the L labels along axis 1 (axis 0 of 1-D input).
        negative_counts: likewise; examples without an annotation belong to neither.
        class_weight: a scheme's name, computed for each label from its two counts; float (2,) or
            (L, 2), of negative and positive; or None.

    The other arguments as ``LMFLoss``.

    >>> criterion = SigmoidLMFLoss(positive_counts=10, negative_counts=90)
    >>> criterion(torch.tensor([-2.0, 0.5]), torch.tensor([0, 1]))
    tensor(0.6874)
    """

    _is_sigmoid = True

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
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: Any = None,
    ) -> None:
        counts = (positive_counts, negative_counts)
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(*counts, numbers, *options)
        super().__init__(parameters, ignore_index, reduction, process_group)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        where: Tensor | None = None,
        normalizers: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss of log-odds and labels of one shape, as :func:`sigmoid_lmf_loss` takes them."""
        return self._reduced(input, target, where, normalizers)

    def normalizers(self, target: Tensor, *, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a batch with these labels divides its means by; add them up over micro-batches."""
        return self._totals(target, where)
