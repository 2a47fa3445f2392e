"""The loss of integer labels on CPUs in one pass over the logits, where its kernel was compiled."""

import ctypes
import importlib.util
import logging
from functools import cache

_LOG = logging.getLogger("lmf_multi")


@cache
def library() -> ctypes.CDLL | None:
    """``_cpu.cpp``, compiled, or None; says once, for debugging, if there is none."""
    found = importlib.util.find_spec("lmf_multi._cpu_kernel")
    if found is None or found.origin is None:
        _LOG.debug("The CPU kernel was not compiled: the loss takes many operations instead of one")
        return None
    return ctypes.CDLL(found.origin)
