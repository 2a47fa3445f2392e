"""The reference at its edges: masks, nothing to average, NaN and inf, layouts, bad arguments."""

import numpy as np
import pytest

from lmf_multi import LMFSpec, class_margins
from lmf_multi.reference import (
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    focal_loss,
    ldam_loss,
    lmf_loss,
    lmf_loss_and_grad,
)
from tests.checks import refuses

REDUCTIONS = ("none", "sum", "mean", "batch_mean")
COUNTS = [625, 16, 1]
MARGINS = class_margins(COUNTS)
WEIGHTS = np.array([0.5, 1.0, 3.0])
Z = np.random.default_rng(0).normal(0, 3, (6, 3))
Y = np.array([0, 1, 2, 2, 1, 0])


# --- masks


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300])
def test_masked_examples_take_no_part(garbage, reduction):
    where = np.array([True, False, True, True, False, True])
    for labels in (np.where(where, Y, 77), np.where(where[:, None], np.eye(3)[Y], np.nan)):
        value, grad = lmf_loss_and_grad(
            np.where(where[:, None], Z, garbage),
            labels,
            MARGINS,
            WEIGHTS,
            where=where,
            reduction=reduction,
        )
        kept = lmf_loss_and_grad(Z[where], Y[where], MARGINS, WEIGHTS, reduction=reduction)
        if reduction == "none":
            np.testing.assert_array_equal(value[~where], 0.0)
            value = value[where]
        np.testing.assert_allclose(value, kept[0], rtol=1e-15)
        np.testing.assert_allclose(grad[where], kept[1], rtol=1e-15)
        np.testing.assert_array_equal(grad[~where], 0.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", ["integer", "distribution"])
def test_nothing_to_average_gives_0(form, reduction):
    labels = Y if form == "integer" else np.eye(3)[Y]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    value, grad = lmf_loss_and_grad(
        np.full((6, 3), np.nan), labels, MARGINS, WEIGHTS, where=np.zeros(6, bool), **options
    )
    np.testing.assert_array_equal(value, np.zeros(6 if reduction == "none" else ()))
    np.testing.assert_array_equal(grad, np.zeros((6, 3)))
    value, grad = lmf_loss_and_grad(Z[:0], labels[:0], MARGINS, WEIGHTS, **options)
    np.testing.assert_array_equal(value, np.zeros(0 if reduction == "none" else ()))
    assert grad.shape == (0, 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_absent_class_is_no_trouble(reduction):
    value, grad = lmf_loss_and_grad(Z, np.ones(6, int), MARGINS, reduction=reduction)
    assert np.isfinite(value).all()
    assert np.isfinite(grad).all()


def test_weight_0_on_every_label_gives_0():
    value, grad = lmf_loss_and_grad(Z, np.zeros(6, int), MARGINS, [0.0, 1.0, 1.0])
    assert value == 0.0
    np.testing.assert_array_equal(grad, np.zeros((6, 3)))


# --- NaN and inf


@pytest.mark.parametrize("column", [0, 1])
def test_nan_spoils_its_row_and_the_mean(column):
    z = Z.copy()
    z[2, column] = np.nan
    value, grad = lmf_loss_and_grad(z, np.zeros(6, int), MARGINS, reduction="none")
    np.testing.assert_array_equal(np.isnan(value), np.arange(6) == 2)
    np.testing.assert_array_equal(np.isnan(grad).all(1), np.arange(6) == 2)
    np.testing.assert_array_equal(np.isnan(grad).any(1), np.arange(6) == 2)
    assert np.isnan(lmf_loss(z, np.zeros(6, int), MARGINS))


def test_an_impossible_class_is_as_good_as_absent():
    z = np.insert(Z, 1, -np.inf, axis=1)
    y = np.where(Y == 0, 0, Y + 1)
    margins, weights = np.insert(MARGINS, 1, 0.3), np.insert(WEIGHTS, 1, 9.0)
    for labels, q in [(y, Y), (np.eye(4)[y], np.eye(3)[Y])]:
        value, grad = lmf_loss_and_grad(z, labels, margins, weights)
        np.testing.assert_allclose(value, lmf_loss(Z, q, MARGINS, WEIGHTS), rtol=1e-15)
        np.testing.assert_array_equal(grad[:, 1], 0.0)


def test_an_impossible_target_costs_infinity_and_the_gradient_stays_finite():
    z = np.array([[-np.inf, 0.0, 0.0]])
    value, grad = lmf_loss_and_grad(z, [0], MARGINS, alpha=1.5, beta=1.0, scale=30.0)
    assert value == np.inf
    # the limits: -(α s + β) for the target, shared evenly by the two others
    np.testing.assert_allclose(grad, [[-46.0, 23.0, 23.0]], rtol=1e-15)


# --- layouts and dtypes


def test_class_axis_and_batch_shapes():
    z, y = Z.reshape(2, 3, 3), Y.reshape(2, 3)
    where = np.array([[True, False, True], [True, True, False]])
    flat = lmf_loss_and_grad(Z, Y, MARGINS, where=where.ravel())
    for axis in (0, 1, 2, -1, -2, -3):
        value, grad = lmf_loss_and_grad(
            np.moveaxis(z, -1, axis), y, MARGINS, axis=axis, where=where
        )
        assert value == flat[0]
        np.testing.assert_array_equal(np.moveaxis(grad, axis, -1).reshape(6, 3), flat[1])
    per_pixel = lmf_loss(z, y, MARGINS, reduction="none")
    single = lmf_loss(Z[4], Y[4], MARGINS, reduction="none")
    assert per_pixel.shape == (2, 3)
    assert single.shape == ()
    np.testing.assert_array_equal(per_pixel[1, 1], single)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_are_taken_as_they_are(dtype):
    z = Z.astype(dtype)
    value, grad = lmf_loss_and_grad(z, Y, MARGINS)
    assert value.dtype == grad.dtype == np.float64
    assert value == lmf_loss(z.astype(np.float64), Y, MARGINS)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64"])
def test_integer_labels_of_every_kind(dtype):
    assert lmf_loss(Z, Y.astype(dtype), MARGINS) == lmf_loss(Z, Y, MARGINS)


def test_inputs_are_not_changed():
    z, q = Z.copy(), np.eye(3)[Y]
    where = np.arange(6) != 3
    lmf_loss_and_grad(z, q, MARGINS, WEIGHTS, where=where, label_smoothing=0.3)
    np.testing.assert_array_equal(z, Z)
    np.testing.assert_array_equal(q, np.eye(3)[Y])


# --- classes


def test_classes_remember_the_functions_arguments():
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    where = np.arange(6) != 3
    margins = class_margins(COUNTS, 0.8)
    actual = LMFLoss(COUNTS, alpha=0.7, gamma=2, max_margin=0.8, scale=5, **options)
    expected = lmf_loss(Z, Y, margins, margins, alpha=0.7, gamma=2, scale=5, where=where, **options)
    assert actual(Z, Y, where=where) == expected
    actual = LDAMLoss(COUNTS, max_margin=0.8, scale=5, class_weight=WEIGHTS, **options)
    assert actual(Z, Y) == ldam_loss(Z, Y, margins, WEIGHTS, scale=5, **options)
    actual = FocalLoss(COUNTS, gamma=2, class_weight="margin", max_margin=0.8, **options)
    assert actual(Z, Y) == focal_loss(Z, Y, margins, gamma=2, **options)
    assert FocalLoss()(Z, Y) == focal_loss(Z, Y)
    assert LDAMLoss(COUNTS)(Z, Y) == ldam_loss(Z, Y, MARGINS)
    assert LMFLoss(COUNTS)(Z, Y) == lmf_loss(Z, Y, MARGINS, MARGINS)


def test_from_spec():
    spec = LMFSpec(
        COUNTS, alpha=0.7, beta=0.3, gamma=2, max_margin=0.8, scale=5, class_weight="balanced",
        label_smoothing=0.1,
    )  # fmt: skip
    smoothing = {"label_smoothing": 0.1}
    expected = lmf_loss(
        Z, Y, spec.margins, spec.weights, alpha=0.7, beta=0.3, gamma=2, scale=5, **smoothing
    )
    assert LMFLoss.from_spec(spec)(Z, Y) == expected
    expected = ldam_loss(Z, Y, spec.margins, spec.weights, scale=5, **smoothing)
    assert LDAMLoss.from_spec(spec)(Z, Y) == expected
    expected = focal_loss(Z, Y, spec.weights, gamma=2, **smoothing)
    assert FocalLoss.from_spec(spec, axis=-1)(Z, Y) == expected


def test_legacy_alpha_weights_focal():
    ldam, focal = ldam_loss(Z, Y, MARGINS, WEIGHTS), focal_loss(Z, Y, WEIGHTS, gamma=2)
    loss = LMFLoss.from_legacy(COUNTS, WEIGHTS, 0.2, 0.7)
    np.testing.assert_allclose(loss(Z, Y), 0.7 * ldam + 0.2 * focal, rtol=1e-14)
    np.testing.assert_allclose(LMFLoss.from_legacy(COUNTS, WEIGHTS)(Z, Y), ldam + focal, rtol=1e-14)
    assert LDAMLoss.from_legacy(COUNTS, 0.5, WEIGHTS, 30)(Z, Y) == ldam
    assert FocalLoss.from_legacy(WEIGHTS, 2)(Z, Y) == focal


def test_official_alpha_weights_ldam():
    ldam, focal = ldam_loss(Z, Y, MARGINS, MARGINS), focal_loss(Z, Y, MARGINS)
    loss = LMFLoss.from_official(COUNTS, alpha=0.2, beta=0.7)
    np.testing.assert_allclose(loss(Z, Y), 0.2 * ldam + 0.7 * focal, rtol=1e-14)
    assert LDAMLoss.from_official(COUNTS)(Z, Y) == ldam
    assert FocalLoss.from_official(MARGINS)(Z, Y) == focal


# --- bad arguments reach the checks of the spec


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"gamma": -1}, ValueError, "gamma must be at least 0, got -1"),
        ({"scale": 0}, ValueError, "scale must be positive, got 0"),
        ({"alpha": np.nan}, ValueError, "alpha must be finite, got nan"),
        ({"beta": "1"}, TypeError, "beta must be a number, got '1'"),
        ({"beta": [1.0]}, TypeError, "beta must be a number, got [1.0]"),
        ({"gamma": np.array(1.0)}, TypeError, "gamma must be a number, got array(1.)"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be between 0 and 1, got 2"),
        (
            {"reduction": "average"},
            ValueError,
            "reduction must be one of none, sum, mean, batch_mean, got 'average'",
        ),
        (
            {"labels": Y + 1},
            ValueError,
            "labels must be in [0, 3), got 3; mask examples without a class with "
            "where=labels != 3, or subtract 1 if labels begin at 1",
        ),
        (
            {"labels": Y - 1},
            ValueError,
            "labels must be in [0, 3), got -1; "
            "mask examples without a class with where=labels != -1",
        ),
        (
            {"margins": [0.5, 0.5]},
            ValueError,
            "margins must have shape (3,), one number for each class of the logits (6, 3), "
            "got (2,); check class_counts",
        ),
        (
            {"class_weight": [1.0, 1.0]},
            ValueError,
            "class_weight must have shape (3,), one number for each class of the logits (6, 3), "
            "got (2,); check class_counts",
        ),
        ({"where": np.ones(6)}, TypeError, "where must be bool, got float64; use mask != 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, sentence):
    with refuses(kind, sentence):
        lmf_loss(**{"logits": Z, "labels": Y, "margins": MARGINS, **arguments})


def test_classes_refuse_what_the_spec_refuses():
    with refuses(ValueError, "reduction must be one of none, sum, mean, batch_mean, got 'avg'"):
        LMFLoss(COUNTS, reduction="avg")
    with refuses(ValueError, "gamma must be at least 0, got -1"):
        FocalLoss(gamma=-1)
    sentence = (
        "class_weight 'balanced' is computed from class counts, got class_counts=None; "
        "pass class_counts, or as an array what lmf_multi.class_weights computes"
    )
    with refuses(ValueError, sentence):
        FocalLoss(class_weight="balanced")
    with refuses(
        ValueError, "class_weight must have shape (C,), one number for each class, got ()"
    ):
        FocalLoss(class_weight=2.0)
