"""Every backend and mode against the reference, in value and in gradient."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import Case, Result, rounded
from tests.hard import GAMMAS, SCALES, hard_examples
from tests.strategies import cases

COUNTS = (625, 16, 1)
WEIGHTS = np.array([0.5, 1.0, 3.0])
# every γ and every s of the grid with each term that has them
GRID = [
    *({"term": "lmf", "gamma": gamma, "scale": scale} for gamma in GAMMAS for scale in SCALES),
    *({"term": "ldam", "scale": scale} for scale in SCALES),
    *({"term": "focal", "gamma": gamma} for gamma in GAMMAS),
]


@settings(max_examples=100)
@given(data=st.data())
def test_random_cases(backend, data):
    case = data.draw(cases(backend))
    case.check(backend(case))


def hard_case(dtype, num_classes=3, soft=False, **options):
    """The hard examples, each with a different upstream gradient."""
    logits, labels = hard_examples(num_classes)
    logits = rounded(logits, dtype)
    if soft:  # two of the classes and never an impossible one
        q = np.random.default_rng(0).dirichlet([0.3] * num_classes, len(labels))
        q = 0.25 * q * np.isfinite(logits) + 0.75 * np.eye(num_classes)[labels]
        options = {"label_dtype": dtype, **options}
        labels = rounded(q, dtype)
    upstream = np.linspace(0.5, 2.0, len(labels))
    counts, weights = COUNTS, WEIGHTS
    if num_classes != 3:
        counts, weights = tuple(range(num_classes, 0, -1)), "complement"
    return Case(logits, labels, counts, weights, upstream=upstream, dtype=dtype, **options)


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_hard_grid(backend, dtype, soft):
    for numbers in GRID:
        case = hard_case(dtype, soft=soft, **numbers)
        case.check(backend(case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_two_and_a_thousand_classes(backend, num_classes, dtype):
    case = hard_case(dtype, num_classes)
    case.check(backend(case))
    if num_classes == 2:
        case = hard_case(dtype, num_classes, soft=True)
        case.check(backend(case))
