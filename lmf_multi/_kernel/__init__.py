"""The loss on CPUs in one pass over the logits, where its kernel was compiled.

``loss.cpp`` is the kernel, ``tiles.h`` and ``elements.h`` the arithmetic of the softmax and of
the sigmoid form, ``threads.h`` how threads share it, ``xla.h`` what it uses of XLA. In the
environment ``LMF_MULTI_CPU_KERNEL=0`` turns it off, ``1`` is the default, and ``always`` lets
compiled PyTorch call it for small batches too; it is read whenever a loss is computed or traced.
"""

import ctypes
import logging
import os
import sys
import warnings
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

_LOG = logging.getLogger("lmf_multi")
_SWITCH = "LMF_MULTI_CPU_KERNEL"
_LIBRARY = Path(__file__).with_name("_loss.so")  # on every system, for every Python
_MANY = 2**14  # logits, worth a warning
_UNSAID: dict[bool, str] = {}  # why there is no kernel, by ``wanted``, until a warning says it
_CALLERS = ("lmf_multi", "torch", "jax", "flax", "keras", "tensorflow")

# What Python and library say to each other, XLA's operands among it: both raise it with any change.
INTERFACE = 5
UNKNOWN_LABEL, NO_MEMORY, OTHER_SIZE = 1, 2, 3  # what the function returns instead of 0
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class LossCall(ctypes.Structure):
    """``lmf_multi_call``: what one call is told, and where its results go.

    N rows, C classes; row r is (r // inner, r % inner) for the strides, which count numbers. In the
    sigmoid form, which has t, N elements in memory's order, of C labels; i is of i // inner % C.
    """

    __slots__ = ()  # a name that is no field is an error, not an attribute beside them
    _fields_: ClassVar[Any] = [
        ("size", c_int64),  # of this structure, in bytes
        ("z", c_void_p),  # logits
        ("y", c_void_p),  # int64 (N,), labels
        ("t", c_void_p),  # float32 (N,), probabilities of the positive, or None
        ("where", c_void_p),  # bool (N,), False leaves an element out; or None
        ("margins", c_void_p),  # float64 (C,), of elements (C, 2) or (2,), or None without LDAM
        ("weights", c_void_p),  # likewise, or None for ones
        ("adjustments", c_void_p),  # float64 (C,), of elements () too, added to the logits, or None
        ("grad", c_void_p),  # float32, of the logits, to be written; or None
        ("losses", c_void_p),  # float32 (N,), to be written; or None
        *((name, c_int64) for name in ("N", "C", "inner")),
        ("z_strides", 3 * c_int64),  # from one r // inner to the next, one r % inner, one class
        ("grad_strides", 3 * c_int64),
        ("ignore_index", c_int64),  # examples with this label take no part
        *((name, c_double) for name in ("alpha", "beta")),
        *((name, c_double) for name in ("total_weight", "total_examples")),  # NaN: the batch's
        *((name, c_float) for name in ("gamma", "scale", "smoothing")),
        ("ignored", c_float),  # elements with this label take no part, or NaN
        ("dtype", c_int32),  # of the logits, one of DTYPES
        ("by_weight", c_int32),  # whether LDAM's mean is over the weights, or the examples
        ("by_examples", c_int32),  # whether there are means
        ("margins_by_label", c_int32),  # of elements: whether there is one of each label
        ("weights_by_label", c_int32),
        ("adjustments_by_label", c_int32),
        ("threads", c_int32),
        ("loss", c_double),  # written: the losses' sum
    ]


def library(logits: int = 0) -> ctypes.CDLL | None:
    """The compiled kernel, or None; says once why there is none: for debugging, and as a warning
    where it would take as many logits.
    """
    wanted = _is_wanted(setting())
    found = opened(wanted)
    if found is None and wanted and logits >= _MANY:
        _warn()
    return found


@cache  # which TensorFlow calls as it is, instead of a copy that it makes, in frames of its own
def _warn() -> None:
    """At the line that is neither this package's nor a framework's."""
    reason, frame, level = _UNSAID.pop(True, None), sys._getframe(), 1
    if reason is None or sys.platform == "win32":  # where neither a wheel nor a compiler brings it
        return
    while frame.f_back and (
        frame.f_globals.get("__name__", "").partition(".")[0] in _CALLERS
        or "__autograph_generated" in frame.f_code.co_filename
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"The loss of many logits on CPUs is faster by its compiled kernel, which is missing: "
        f"{reason}; `pip install --force-reinstall --no-deps --no-cache-dir lmf-multi` brings it "
        "in a wheel for this system, or compiles it, with GCC or Clang and --no-binary lmf-multi; "
        f"{_SWITCH}=0 in the environment silences this",
        stacklevel=level,
    )


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
        if not _LIBRARY.exists():
            raise ImportError("it was not compiled")
        compiled = ctypes.CDLL(str(_LIBRARY))
        interface = c_int32.in_dll(compiled, "lmf_multi_interface").value
        if interface != INTERFACE:
            raise ImportError(f"{_LIBRARY} has interface {interface}, not {INTERFACE}")
    except (ImportError, OSError, ValueError) as error:  # of another machine; without the number
        _UNSAID[wanted] = str(error)
        _LOG.debug("The loss takes many operations on CPUs, without the kernel: %s", error)
        return None
    compiled.lmf_multi_loss.argtypes = [ctypes.POINTER(LossCall)]
    return compiled
