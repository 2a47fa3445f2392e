"""Frameworks of this run: absent ones skip their tests, unless the environment requires them."""

import importlib
import os
from types import ModuleType

import pytest

# Keras fixes its backend at import: one process a backend.
KERAS_BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
REQUIRED = os.environ.get("LMF_MULTI_REQUIRE", "").replace(",", " ").split()


def load(framework: str) -> ModuleType:
    """Import a framework; where it is absent skip the test, or fail it in LMF_MULTI_REQUIRE."""
    try:
        return importlib.import_module(framework)
    except ModuleNotFoundError as error:
        if error.name != framework.partition(".")[0]:
            raise
        if framework in REQUIRED:
            pytest.fail(f"LMF_MULTI_REQUIRE names {framework}, which is not installed")
        pytest.skip(f"{framework} is not installed")
