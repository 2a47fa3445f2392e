"""The sigmoid form: its identity with the softmax form, its edges, its errors, its layouts."""

from dataclasses import replace

import numpy as np
import pytest

from lmf_multi import reference
from tests.cases import SigmoidCase
from tests.checks import refuses
from tests.exact import exact_lmf
from tests.frameworks import load

RNG = np.random.default_rng(0)
X = np.round(RNG.normal(0, 3, (4, 3)), 2)
T = RNG.integers(0, 2, (4, 3))
SOFT = np.round(RNG.uniform(0, 1, (4, 3)), 2)
NEGATIVE, POSITIVE = (625, 40, 16), (1, 40, 625)
BASE = SigmoidCase(X, T, (NEGATIVE, POSITIVE), "margin")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batch_mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("t", [T, SOFT], ids=["integer", "soft"])
def test_it_is_the_softmax_form_of_0_and_x(t, smoothing, reduction):
    margins, weights = np.array([0.1, 0.5]), np.array([0.3, 2.0])
    where = RNG.random(X.shape) < 0.7
    options = {"label_smoothing": smoothing, "reduction": reduction, "where": where}
    value, grad = reference.sigmoid_lmf_loss_and_grad(X, t, margins, weights, **options)
    two, q = np.stack([np.zeros_like(X), X], -1), np.stack([1.0 - t, t], -1)
    expected, pair = reference.lmf_loss_and_grad(two, q, margins, weights, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, pair[..., 1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.5])
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0])
def test_fifty_digits(gamma, scale):
    margins, weights = (0.1, 0.5), (0.5, 3.0)
    odds = np.array([0.0, 0.3, 2.0, 17.0, 40.0, 90.0, 720.0, -0.3, -2.0, -40.0, -90.0, -720.0])
    for label in (0, 1):
        value, grad = reference.sigmoid_lmf_loss_and_grad(
            odds, np.full(12, label), margins, weights, gamma=gamma, scale=scale, reduction="none"
        )
        for x, v, g in zip(odds, value, grad, strict=True):
            exact = exact_lmf((0.0, x), label, margins, weights, 1.5, 1.0, gamma, scale)
            np.testing.assert_allclose(v, exact[0], rtol=1e-12, atol=2.0**-1022)
            np.testing.assert_allclose(g, exact[1][1], rtol=1e-12, atol=2.0**-1022)


def test_adjusted_log_odds():
    """Those of the softmax form on two adjusted logits, for each label along an axis."""
    loss = reference.SigmoidLMFLoss(POSITIVE, NEGATIVE, logit_adjustment=1.5)
    odds = np.log(np.divide(POSITIVE, NEGATIVE))
    np.testing.assert_allclose(loss.logit_adjustment, 1.5 * odds)
    one = reference.SigmoidLMFLoss(1, 625, logit_adjustment=-1.0).logit_adjustment
    np.testing.assert_allclose(one, np.log(625))
    margins, weights = (0.1, 0.5), (0.5, 3.0)
    x, t = np.linspace(-3, 3, 12).reshape(2, 3, 2), np.arange(12).reshape(2, 3, 2) % 2
    options = {"reduction": "none", "logit_adjustment": odds, "axis": 1}
    value, grad = reference.sigmoid_lmf_loss_and_grad(x, t, margins, weights, **options)
    two, added = np.stack([np.zeros_like(x), x], -1), odds[:, None]
    for j in range(3):
        both = {"reduction": "none", "logit_adjustment": [0.0, added[j, 0]]}
        each = (two[:, j], t[:, j], margins, weights)
        expected, pair = reference.lmf_loss_and_grad(*each, **both)
        np.testing.assert_allclose(value[:, j], expected, rtol=1e-13)
        np.testing.assert_allclose(grad[:, j], pair[..., 1], rtol=1e-13, atol=1e-15)


def test_margins_of_each_label():
    """From its own two counts, in the order negative, positive."""
    loss = reference.SigmoidLMFLoss(POSITIVE, NEGATIVE)
    np.testing.assert_allclose(loss.margins, [[0.1, 0.5], [0.5, 0.5], [0.5, 0.2]])
    assert loss.class_weight is not loss.margins
    np.testing.assert_array_equal(loss.class_weight, loss.margins)
    one = reference.SigmoidLMFLoss(1, 625, class_weight="balanced")
    np.testing.assert_allclose(one.margins, [0.1, 0.5])
    np.testing.assert_allclose(one.class_weight, [626 / 1250, 626 / 2])


def variants(backend, case):
    taken = [
        replace(case, reduction=reduction, as_class=as_class)
        for reduction in ("none", "mean")
        for as_class in (False, True)
    ]
    if backend.mode == "vmap":
        taken = [replace(each, class_counts=(625, 16)) for each in taken]
    taken = [each for each in taken if backend.takes(each)]
    assert taken
    return taken


@pytest.mark.parametrize("smoothing", [1e-2, 1e-4])
def test_a_little_smoothing(backend, smoothing):
    """Where it is what is left of a share, which float32's neighbours of 1 cannot tell."""
    logits = np.where(T == 1, 1, -1) * np.linspace(1, 9, 12).reshape(4, 3)
    case = replace(BASE, logits=logits, label_smoothing=smoothing, scale=4.0)
    for each in variants(backend, case):
        each.check(backend(each))


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_nobody_annotated_gets_no_gradient(backend, garbage):
    where = np.arange(12).reshape(4, 3) % 3 != 1
    labels = np.where(where, T, -1)
    case = replace(BASE, logits=np.where(where, X, garbage), labels=labels, where=where)
    for each in variants(backend, case):
        result = backend(each)
        each.check(result)
        np.testing.assert_array_equal(result.grad[~where], 0.0)
        assert (np.abs(result.grad[where]) > 0).any()


def test_nothing_annotated_is_0(backend):
    case = replace(BASE, logits=np.full((4, 3), np.nan), where=np.zeros((4, 3), bool))
    for each in variants(backend, case):
        result = backend(each)
        np.testing.assert_array_equal(result.value, np.zeros(result.value.shape))
        np.testing.assert_array_equal(result.grad, np.zeros((4, 3)))


def test_nan_spoils_its_element_and_no_other(backend):
    logits = X.copy()
    logits[2, 1] = np.nan
    for labels, dtype in ((T, "int32"), (SOFT, "float32")):
        case = replace(BASE, logits=logits, labels=labels, label_dtype=dtype)
        for each in variants(backend, case):
            result = backend(each)
            np.testing.assert_array_equal(np.isnan(result.grad), np.isnan(logits))


def test_certain_elements(backend):
    """An infinite log-odds on the right side costs nothing, on the wrong side infinity."""
    logits = np.array([[np.inf, -np.inf, np.inf, -np.inf]]).T * np.ones(3)
    labels = np.array([[1, 0, 0, 1]]).T * np.ones(3, int)
    case = replace(BASE, logits=logits, labels=labels)
    for each in variants(backend, case)[:1]:
        result = backend(each)
        each.check(result)
        assert np.isfinite(result.grad).all()


@pytest.mark.parametrize("label", [-1, 2, 1.5])
def test_label_out_of_range(backend, label):
    labels = np.where(np.arange(12).reshape(4, 3) == 7, label, T)
    dtype = "float32" if isinstance(label, float) else "int32"
    case = replace(BASE, labels=labels, label_dtype=dtype)
    (case,) = variants(backend, case)[:1]
    if not backend.traced:
        mask = "where or ignore_index=-100" if backend.framework == "torch" else "where"
        if isinstance(label, int):  # another number can only be a mistaken probability
            own = f"=labels != {label}"
            mask += f", or pass ignore_index={label}" if backend.framework == "torch" else own
        sentence = f"labels must be in [0, 1], got {label}; mask labels that were not annotated"
        with refuses(ValueError, f"{sentence} with {mask}"):
            backend(case)
        return
    result = backend(case)
    np.testing.assert_array_equal(np.isnan(result.value), labels == label)
    np.testing.assert_array_equal(np.isnan(result.grad), labels == label)


def test_the_comparison_can_fail(backend):
    case = variants(backend, BASE)[0]
    result = backend(case)
    case.check(result)
    for wrong in (
        result._replace(value=result.value * (1 + 1e-3)),
        result._replace(grad=result.grad * (1 + 1e-3)),
        backend(replace(case, labels=1 - T)),
        backend(replace(case, class_counts=case.class_counts[::-1])),
    ):
        with pytest.raises(AssertionError):
            case.check(wrong)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ((0, 5), ValueError, "positive_counts must be at least 1 for every label, got 0 for label "
         "0; leave the label out of the loss"),
        (([3, 5], [5]), ValueError, "positive_counts and negative_counts must have the same shape, "
         "got (2,) and (1,)"),
        ((3, 2.5), ValueError, "negative_counts must be whole numbers, got 2.5 for label 0; "
         "pass numbers of examples, not frequencies"),
        (("many", 5), TypeError, "positive_counts must be numbers, got 'many'"),
        (([[3]], [[5]]), ValueError, "positive_counts must be a number, or hold one for each "
         "label, got shape (1, 1)"),
    ],
)  # fmt: skip
def test_bad_counts_are_refused(arguments, kind, sentence):
    with refuses(kind, sentence):
        reference.SigmoidLMFLoss(*arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"labels": T[:3]}, ValueError, "labels must have the logits' shape (4, 3), got (3, 3)"),
        ({"margins": [0.1, 0.2, 0.3]}, ValueError, "margins must have shape (2,) or (3, 2), "
         "negative and positive of each label of the logits (4, 3), got (3,); "
         "check positive_counts"),
        ({"where": T}, TypeError, "where must be bool, got int64; use mask != 0"),
        ({"where": T[0] == 1}, ValueError, "where must have shape (4, 3), the logits' shape, "
         "got (3,)"),
        ({"gamma": -1}, ValueError, "gamma must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(changes, kind, sentence):
    arguments = {"logits": X, "labels": T, "margins": [0.1, 0.5]} | changes
    with refuses(kind, sentence):
        reference.sigmoid_lmf_loss(**arguments)


def test_torch_channels_and_labels():
    """(N, 1, H, W) with counts of one channel, and (N, L) with counts of each label."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    x, t = RNG.normal(0, 2, (2, 1, 4, 5)), RNG.integers(0, 2, (2, 1, 4, 5))
    for counts in ((10, 90), ([10], [90])):
        value = losses.SigmoidLMFLoss(*counts)(torch.tensor(x), torch.tensor(t))
        expected = reference.SigmoidLMFLoss(*counts, axis=1)(x, t)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
    t[0, 0, 0] = 255
    value = losses.SigmoidLMFLoss(10, 90, ignore_index=255)(torch.tensor(x), torch.tensor(t))
    expected = reference.SigmoidLMFLoss(10, 90)(x, t, where=t != 255)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
    value = losses.SigmoidLMFLoss(POSITIVE, NEGATIVE)(torch.tensor(X), torch.tensor(T == 1))
    np.testing.assert_allclose(
        value.numpy(), reference.SigmoidLMFLoss(POSITIVE, NEGATIVE)(X, T), rtol=1e-12
    )


def test_torch_masks_are_checked_and_both_count():
    torch, losses = load("torch"), load("lmf_multi.torch")
    loss, x, t = losses.SigmoidLMFLoss(3, 9), torch.tensor(X), torch.tensor(T)
    for wrong, sentence in (
        (torch.ones(3, dtype=torch.bool), "must have shape (4, 3), the labels' shape, got (3,)"),
        (torch.ones(4, 3, dtype=torch.uint8), "must be bool, got uint8; use mask != 0"),
    ):
        for call in (lambda w: loss(x, t, where=w), lambda w: loss.normalizers(t, where=w)):
            with pytest.raises((ValueError, TypeError)) as caught:
                call(wrong)
            assert str(caught.value) == f"where {sentence}"
    where = torch.tensor(T == 1)
    ignored = torch.where(torch.arange(3) == 1, -100, t)
    expected = reference.SigmoidLMFLoss(3, 9)(X, T, where=(T == 1) & (np.arange(3) != 1))
    np.testing.assert_allclose(loss(x, ignored, where=where).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(300_000,), (3, 2, 150, 400)])
def test_torch_large_batches(shape):
    """Batches that are taken in pieces."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    x, t = RNG.normal(0, 3, shape), RNG.integers(0, 2, shape)
    where = RNG.random(shape) < 0.8
    z = torch.tensor(x, requires_grad=True)
    value = losses.SigmoidLMFLoss(3, 9)(z, torch.tensor(t), where=torch.tensor(where))
    value.backward()
    exact = reference.SigmoidLMFLoss(3, 9)
    expected, grad = reference.sigmoid_lmf_loss_and_grad(
        x, t, exact.margins, exact.class_weight, where=where
    )
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(z.grad.numpy(), grad, rtol=1e-11, atol=1e-20)


def test_torch_second_order():
    torch, losses = load("torch"), load("lmf_multi.torch")
    for labels in (T, SOFT):
        loss, t = losses.SigmoidLMFLoss(3, 9, gamma=0.5, scale=2.0), torch.tensor(labels)
        x = torch.tensor(X, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, loss=loss, t=t: loss(x, t), x)
        assert torch.autograd.gradgradcheck(lambda x, loss=loss, t=t: loss(x, t), x)


def test_jax_second_order():
    jax, losses = load("jax"), load("lmf_multi.jax")
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        for labels in (T, SOFT):
            loss = losses.SigmoidLMFLoss(3, 9, gamma=0.5, scale=2.0)
            check_grads(lambda x, loss=loss, t=labels: loss(x, t), (jax.numpy.asarray(X),), 2)


@pytest.mark.parametrize("from_logits", [True, False])
def test_keras_fit(from_logits):
    keras, losses = load("keras"), load("lmf_multi.keras")
    keras.utils.set_random_seed(0)
    activation = None if from_logits else "sigmoid"
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, activation=activation)])
    loss = losses.SigmoidLMFLoss(POSITIVE, NEGATIVE, scale=2.0, from_logits=from_logits)
    model.compile(keras.optimizers.Adam(0.05), loss=loss)
    x = RNG.normal(0, 1, (64, 5)).astype("float32")
    t = (x[:, :3] > 0).astype("float32")
    history = model.fit(x, t, epochs=15, verbose=0).history["loss"]
    assert history[-1] < history[0] / 2
    logits = model.predict(x, verbose=0)
    logits = logits if from_logits else np.log(logits) - np.log1p(-logits)
    expected = reference.SigmoidLMFLoss(POSITIVE, NEGATIVE, scale=2.0)(logits.astype(float), t)
    np.testing.assert_allclose(model.evaluate(x, t, batch_size=64, verbose=0), expected, rtol=1e-4)


def test_keras_label_forms_weights_and_config():
    ops, losses = load("keras").ops, load("lmf_multi.keras")
    x, t = X[:, :1].astype("float32"), T[:, :1]
    expected = reference.SigmoidLMFLoss(3, 9, reduction="none")(x, t)
    loss = losses.SigmoidLMFLoss(3, 9)
    for labels in (t, t[:, 0], t == 1, t.astype("float32")):
        np.testing.assert_allclose(loss(labels, x), reference.SigmoidLMFLoss(3, 9)(x, t), rtol=1e-5)
    each = losses.SigmoidLMFLoss(3, 9, reduction="none")
    weight = np.array([1.0, 0.0, 2.0, 3.0])
    weighted = ops.convert_to_numpy(each(t, x, sample_weight=weight))
    np.testing.assert_allclose(weighted, expected * weight[:, None], rtol=1e-5)
    again = losses.SigmoidLMFLoss.from_config(loss.get_config())
    np.testing.assert_array_equal(again(t, x), loss(t, x))
    masked = losses.SigmoidLMFLoss(3, 9, ignore_class=-1)(np.where(t == 1, t, -1), x)
    expected = reference.SigmoidLMFLoss(3, 9)(x, t, where=t == 1)
    np.testing.assert_allclose(masked, expected, rtol=1e-5)
