"""The reference against 50 digits, numbers worked by hand, limits and finite differences."""

import math

import numpy as np
import pytest

from lmf_multi import class_margins, log_priors
from lmf_multi.reference import (
    LMFLoss,
    focal_loss,
    ldam_loss,
    lmf_loss,
    lmf_loss_and_grad,
)
from tests.checks import assert_within
from tests.exact import exact_lmf, exact_terms
from tests.hard import GAMMAS, SCALES, hard_examples

RELATIVE = 1e-12
TINY = np.finfo(np.float64).smallest_normal
MARGINS = class_margins([625, 16, 1])
WEIGHTS = np.array([0.5, 1.0, 3.0])
LN2, LN3 = math.log(2), math.log(3)


def logits_of(seed, *shape, size=3.0):
    return np.random.default_rng(seed).normal(0, size, shape)


# --- against 50 digits


def check_rows(logits, labels, margins, w, added=None, **numbers):
    options = {"logit_adjustment": added, "reduction": "none", **numbers}
    value, grad = lmf_loss_and_grad(logits, labels, margins, w, **options)
    options = {"added": added, **numbers}
    rows = [exact_lmf(z, j, margins, w, **options) for z, j in zip(logits, labels, strict=True)]
    exact, exact_grad = (np.array(part) for part in zip(*rows, strict=True))
    assert_within(value, exact, RELATIVE * np.abs(exact) + TINY, "value")
    largest = np.abs(exact_grad).max(1, keepdims=True)
    assert_within(grad, exact_grad, RELATIVE * largest + TINY, "gradient")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_hard_examples(alpha, beta, gamma, scale):
    logits, labels = hard_examples()
    numbers = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale}
    check_rows(logits, labels, MARGINS, WEIGHTS, **numbers)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tau", [-0.5, 1.0, 3.0])
def test_hard_examples_adjusted(tau, scale):
    logits, labels = hard_examples()
    numbers = {"alpha": 1.5, "beta": 1.0, "gamma": 0.5, "scale": scale}
    added = tau * log_priors([625, 16, 1])
    check_rows(logits, labels, MARGINS, WEIGHTS, added, **numbers)


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_hard_examples_of_few_and_many_classes(num_classes):
    logits, labels = hard_examples(num_classes)
    if num_classes == 1000:  # a sixth of them: 400 digits take their time
        logits, labels = logits[::6], labels[::6]
    margins = class_margins(np.arange(num_classes, 0, -1) ** 2)
    check_rows(logits, labels, margins, margins, alpha=1.5, beta=1.0, gamma=1.5, scale=30.0)


def by_hand(q, where, smoothing, reduction, logits, w, alpha, beta, gamma, scale):
    """Values, gradients and the size of what was summed into them, from the exact terms."""
    N, C = logits.shape
    terms = [
        [exact_terms(logits[i], j, MARGINS[j], gamma, scale) for j in range(C)] for i in range(N)
    ]
    L, F, L_grad, F_grad = (
        np.array([[terms[i][j][part] for j in range(C)] for i in range(N)]) for part in range(4)
    )
    W, n = (q @ w)[where].sum(), where.sum()
    by_weight = {"mean": W, "batch_mean": n}.get(reduction, 1.0)
    by_examples = n if "mean" in reduction else 1.0
    share = ((1 - smoothing) * q + smoothing / C) * w * where[:, None]
    a, b = alpha * share / by_weight, beta * share / by_examples
    loss = (a * L + b * F).sum(1)
    grad = np.einsum("ij,ijk->ik", a, L_grad) + np.einsum("ij,ijk->ik", b, F_grad)
    size = (a * np.abs(L_grad).max(2) + b * np.abs(F_grad).max(2)).sum(1, keepdims=True)
    return (loss if reduction == "none" else loss.sum()), grad, size


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batch_mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_reductions_by_hand(soft, smoothing, reduction):
    """Weights, soft labels, masks and smoothing together; finite logits, hard and easy."""
    logits, labels = hard_examples()
    finite = np.isfinite(logits).all(1)
    logits, labels = logits[finite], labels[finite]
    q = np.random.default_rng(0).dirichlet([0.5] * 3, len(labels)) if soft else np.eye(3)[labels]
    where = np.arange(len(labels)) % 3 != 1
    numbers = {"alpha": 1.5, "beta": 0.7, "gamma": 0.5, "scale": 30.0}
    value, grad = lmf_loss_and_grad(
        np.where(where[:, None], logits, np.nan),
        q if soft else np.where(where, labels, -100),
        MARGINS,
        WEIGHTS,
        where=where,
        label_smoothing=smoothing,
        reduction=reduction,
        **numbers,
    )
    exact, exact_grad, size = by_hand(q, where, smoothing, reduction, logits, WEIGHTS, **numbers)
    assert_within(value, exact, RELATIVE * np.abs(exact) + TINY, "value")
    # relative to the contributions, which have both signs and cancel, not to their sum
    assert_within(grad, exact_grad, RELATIVE * size + TINY, "gradient")


# --- worked by hand


def test_focal_of_the_paper():
    # Lin et al., section 3.2: with γ = 2, p_t = 0.9 lowers the loss 100 times, 0.968 about 1000
    for p, lower in [(0.9, 0.1**2), (0.968, 0.032**2)]:
        logits = np.log([[p, 1 - p]])
        np.testing.assert_allclose(focal_loss(logits, [0], gamma=2), -lower * math.log(p), 1e-13)
    # p = 1/2: (1/2)² ln 2
    np.testing.assert_allclose(focal_loss(np.zeros((1, 2)), [1], gamma=2), 0.25 * LN2, 1e-15)


def test_ldam_of_the_paper():
    # the target's logit exceeds the others by its margin: C equal exponentials, -log 1/C, any s
    for s in (1.0, 30.0):
        at_margin = np.array([[0.0, 0.25, 0.0]])
        np.testing.assert_allclose(ldam_loss(at_margin, [1], MARGINS, scale=s), LN3, 1e-15)
    # z = 0, Δ = ln 2, s = 1: -log (1/2 / (1/2 + 1)) = ln 3; s = 2: -log (1/4 / (1/4 + 1)) = ln 5
    for s, golden in [(1.0, LN3), (2.0, math.log(5))]:
        value = ldam_loss(np.zeros((1, 2)), [0], [LN2, 0.5], scale=s)
        np.testing.assert_allclose(value, golden, 1e-15)


def test_balanced_softmax_of_the_paper():
    # Ren et al., equation 4: -log of n_y e^{z_y} over the sum of n_k e^{z_k}
    n, z = np.array([625, 16, 1]), logits_of(0, 50, 3)
    y, e = np.arange(50) % 3, n * np.exp(z)
    golden = -np.log(e[np.arange(50), y] / e.sum(1))
    options = {"alpha": 0, "gamma": 0, "class_weight": None, "logit_adjustment": 1}
    loss = LMFLoss(n, reduction="none", **options)
    np.testing.assert_allclose(loss(z, y), golden, 1e-13)
    # a constant for all classes changes nothing
    added = np.log(n) + 5.0
    loss = focal_loss(z, y, gamma=0, logit_adjustment=added, reduction="none")
    np.testing.assert_allclose(loss, golden, 1e-13)


def test_mixture_and_mean_by_hand():
    # s = 1, Δ = (ln 2, 0), γ = 2. Row (0, 0), label 0: LDAM ln 3, focal ln 2 / 4.
    # Row (0, ln 3), label 1: p = 3/4, LDAM ln 4/3, focal (1/16) ln 4/3. Weights 2 and 1/2.
    logits, labels = np.array([[0.0, 0.0], [0.0, LN3]]), [0, 1]
    ldam = np.array([LN3, math.log(4 / 3)])
    focal = np.array([LN2 / 4, math.log(4 / 3) / 16])
    w = np.array([2.0, 0.5])
    golden = {
        "none": w * (1.5 * ldam + focal),
        "sum": (w * (1.5 * ldam + focal)).sum(),
        "mean": 1.5 * (w * ldam).sum() / 2.5 + (w * focal).sum() / 2,
        "batch_mean": (w * (1.5 * ldam + focal)).sum() / 2,
    }
    for reduction, value in golden.items():
        actual = lmf_loss(logits, labels, [LN2, 0.0], w, gamma=2, scale=1.0, reduction=reduction)
        np.testing.assert_allclose(actual, value, 1e-15, err_msg=reduction)


def test_gradient_by_hand():
    # s = 1, Δ = 0, γ = 0, α = β = 1 is twice cross-entropy: 2 (p - e_y), p = (1/4, 3/4)
    logits = np.array([[0.0, LN3]])
    _, grad = lmf_loss_and_grad(logits, [0], [0.0, 0.0], alpha=1, beta=1, gamma=0, scale=1.0)
    np.testing.assert_allclose(grad, [[-1.5, 1.5]], 1e-15)


# --- limits


def cross_entropy(logits, labels):
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels]


def test_limits():
    z, y = logits_of(1, 8, 3, size=1.0), np.arange(8) % 3
    options = {"reduction": "none"}
    close = {"rtol": 1e-13}

    def mixture(margins=MARGINS, **numbers):
        return lmf_loss(z, y, margins, WEIGHTS, **numbers, **options)

    ldam = ldam_loss(z, y, MARGINS, WEIGHTS, **options)
    focal = focal_loss(z, y, WEIGHTS, **options)
    np.testing.assert_array_equal(mixture(alpha=0), focal)
    np.testing.assert_array_equal(mixture(beta=0, alpha=1), ldam)
    np.testing.assert_allclose(mixture(), 1.5 * ldam + focal, **close)
    np.testing.assert_array_equal(mixture(alpha=0, beta=0), np.zeros(8))
    ce = cross_entropy(z, y)
    np.testing.assert_allclose(focal_loss(z, y, gamma=0, **options), ce, **close)
    zero = np.zeros(3)
    np.testing.assert_allclose(ldam_loss(z, y, zero, scale=1.0, **options), ce, **close)
    scaled = ldam_loss(z, y, zero, scale=2.0, **options)
    np.testing.assert_allclose(scaled, cross_entropy(2 * z, y), **close)
    assert (ldam > ldam_loss(z, y, zero, WEIGHTS, **options)).all()  # a margin asks for more


# --- gradients


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("label", [0, 1, 2, "soft"])
def test_gradient_by_central_differences(label, gamma):
    z, h = logits_of(2, 4, 3, size=1.0), 1e-5
    labels = (
        np.full(4, label) if label != "soft" else np.random.default_rng(3).dirichlet([1] * 3, 4)
    )

    def f(z):
        return lmf_loss_and_grad(
            z, labels, MARGINS, WEIGHTS, gamma=gamma, scale=5.0, label_smoothing=0.1
        )

    numeric = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[index] = h
        numeric[index] = (f(z + step)[0] - f(z - step)[0]) / (2 * h)
    np.testing.assert_allclose(f(z)[1], numeric, rtol=1e-7, atol=1e-9)


def test_gradient_rows_sum_to_zero():
    z = logits_of(4, 5, 2, 6)
    q = np.random.default_rng(5).dirichlet([1] * 6, (5, 2))
    margins = class_margins([9, 8, 7, 3, 2, 1])
    _, grad = lmf_loss_and_grad(z, q, margins, margins, reduction="none")
    assert np.abs(grad).max() > 1
    np.testing.assert_allclose(grad.sum(-1), np.zeros((5, 2)), atol=1e-12)


def test_permuting_classes_permutes_gradients():
    z, y = logits_of(6, 7, 3), np.array([0, 1, 2, 0, 1, 2, 1])
    order = np.array([2, 0, 1])
    value, grad = lmf_loss_and_grad(z, y, MARGINS, WEIGHTS, label_smoothing=0.2)
    permuted = lmf_loss_and_grad(
        z[:, order], np.argsort(order)[y], MARGINS[order], WEIGHTS[order], label_smoothing=0.2
    )
    np.testing.assert_allclose(permuted[0], value, rtol=1e-14)
    np.testing.assert_allclose(permuted[1], grad[:, order], rtol=0, atol=1e-14)


# --- labels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batch_mean"])
def test_one_hot_equals_integer_exactly(reduction):
    logits, labels = hard_examples()
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        integer = lmf_loss_and_grad(logits, labels, MARGINS, WEIGHTS, **options)
        one_hot = lmf_loss_and_grad(logits, np.eye(3)[labels], MARGINS, WEIGHTS, **options)
        for a, b in zip(integer, one_hot, strict=True):
            np.testing.assert_array_equal(a, b)


def test_distributions_are_linear():
    z, q = logits_of(7, 6, 3), np.random.default_rng(8).dirichlet([1] * 3, 6)
    options = {"reduction": "none"}
    classes = [lmf_loss_and_grad(z, np.full(6, j), MARGINS, WEIGHTS, **options) for j in range(3)]
    value, grad = lmf_loss_and_grad(z, q, MARGINS, WEIGHTS, **options)
    np.testing.assert_allclose(value, sum(q[:, j] * classes[j][0] for j in range(3)), 1e-14)
    expected = sum(q[:, j, None] * classes[j][1] for j in range(3))
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-13)
