"""Frameworks of this run: absent ones skip their tests, unless the environment requires them."""

import importlib
import os
import sys
from contextlib import suppress
from functools import cache
from types import ModuleType

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Keras fixes its backend at import: one process a backend.
KERAS_BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
REQUIRED = os.environ.get("LMF_MULTI_REQUIRE", "").replace(",", " ").split()


def load(framework: str) -> ModuleType:
    """Import a framework; where it is absent skip the test, or fail it in LMF_MULTI_REQUIRE."""
    if not framework.endswith("jax"):
        _interpret_triton()
    if framework in ("keras", "tensorflow", "lmf_multi.keras"):
        _torch_before_tensorflow()
    try:
        module = importlib.import_module(framework)
        if framework == "jax" and not hasattr(module, "enable_x64"):  # before 0.8
            module.enable_x64 = importlib.import_module("jax.experimental").enable_x64
        return module
    except ModuleNotFoundError as error:
        if error.name != framework.partition(".")[0]:
            raise
        if framework in REQUIRED:
            pytest.fail(f"LMF_MULTI_REQUIRE names {framework}, which is not installed")
        pytest.skip(f"{framework} is not installed", allow_module_level=True)


def need_kernel(found: object, framework: str) -> None:
    """Skip a test of the CPU kernel where there is none; fail it where it should be."""
    if found:
        return
    if framework in REQUIRED and sys.platform == "linux":
        pytest.fail("the CPU kernel is missing: install with a C++ compiler at hand")
    pytest.skip(f"there is no CPU kernel for {framework}")


@cache
def _interpret_triton() -> None:
    """Without a GPU Triton's kernels run in its interpreter, to be asked for before its import."""
    with suppress(ModuleNotFoundError):
        if not importlib.import_module("torch").cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")


@cache
def _torch_before_tensorflow() -> None:
    """In one process TensorFlow must come last: Triton's LLVM aborts beside TensorFlow's, and
    CUDA, if there is none, is looked for once.
    """
    with suppress(ModuleNotFoundError):
        importlib.import_module("torch").cuda.is_available()
        importlib.import_module("triton")
