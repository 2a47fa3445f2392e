"""What there is to know of a tensor before anything is computed, and what makes it plain."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmf_multi.spec import as_numpy, check_vectors

try:  # PyTorch's own names, of which an upgrade may move one
    from torch._C import DisableTorchFunctionSubclass as _without_subclasses
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _len_torch_dispatch_stack,
    )
    from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

    CAN_TELL = True
except ImportError as error:
    logging.getLogger("lmf_multi").debug(
        "PyTorch %s does not tell numbers from traces (%s): the loss takes its operations, and "
        "labels out of range give NaN",
        torch.__version__,
        error,
    )
    CAN_TELL = False


def transforms_are_active() -> bool:
    """Whether those of torch.func may be, in whose midst nothing is looked at."""
    return not CAN_TELL or _are_functorch_transforms_active()


def readable(*tensors: Tensor | None) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return is_plain(*tensors) and all(x is None or x.is_cpu for x in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are of numbers, neither traced nor batched."""
    if torch.compiler.is_compiling() or not CAN_TELL:
        return False
    # make_fx, torch.func.linearize and torch.jit.trace record the operations that they see
    if _len_torch_dispatch_stack() or _get_tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0:  # one, or what it is combined with, may have a tangent
        return False
    for x in tensors:
        if x is None:
            continue
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
        # the latter of is_grads_batched
        if is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x):
            return False
    return True


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call it while it traces, and take what it returns for constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo, which takes seconds
    and imports Triton, which aborts the process where TensorFlow was imported first.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_long(y: Tensor) -> Tensor:
    """Labels that can be compared: uint8's 156 with -100 would be equal.

    What is beyond int64 becomes its largest number, which is no label, instead of a negative one.
    """
    signed = y.long()
    if y.dtype != torch.uint64:
        return signed
    return signed.masked_fill(signed < 0, torch.iinfo(torch.int64).max)


def bounds(x: Tensor) -> tuple[Any, Any]:
    """The smallest and the largest of at least one number that can be looked at."""
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch does not compare them
        numbers = x.clone().numpy()  # or the caller could not resize the storage any more
        return numbers.min().item(), numbers.max().item()
    smallest, largest = torch.aminmax(x.detach())
    return smallest.item(), largest.item()


def total(x: Tensor) -> Tensor:
    """Their sum (), of which compiled code for a CPU would add thousands to one float32 after
    another.

    Eager code sums in pairs, and GPUs sum in many threads: both stay exact without this.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(dtype=torch.float64).to(x.dtype)
    return x.sum()


def plain_tensor(name: str, value: Any) -> Tensor:
    """An argument as a plain tensor; refuses what is no tensor or has lost its memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    plain = _as_plain(value)
    check_memory(name, plain)
    return plain


def _as_plain(x: Tensor) -> Tensor:
    """The numbers of a subclass that adds to them, as MONAI's and torchvision's do.

    Such a class has a say in every operation, which takes time, and compiled code takes some of its
    attributes for the numbers. Not of one that holds its numbers elsewhere, as DTensor does.
    """
    kind = type(x)
    if kind in (Tensor, torch.nn.Parameter) or kind.__torch_dispatch__ != Tensor.__torch_dispatch__:
        return x
    if not CAN_TELL:
        return x.as_subclass(Tensor)
    with _without_subclasses():
        same: Tensor = torch.ops.aten.alias(x)
    return same


def check_memory(name: str, x: Tensor) -> None:
    """Refuse a tensor whose storage was freed, as FSDP's are: to read it would end the process."""
    if torch.compiler.is_compiling() or not CAN_TELL:
        return
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided:
        return
    if is_functorch_wrapped_tensor(x) or x.numel() == 0:
        return
    reach, size = x.numel(), x.untyped_storage().nbytes()
    if not x.is_contiguous():
        steps = zip(x.shape, x.stride(), strict=True)
        reach = 1 + sum((n - 1) * step for n, step in steps)
    if size < (x.storage_offset() + reach) * x.itemsize:
        raise RuntimeError(
            f"{name} must have memory for its shape {tuple(x.shape)}, got a storage of {size} "
            "bytes; call the loss before it is freed"
        )


def check_given(**vectors: Any) -> None:
    """Refuse what callers of functions must not give: ``check_vectors``, of CPU tensors too.

    The classes have checked theirs, and pay nothing for it at each call.
    """
    look = not torch.compiler.is_compiling()
    # a transform would wrap what is read
    look_at_tensors = look and not transforms_are_active()
    for name, value in vectors.items():
        if isinstance(value, Tensor):
            check_memory(name, value)
        if look_at_tensors and isinstance(value, Tensor) and readable(value):
            if _are_positive(value):
                continue
            value = as_numpy(value)
        check_vectors(look, **{name: value})


def _are_positive(x: Tensor) -> bool:
    """Whether they are finite too, as nearly always, and much faster to see than all rules."""
    if not x.is_floating_point() or not x.numel():
        return False
    smallest, largest = bounds(x)
    return bool(smallest > 0 and largest < math.inf)


def widest(device: torch.device) -> torch.dtype:
    """The dtype of constants over the classes there: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def vector(name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A constant array over the classes, where and how the logits need it."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = plain = _as_plain(values)
        if plain.requires_grad:
            raise ValueError(f"{name} must be constant, got a tensor that requires grad; detach it")
        if plain.dtype == dtype and plain.device == device:
            return plain  # as would be found out below, but sooner
    elif isinstance(values, np.ndarray):
        values = np.array(values)  # a spec's arrays are read-only, which PyTorch warns of
    return torch.as_tensor(values, dtype=dtype, device=device)
