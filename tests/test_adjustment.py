"""Decisions by adjusted logits, of every framework's arrays, and the τ that scores best."""

import numpy as np
import pytest

from lmf_multi import adjust_logits, log_priors, tune_adjustment
from tests.checks import refuses
from tests.frameworks import KERAS_BACKEND, load

COUNTS = (900, 90, 10)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (40, 3))


def test_by_hand():
    expected = LOGITS - 0.7 * np.log(np.array(COUNTS) / 1000)
    np.testing.assert_allclose(adjust_logits(LOGITS, COUNTS, 0.7), expected, rtol=1e-15)
    np.testing.assert_allclose(adjust_logits(LOGITS.T, COUNTS, 0.7, axis=0), expected.T, rtol=1e-15)
    np.testing.assert_array_equal(adjust_logits(LOGITS, COUNTS, 0.0), LOGITS)
    lists = adjust_logits(LOGITS.round().astype(int).tolist(), COUNTS)
    np.testing.assert_allclose(lists, LOGITS.round() - log_priors(COUNTS), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_every_framework_keeps_its_kind(framework, dtype):
    module = load(framework)
    if framework == "jax" and dtype == "float64":
        pytest.skip("a dtype that JAX has only with x64")
    if framework == "torch":
        logits = module.tensor(LOGITS, dtype=getattr(module, dtype))
    elif framework == "jax":
        logits = module.numpy.asarray(LOGITS, dtype)
    else:
        logits = module.constant(LOGITS, dtype)
    adjusted = adjust_logits(logits, COUNTS)
    assert type(adjusted) is type(logits) and adjusted.dtype == logits.dtype
    numbers = adjusted.double() if framework == "torch" else np.asarray(adjusted, np.float64)
    tolerance = {"float32": 1e-6, "float64": 1e-14}.get(dtype, 0.05)
    np.testing.assert_allclose(numbers, LOGITS - log_priors(COUNTS), atol=tolerance)


def test_keras():
    keras = load("keras")
    adjusted = adjust_logits(keras.ops.array(LOGITS, "float32"), COUNTS)
    found = keras.ops.convert_to_numpy(adjusted)
    np.testing.assert_allclose(found, LOGITS - log_priors(COUNTS), atol=1e-6)
    assert keras.backend.backend() == KERAS_BACKEND


def classified(rng, n):
    """Logits of a model that learned the counts with the classes, and labels of a balanced set."""
    labels = np.repeat(np.arange(3), n)
    means = 1.5 * np.eye(3)
    x = means[labels] + rng.normal(0, 1, (3 * n, 3))
    return x @ means.T + log_priors(COUNTS), labels  # Bayes' rule, up to a constant


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_it_finds_what_bayes_rule_says(metric):
    """With as many examples of each class the priors must go: τ = 1."""
    logits, labels = classified(np.random.default_rng(0), 4000)
    assert abs(tune_adjustment(logits, labels, COUNTS, metric) - 1) <= 0.2
    adjusted = adjust_logits(logits, COUNTS)
    assert abs(tune_adjustment(adjusted, labels, COUNTS, metric)) <= 0.2


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_no_other_tau_scores_better(metric):
    """By scikit-learn, over classes of which one never occurs."""
    scores = load("sklearn.metrics")
    functions = {
        "macro_f1": lambda y, d: scores.f1_score(
            y, d, labels=range(3), average="macro", zero_division=0
        ),
        "balanced_accuracy": scores.balanced_accuracy_score,
    }
    score = functions[metric]
    for labels in (RNG.integers(0, 3, 40), RNG.integers(0, 2, 40)):
        if metric == "balanced_accuracy":  # scikit-learn warns of decisions for absent classes
            labels[:3] = 0, 1, 2
        found = tune_adjustment(LOGITS, labels, COUNTS, metric)
        each = {
            tau: score(labels, adjust_logits(LOGITS, COUNTS, tau).argmax(1))
            for tau in np.round(np.linspace(-2, 3, 101), 2)
        }
        best = [tau for tau, value in each.items() if value > max(each.values()) - 1e-12]
        assert found == min(best, key=abs)
        assert tune_adjustment(LOGITS, labels, COUNTS, score) == found


def test_torch_tensors_are_tuned_too():
    torch = load("torch")
    logits, labels = classified(np.random.default_rng(1), 50)
    found = tune_adjustment(torch.tensor(logits), torch.tensor(labels), torch.tensor(COUNTS))
    assert found == tune_adjustment(logits, labels, COUNTS)


def refused(kind, sentence, function, *arguments, **options):
    with refuses(kind, sentence):
        function(*arguments, **options)


def test_bad_input_is_refused():
    y, whole = np.zeros(40, int), "labels must be integers"
    three = "logits must have the 3 classes of class_counts along axis -1, got shape"
    refused(ValueError, f"{three} (40, 2)", adjust_logits, LOGITS[:, :2], COUNTS)
    refused(ValueError, f"{three} (40, 2)", tune_adjustment, LOGITS[:, :2], y, COUNTS)
    refused(TypeError, "tau must be a number, got '1'", adjust_logits, LOGITS, COUNTS, "1")
    refused(ValueError, "tau must be finite, got nan", adjust_logits, LOGITS, COUNTS, np.nan)
    shapes = "logits must be (N, C) and labels (N,), N at least 1, got"
    refused(ValueError, f"{shapes} (40, 3) and (39,)", tune_adjustment, LOGITS, y[1:], COUNTS)
    refused(ValueError, f"{shapes} (0, 3) and (0,)", tune_adjustment, LOGITS[:0], y[:0], COUNTS)
    said = f"{whole}, got float64; take argmax of one-hot labels"
    refused(TypeError, said, tune_adjustment, LOGITS, y + 0.5, COUNTS)
    said = "labels must be in [0, 3), got 3; mask examples without a class with where=labels != 3"
    said += ", or subtract 1 if labels begin at 1"
    refused(ValueError, said, tune_adjustment, LOGITS, y + 3, COUNTS)
    said = "logits must be numbers, got NaN; look for where training diverged"
    refused(ValueError, said, tune_adjustment, LOGITS * np.nan, y, COUNTS)
    known = "metric must be macro_f1, balanced_accuracy or a function, got 'f1'"
    refused(ValueError, known, tune_adjustment, LOGITS, y, COUNTS, "f1")
