"""Every backend and mode against the reference, in value and in gradient."""

from dataclasses import replace

import numpy as np
import pytest

from tests.cases import TOLERANCES, Case, SigmoidCase, rounded
from tests.frameworks import load
from tests.hard import GAMMAS, SCALES, hard_examples

COUNTS = (625, 16, 1)
WEIGHTS = np.array([0.5, 1.0, 3.0])
# every γ and every s of the grid with each term that has them
GRID = [
    *({"term": "lmf", "gamma": gamma, "scale": scale} for gamma in GAMMAS for scale in SCALES),
    *({"term": "ldam", "scale": scale} for scale in SCALES),
    *({"term": "focal", "gamma": gamma} for gamma in GAMMAS),
]


def check_random(kind, backend, examples):
    hypothesis, strategies = load("hypothesis"), load("tests.strategies")

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(getattr(strategies, kind)(backend))
    def check(case):
        case.check(backend(case))

    check()


def test_random_cases(backend):
    check_random("cases", backend, 25 if backend.compiles else 150)


def test_random_sigmoid_cases(backend):
    check_random("sigmoid_cases", backend, 20 if backend.compiles else 100)


def test_distributions_that_rounding_has_changed(backend):
    """Means divide by what they sum up to, with class weights and without."""
    if backend.mode == "vmap":
        pytest.skip("maps over examples, of which one has no mean")
    q = rounded(np.full((4, 3), 1 / 3), "bfloat16")
    assert q.sum(1)[0] < 0.997
    logits = rounded(np.random.default_rng(0).normal(0, 2, (4, 3)), "bfloat16")
    options = {"dtype": "bfloat16", "label_dtype": "bfloat16", "reduction": "mean"}
    for weights in (None, WEIGHTS):
        case = Case(logits, q, COUNTS, weights, as_class=True, **options)
        case.check(backend(case))


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_hard_sigmoid_elements(backend, dtype, labels):
    """Log-odds from hopeless to where the loss underflows, impossible and certain ones too."""
    odds = [0.0, 0.1, 0.5, 2.0, 17.0, 40.0, 86.0, 90.0, 104.0, 110.0, 720.0, 1e4]
    logits = rounded(np.repeat([*odds, *np.negative(odds)], 2), dtype)
    y = np.tile([0, 1], 2 * len(odds))
    if labels == "soft":
        y = rounded(np.abs(y - np.linspace(0.001, 0.4, len(y))), dtype)
    grid = GRID[:18:5] if backend.compiles_numbers else GRID[:18]
    for numbers in grid:
        case = SigmoidCase(
            logits,
            y,
            (625, 16),
            np.array([0.5, 3.0]),
            upstream=np.linspace(0.5, 2.0, len(y)),
            dtype=dtype,
            label_dtype=dtype if labels == "soft" else "int32",
            **{k: v for k, v in numbers.items() if k != "term"},
        )
        case.check(backend(case))


def hard_case(dtype, num_classes=3, soft=False, **options):
    """The hard examples, each with a different upstream gradient."""
    logits, labels = hard_examples(num_classes)
    logits = rounded(logits, dtype)
    if soft:  # distributions that hold the label, and nothing of impossible classes
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
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_hard_grid(backend, dtype, soft):
    grid = GRID
    if backend.compiles_numbers:  # each dtype its quarter of the grid
        grid = GRID[list(TOLERANCES).index(dtype) :: 4]
    for numbers in grid:
        case = hard_case(dtype, soft=soft, **numbers)
        case.check(backend(case))


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_hard_grid_adjusted(backend, dtype, soft):
    """Where what is added to the logits is lost by rounding, and multiplied by the scale."""
    grid = GRID[::7] if backend.compiles_numbers else GRID[::2]
    for numbers in grid:
        case = hard_case(dtype, soft=soft, logit_adjustment=1.5, **numbers)
        case.check(backend(case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_two_and_a_thousand_classes(backend, num_classes, dtype):
    for tau in (0.0, 1.0):
        case = hard_case(dtype, num_classes, logit_adjustment=tau)
        case.check(backend(case))
    if num_classes == 2:
        case = hard_case(dtype, num_classes, soft=True)
        case.check(backend(case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("term", "scale"), [*(("ldam", scale) for scale in SCALES), ("focal", 1.0)]
)
def test_easy_examples(backend, term, scale, dtype):
    """Thousands of log-odds from 0 to where the loss underflows; every rounding shows there."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 4000)
    logits = rng.normal(0, 1, (4000, 3)) * rng.choice([0.1, 1, 10], (4000, 1))
    odds = rng.uniform(0, 100 if dtype == "float32" else 750, 4000)
    if term == "ldam":
        logits, odds = logits / scale, odds / scale + 0.5
    others = np.where(np.eye(3)[labels] == 1, -np.inf, logits)
    logits[np.arange(4000), labels] = np.logaddexp.reduce(others, axis=1) + odds
    case = Case(
        rounded(logits, dtype), labels, COUNTS, term=term, scale=scale, gamma=0.5, dtype=dtype
    )
    case.check(backend(case))


def test_easy_sigmoid_elements_adjusted(backend):
    """Elements whose loss is nearly 0: what adding to their logits loses shows, times the scale."""
    rng, labels = np.random.default_rng(0), np.tile([0, 1], 2000)
    for counts in ((11000, 1), (15, 1), (1, 60)):
        numbers = {"alpha": 1.0, "beta": 0.0, "scale": 30.0, "logit_adjustment": 1.0}
        case = SigmoidCase(np.zeros(4000), labels, counts, **numbers)
        odds = rng.uniform(0, 86, 4000) / case.scale + case.margins[labels]
        logits = rounded((2 * labels - 1) * odds - case.adjustments, "float32")
        case = replace(case, logits=logits)
        case.check(backend(case))
