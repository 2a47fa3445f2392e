"""The loss of integer labels on CPUs in one pass over the logits, where its kernel was compiled.

``one_class.cpp`` is the kernel, ``tiles.h`` its arithmetic, ``threads.h`` how threads share it,
``xla.h`` what it uses of XLA. In the environment ``LMF_MULTI_CPU_KERNEL=0`` turns it off, ``1`` is
the default, and ``always`` lets compiled PyTorch call it for small batches too; it is read whenever
a loss is computed or traced.
"""

import ctypes
import importlib.util
import logging
import os
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, ClassVar

_LOG = logging.getLogger("lmf_multi")
_SWITCH = "LMF_MULTI_CPU_KERNEL"

# What Python and library say to each other, XLA's operands among it: both raise it with any change.
INTERFACE = 2
UNKNOWN_LABEL, NO_MEMORY, OTHER_SIZE = 1, 2, 3  # what the function returns instead of 0
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class OneClassCall(ctypes.Structure):
    """``lmf_multi_call``: what one call is told, and where its results go.

    N rows, C classes; row r is (r // inner, r % inner) for the strides, which count numbers.
    """

    __slots__ = ()  # a name that is no field is an error, not an attribute beside them
    _fields_: ClassVar[Any] = [
        ("size", c_int64),  # of this structure, in bytes
        ("z", c_void_p),  # logits
        ("y", c_void_p),  # int64 (N,), labels
        ("margins", c_void_p),  # float32 (C,), or None without LDAM
        ("weights", c_void_p),  # float32 (C,), or None for ones
        ("grad", c_void_p),  # float32, of the logits, to be written; or None
        ("losses", c_void_p),  # float32 (N,), to be written; or None
        *((name, c_int64) for name in ("N", "C", "inner")),
        ("z_strides", 3 * c_int64),  # from one r // inner to the next, one r % inner, one class
        ("grad_strides", 3 * c_int64),
        ("ignore_index", c_int64),  # examples with this label take no part
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_double) for name in ("total_weight", "total_examples")),  # NaN: the batch's
        *((name, c_float) for name in ("gamma", "scale")),
        ("dtype", c_int32),  # of the logits, one of DTYPES
        ("by_weight", c_int32),  # whether LDAM's mean is over the weights, or the examples
        ("by_examples", c_int32),  # whether there are means
        ("threads", c_int32),
        ("loss", c_double),  # written: the losses' sum
    ]


def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None; says once, for debugging, why there is none."""
    return opened(_is_wanted(setting()))


def setting() -> str:
    """What the environment says of the kernel; ``get`` takes four times as long for nothing."""
    return os.environ[_SWITCH] if _SWITCH in os.environ else ""  # noqa: SIM401


@cache
def _is_wanted(setting: str) -> bool:
    """Whether the kernel is not switched off, by one of the values that have a meaning."""
    if setting not in ("", "0", "1", "always"):
        raise ValueError(
            f"{_SWITCH} must be 0, 1 or always, got {setting!r}; 0 turns the CPU kernel off"
        )
    return setting != "0"


@cache
def opened(wanted: bool) -> ctypes.CDLL | None:
    """``library``, wanted or switched off."""
    try:
        if not wanted:
            raise ImportError(f"{_SWITCH}=0 turns it off")
        found = importlib.util.find_spec("lmf_multi._kernel._one_class")
        if found is None or found.origin is None:
            raise ImportError("it was not compiled")
        compiled = ctypes.CDLL(found.origin)
        interface = c_int32.in_dll(compiled, "lmf_multi_interface").value
        if interface != INTERFACE:
            raise ImportError(f"{found.origin} has interface {interface}, not {INTERFACE}")
    except (ImportError, OSError, ValueError) as error:  # of another machine; without the number
        _LOG.debug("The loss takes many operations on CPUs, without the kernel: %s", error)
        return None
    compiled.lmf_multi_one_class.argtypes = [ctypes.POINTER(OneClassCall)]
    return compiled
