"""A batch as the operators take it that compiled code calls: PyTorch wants their arguments flat."""

from typing import Any

import torch

from lmf_multi._terms import Numbers, Options
from lmf_multi.torch._preparation import Batch
from lmf_multi.torch._tensors import at_trace_time, transforms_are_active

SCHEMA = (
    "Tensor z, Tensor y, Tensor? where, Tensor? margins, Tensor? class_weight, "
    "Tensor? logit_adjustment, Tensor? total_weight, Tensor? total_examples, float[] numbers, "
    "SymInt axis, SymInt ignore_index, str reduction, bool is_sigmoid"
)
TENSORS = 8  # its first arguments
ARGUMENTS = 13


def may_call_operators() -> bool:
    """Whether ``torch.compile`` may call an operator where it traces now.

    Not in what is exported, which may run where this package is not installed, and not under the
    transforms of ``torch.func``, which can batch and differentiate operations.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not _may_be_exporting()
        and not transforms_are_active()
    )


@at_trace_time  # traced itself, PyTorch 2.11's is_exporting() is always true
def _may_be_exporting() -> bool:
    """Whether ``torch.export`` is at work, which older PyTorch cannot tell."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is None or is_exporting()


def flat(batch: Batch) -> tuple[Any, ...]:
    """The arguments of ``SCHEMA`` after the logits."""
    options = batch.options
    total_weight, total_examples = options.totals or (None, None)
    vectors = (batch.Δ, batch.w, batch.o)
    settings = (options.axis, options.ignore_index, options.reduction, batch.is_sigmoid)
    totals = (total_weight, total_examples)
    return batch.y, options.where, *vectors, *totals, [*batch.numbers], *settings


def batch_of(arguments: Any) -> Batch:
    """What these arguments say."""
    y, where, Δ, w, o, *totals, numbers, axis, ignore_index, reduction, is_sigmoid = arguments
    given = None if totals[0] is None else tuple(totals)
    options = Options(axis, where, ignore_index, reduction=reduction, totals=given)
    return Batch(
        y,
        Δ,
        w,
        o,
        Numbers(*numbers),
        options,
        is_soft=is_sigmoid and y.is_floating_point(),
        axis=None if is_sigmoid else axis,
        is_sigmoid=is_sigmoid,
        look=False,
    )
