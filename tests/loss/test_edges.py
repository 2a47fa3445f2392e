"""Every backend and mode at the edges: masks, nothing to average, NaN, inf, labels out of range."""

from dataclasses import replace

import numpy as np
import pytest

from tests.cases import Case
from tests.checks import refuses

COUNTS, WEIGHTS = (625, 16, 1), np.array([0.5, 1.0, 3.0])
LOGITS = np.round(np.random.default_rng(0).normal(0, 3, (6, 3)), 2).astype(np.float32)
BASE = Case(LOGITS.astype(np.float64), np.array([0, 1, 2, 2, 1, 0]), COUNTS, WEIGHTS)
SOFT = replace(BASE, labels=np.eye(3)[BASE.labels], label_dtype="float32")
REDUCTIONS = ("none", "sum", "mean", "batch_mean")


def runs(backend, case):
    """The case by function and by class with every reduction, as far as the backend takes them."""
    reductions = ("none", "mean") if backend.compiles else REDUCTIONS
    variants = [
        replace(case, reduction=reduction, as_class=as_class)
        for reduction in reductions
        for as_class in (False, True)
    ]
    taken = [case for case in variants if backend.takes(case)]
    assert taken, "nothing to run"
    for case in taken:
        result = backend(case)
        case.check(result)
        yield case, result


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_masked_rows_get_no_gradient(backend, garbage):
    where = np.array([True, False, True, False, True, True])
    logits = np.where(where[:, None], BASE.logits, garbage)
    case = replace(BASE, logits=logits, where=where)
    for smoothing in (0.0, 0.1):
        for _, result in runs(backend, replace(case, label_smoothing=smoothing)):
            np.testing.assert_array_equal(result.grad[~where], 0.0)
            assert (np.abs(result.grad[where]).max(1) > 0).all()


def test_masked_distributions(backend):
    where = np.array([True, False, True, False, True, True])
    case = replace(
        SOFT,
        logits=np.where(where[:, None], SOFT.logits, np.nan),
        labels=np.where(where[:, None], SOFT.labels, np.nan),
        where=where,
    )
    if not backend.takes(case):
        pytest.skip("distributions are masked by their weight here")
    for _, result in runs(backend, case):
        np.testing.assert_array_equal(result.grad[~where], 0.0)


def test_all_masked_is_0(backend):
    case = replace(BASE, logits=np.full((6, 3), np.nan), where=np.zeros(6, bool))
    for smoothing in (0.0, 0.1):
        for _, result in runs(backend, replace(case, label_smoothing=smoothing)):
            np.testing.assert_array_equal(result.value, np.zeros(result.value.shape))
            np.testing.assert_array_equal(result.grad, np.zeros((6, 3)))


@pytest.mark.parametrize("case", [BASE, SOFT], ids=["integer", "soft"])
def test_empty_batch_is_0(backend, case):
    case = replace(case, logits=case.logits[:0], labels=case.labels[:0])
    if backend.name == "torch-vmap":
        pytest.skip("torch.func.vmap maps over no empty axis")
    for _, result in runs(backend, case):
        np.testing.assert_array_equal(result.value, np.zeros(result.value.shape))
        assert result.grad.shape == (0, 3)


def test_one_class_of_two(backend):
    labels = np.ones(6, int)
    for _ in runs(backend, replace(BASE, labels=labels)):
        pass
    two = replace(BASE, logits=BASE.logits[:, :2], class_counts=(16, 1), class_weight="balanced")
    for _ in runs(backend, replace(two, labels=labels)):
        pass


def test_weights_of_0(backend):
    case = replace(BASE, class_weight=np.array([0.0, 1.0, 2.0]))
    for _ in runs(backend, case):
        pass
    for _, result in runs(backend, replace(case, labels=np.zeros(6, int))):
        np.testing.assert_array_equal(result.value, np.zeros(result.value.shape))
        np.testing.assert_array_equal(result.grad, np.zeros((6, 3)))


@pytest.mark.parametrize("case", [BASE, SOFT], ids=["integer", "soft"])
@pytest.mark.parametrize("column", [0, 1])
def test_nan_spoils_its_row_and_no_other(backend, case, column):
    logits = case.logits.copy()
    logits[2, column] = np.nan
    for smoothing in (0.0, 0.1):
        for each, result in runs(backend, replace(case, logits=logits, label_smoothing=smoothing)):
            spoilt = np.arange(6) == 2
            np.testing.assert_array_equal(np.isnan(result.grad).all(1), spoilt)
            np.testing.assert_array_equal(np.isnan(result.grad).any(1), spoilt)
            expected = spoilt if each.reduction == "none" else True
            np.testing.assert_array_equal(np.isnan(result.value), expected)


def test_impossible_classes_and_targets(backend):
    # -inf on another class, on all others, and on the target itself
    logits = BASE.logits.copy()
    logits[0, 2] = logits[1, [0, 2]] = logits[3, 2] = -np.inf
    integer = replace(BASE, logits=logits)
    for _, result in runs(backend, integer):
        assert np.isfinite(result.grad).all()
    for _ in runs(backend, replace(SOFT, logits=logits)):
        pass
    # a possible mixture, and one whose impossible class has no share
    logits = BASE.logits.copy()
    labels = np.array([[0.5, 0.5, 0.0], *[[0.0, 0.75, 0.25]] * 5])
    logits[0, 2] = logits[1, 0] = -np.inf
    for _, result in runs(backend, replace(SOFT, logits=logits, labels=labels)):
        assert np.isfinite(result.value).all()


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range(backend, label):
    """An error where labels can be looked at; NaN where a compiler hides them."""
    labels = BASE.labels.copy()
    labels[2] = label
    case = replace(BASE, labels=labels)
    inside = replace(BASE, labels=np.where(labels == label, 0, labels)).exact
    by_mask = f"where=labels != {label}"
    if backend.framework == "torch":
        by_mask = f"ignore_index=-100, or pass ignore_index={label}"
    by_mask += ", or subtract 1 if labels begin at 1" if label == 3 else ""
    for smoothing in (0.0, 0.1):
        case = replace(case, label_smoothing=smoothing)
        if not backend.traced:
            sentence = f"labels must be in [0, 3), got {label}; mask examples without a class with "
            with refuses(ValueError, sentence + by_mask):
                backend(case)
            continue
        result = backend(case)
        np.testing.assert_array_equal(np.isnan(result.value), np.arange(6) == 2)
        assert np.isnan(result.grad[2]).all()
        if smoothing == 0:
            others = np.arange(6) != 2
            np.testing.assert_allclose(result.value[others], inside[0][others], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_comparison_can_fail(backend, dtype):
    """Sabotage: what is wrong by 1e-3, loses a mask or has another dtype is refused."""
    where = np.array([True, False, True, True, True, True])
    case = replace(BASE, dtype=dtype, logits=np.round(BASE.logits), where=where)
    result = backend(case)
    case.check(result)
    entry = np.zeros((6, 3))
    entry[2, 1] = np.abs(result.grad[2]).max()
    size = 1e-3 if dtype != "bfloat16" else 1e-2  # the gradient's own rounding is 4e-3 there
    for wrong in (
        result._replace(value=result.value * (1 + 1e-3)),
        result._replace(grad=result.grad * (1 + size)),
        result._replace(grad=result.grad + size * entry),
        result._replace(grad=np.where(entry != 0, np.nan, result.grad)),
        result._replace(value_dtype="float16"),
        result._replace(grad_dtype="float16"),
        backend(replace(case, where=None)),
    ):
        with pytest.raises(AssertionError):
            case.check(wrong)
