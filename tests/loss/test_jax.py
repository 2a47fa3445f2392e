"""What only JAX has: losses as pytrees, hyper-parameters as leaves, traces."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from lmf_multi import class_margins, log_priors, reference
from tests.checks import refuses
from tests.engines import alarms, strict, without_kernel
from tests.frameworks import load

COUNTS = (625, 16, 1)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (6, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 2, 1, 0], np.int32)
SOFT = RNG.dirichlet([1] * 3, 6).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def settings():
    with strict(load("jax")):
        yield


@pytest.fixture(scope="module")
def losses(jax):
    return load("lmf_multi.jax")


def test_one_compilation_serves_new_values(jax, losses):
    traces = []

    @jax.jit
    def step(loss, z, y):
        traces.append(loss)
        return loss(z, y)

    variants = [
        {},
        {"alpha": 0.0, "beta": 0.3},
        {"gamma": 0, "scale": 64},
        {"label_smoothing": 0.2, "max_margin": 1.0},
        {"class_weight": [0.5, 1.0, 3.0]},
    ]
    for options in variants:
        for counts in (COUNTS, (5, 3, 2)):
            loss = losses.LMFLoss(counts, **options)
            expected = reference.LMFLoss(counts, **options)(LOGITS, LABELS)
            np.testing.assert_allclose(step(loss, LOGITS, LABELS), expected, rtol=1e-5)
    assert len(traces) == 1
    step(losses.LMFLoss(COUNTS, reduction="sum"), LOGITS, LABELS)  # static
    assert len(traces) == 2
    for tau in (0.5, 1.0):
        loss = losses.LMFLoss(COUNTS, logit_adjustment=tau)
        expected = reference.LMFLoss(COUNTS, logit_adjustment=tau)(LOGITS, LABELS)
        np.testing.assert_allclose(step(loss, LOGITS, LABELS), expected, rtol=1e-5)
    assert len(traces) == 3  # with another structure


def test_vmap_over_stacked_losses(jax, losses):
    options = [{"gamma": 0.5}, {"scale": 5.0, "class_weight": "balanced"}, {"label_smoothing": 0.2}]
    each = [losses.LMFLoss(COUNTS, **option) for option in options]
    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *each)
    values = jax.vmap(lambda loss: loss(LOGITS, LABELS))(stacked)
    expected = [reference.LMFLoss(COUNTS, **option)(LOGITS, LABELS) for option in options]
    assert len(set(np.round(expected, 3))) == 3
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_vmap_over_stacked_sigmoid_losses(jax, losses):
    labels, name, counts = FORMS["by label"]
    options = [{"gamma": 0.5}, {"scale": 5.0, "class_weight": "balanced"}, {"label_smoothing": 0.2}]
    each = [getattr(losses, name)(*counts, **option) for option in options]
    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *each)
    for y in (labels, labels.astype(np.float32)):
        slopes = jax.jit(jax.vmap(jax.grad(lambda loss, y=y: loss(LOGITS, y))))(stacked)
        for i, loss in enumerate(each):
            alone = jax.grad(lambda loss, y=y: loss(LOGITS, y))(
                jax.tree.map(jax.numpy.float32, loss)
            )
            jax.tree.map(
                lambda one, other, i=i: np.testing.assert_allclose(one[i], other, rtol=1e-5),
                slopes,
                alone,
            )


MIXTURES = {  # of kinds, of class weights and adjustments that are there and not
    "all": [
        ("FocalLoss", (), {"gamma": 0.0}),
        ("FocalLoss", (), {"gamma": 2.0, "class_weight": [0.5, 1.0, 3.0]}),
        ("FocalLoss", (COUNTS,), {"gamma": 0.0, "logit_adjustment": 1.0}),
        ("LDAMLoss", (COUNTS,), {"scale": 5.0}),
        ("LDAMLoss", (COUNTS,), {"class_weight": "effective", "max_margin": 0.2}),
        ("LMFLoss", (COUNTS,), {}),
        ("LMFLoss", ((5, 3, 2),), {"alpha": 0.5, "logit_adjustment": 1.5, "label_smoothing": 0.1}),
        ("LMFLoss", (COUNTS,), {"class_weight": None}),
    ],
    "without vectors": [("FocalLoss", (), {"gamma": gamma}) for gamma in (0.0, 0.5, 2.0)],
    "sigmoid": [
        ("SigmoidLMFLoss", (3, 9), {"class_weight": None}),
        ("SigmoidLMFLoss", ((1, 4, 9), (5, 5, 2)), {"gamma": 0.5, "logit_adjustment": 1.0}),
        ("SigmoidLMFLoss", (3, 9), {"scale": 5.0, "logit_adjustment": 0.5}),
    ],
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_stacked_losses_are_each_what_it_was(jax, losses, mixture, soft, reduction):
    """In value and in the logits' gradient, with a masked example whose logits are NaN."""
    each = [
        getattr(losses, name)(*counts, reduction=reduction, **options)
        for name, counts, options in MIXTURES[mixture]
    ]
    z, where = LOGITS.copy(), np.arange(6) != 3
    z[3] = np.nan
    y = SOFT if soft else LABELS
    if mixture == "sigmoid":
        y, where = SOFT if soft else SOFT.round().astype(np.int32), ~np.isnan(z)

    def run(loss):
        value, pull = jax.vjp(lambda z: loss(z, y, where=where), jax.numpy.asarray(z))
        return value, *pull(jax.numpy.ones_like(value))

    stacked = losses.stack_losses(each)
    assert type(stacked) is (losses.SigmoidLMFLoss if mixture == "sigmoid" else losses.LMFLoss)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {len(each)}
    values, grads = jax.jit(jax.vmap(run))(stacked)
    assert len(np.unique(np.round(values.reshape(len(each), -1).sum(1), 4))) == len(each)
    for i, loss in enumerate(each):
        value, grad = run(loss)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-5, atol=1e-5 * np.abs(grad).max())


def test_stacking_inside_a_trace(jax, losses):
    """And what no loss has, none of them gets."""
    each = [losses.LMFLoss(COUNTS, gamma=gamma, class_weight=None) for gamma in (0.5, 2.0)]
    stacked = losses.stack_losses(each)
    assert stacked.class_weight is None and stacked.logit_adjustment is None

    @jax.jit
    def run(losses_):
        return jax.vmap(lambda loss: loss(LOGITS, LABELS))(losses.stack_losses(losses_))

    np.testing.assert_allclose(run(each), [loss(LOGITS, LABELS) for loss in each], rtol=1e-6)


TOGETHER = {
    "none": ((), ValueError, "losses must hold at least one loss, got none"),
    "sigmoid and softmax": (
        (("LMFLoss", (COUNTS,), {}), ("SigmoidLMFLoss", (3, 9), {})),
        ValueError,
        "losses must all be sigmoid losses or none, got LMFLoss and SigmoidLMFLoss; "
        "stack each kind for itself",
    ),
    "classes": (
        (("LMFLoss", (COUNTS,), {}), ("FocalLoss", (), {"class_weight": [1.0, 2.0]})),
        ValueError,
        "losses must have the same number of classes, got 2 and 3; stack those that agree",
    ),
    "labels": (
        (
            ("SigmoidLMFLoss", ((1, 4), (5, 5)), {}),
            ("SigmoidLMFLoss", ((1, 4, 9), (5, 5, 2)), {"logit_adjustment": 1.0}),
        ),
        ValueError,
        "losses must have the same number of labels, got 2 and 3; stack those that agree",
    ),
    "axis": (
        (("LMFLoss", (COUNTS,), {}), ("LMFLoss", (COUNTS,), {"axis": 1})),
        ValueError,
        "losses must have the same axis, got -1 and 1; stack those that agree",
    ),
    "reduction": (
        (("LMFLoss", (COUNTS,), {}), ("LDAMLoss", (COUNTS,), {"reduction": "sum"})),
        ValueError,
        "losses must have the same reduction, got 'mean' and 'sum'; stack those that agree",
    ),
    "axis_name": (
        (("LMFLoss", (COUNTS,), {"axis_name": "batch"}), ("LMFLoss", (COUNTS,), {})),
        ValueError,
        "losses must have the same axis_name, got 'batch' and None; stack those that agree",
    ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_what_does_not_stack(losses, case):
    each, kind, sentence = TOGETHER[case]
    with refuses(kind, sentence):
        losses.stack_losses(
            [getattr(losses, name)(*counts, **options) for name, counts, options in each]
        )


def test_what_is_no_loss_or_stacked_already(losses):
    loss = losses.LMFLoss(COUNTS)
    with refuses(TypeError, "losses must be losses of lmf_multi.jax, got 3"):
        losses.stack_losses([loss, 3])
    sentence = "losses must not be stacked yet, got alpha of shape (2,); stack all of them at once"
    with refuses(ValueError, sentence):
        losses.stack_losses([losses.stack_losses([loss, loss]), loss])


@pytest.mark.parametrize("tau", [0.0, 1.5])
def test_copies_and_pickles(jax, losses, tau):
    loss = losses.LMFLoss(COUNTS, logit_adjustment=tau, reduction="sum")
    names = {"np": np, "array": np.array, "LMFLoss": losses.LMFLoss}
    for twin in (eval(repr(loss), names), pickle.loads(pickle.dumps(loss)), loss.replace()):
        assert repr(twin) == repr(loss)
        np.testing.assert_array_equal(twin(LOGITS, LABELS), loss(LOGITS, LABELS))


def test_losses_from_before_there_was_an_adjustment(losses):
    """Their ``repr`` and their pickles lack it."""
    loss = losses.LMFLoss(COUNTS)
    shown = repr(loss).replace("logit_adjustment=None, ", "")
    kept = losses.LMFLoss.__new__(losses.LMFLoss)
    vars(kept).update({k: v for k, v in vars(loss).items() if k != "logit_adjustment"})
    assert "logit_adjustment" not in shown and "logit_adjustment" not in vars(kept)
    for twin in (eval(shown, {"LMFLoss": losses.LMFLoss}), pickle.loads(pickle.dumps(kept))):
        np.testing.assert_array_equal(twin(LOGITS, LABELS), loss(LOGITS, LABELS))


def test_balanced_softmax(jax, losses):
    """-log(n_y e^{z_y} / Σ n_k e^{z_k}), Ren et al., arXiv 2007.10740, equation 3; by vmap too."""
    n, z = np.array(COUNTS, np.float64), LOGITS.astype(np.float64)
    weighted = n * np.exp(z)
    expected = -np.log(weighted[np.arange(6), LABELS] / weighted.sum(1))
    loss = losses.FocalLoss(COUNTS, gamma=0.0, logit_adjustment=1.0, reduction="none")
    np.testing.assert_allclose(loss(LOGITS, LABELS), expected, rtol=1e-5)
    added = log_priors(COUNTS).astype(np.float32)

    def of(added):
        return losses.focal_loss(LOGITS, LABELS, gamma=0.0, logit_adjustment=added)

    np.testing.assert_allclose(of(added), expected, rtol=1e-5)
    mapped = jax.vmap(of)(jax.numpy.stack([added, added + 1, 0 * added]))
    np.testing.assert_allclose(mapped[:2], [expected, expected], rtol=1e-5)
    plain = losses.FocalLoss(gamma=0.0, reduction="none")(LOGITS, LABELS)
    np.testing.assert_allclose(mapped[2], plain, rtol=1e-5)


@pytest.mark.parametrize("form", ["integer", "soft", "sigmoid"])
def test_an_adjustment_by_example_is_one_of_the_logits(jax, losses, form):
    """Mapped over, and its gradient that of the logits."""
    labels, name, counts = FORMS[form]
    exact = getattr(losses, name)(*counts, scale=3.0, reduction="none")
    shape = (6, 3) if name == "LMFLoss" else (6,)
    added = jax.numpy.asarray(RNG.normal(0, 2, shape), "float32")
    labels = labels.astype("float32" if form == "soft" else "int32")

    def of(added, z, y):
        return exact.replace(logit_adjustment=added)(z, y).sum()

    slopes = jax.vmap(jax.grad(of, (0, 1)))(added, LOGITS, labels)
    on_logits = jax.vmap(jax.grad(lambda z, y: exact(z, y).sum()))
    expected = on_logits(LOGITS + (added if name == "LMFLoss" else added[:, None]), labels)
    size = np.abs(expected).max()
    np.testing.assert_allclose(slopes[1] / size, expected / size, atol=1e-5)
    by_added = expected if name == "LMFLoss" else expected.sum(1)
    np.testing.assert_allclose(slopes[0] / size, by_added / size, atol=1e-5)


@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
def test_losses_are_pytrees(jax, losses, name):
    counts = () if name == "FocalLoss" else (COUNTS,)
    loss = getattr(losses, name)(*counts, reduction="sum", axis=0)
    leaves, structure = jax.tree.flatten(loss)
    twin = jax.tree.unflatten(structure, leaves)
    assert type(twin) is type(loss)
    assert (twin.reduction, twin.axis) == ("sum", 0)
    np.testing.assert_array_equal(twin(LOGITS.T, LABELS), loss(LOGITS.T, LABELS))
    doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), loss)
    assert float(doubled.scale) == 2 * float(loss.scale)


INSIDE = {"alpha": 1.5, "beta": 1.0, "gamma": 1.5, "scale": 3.0, "label_smoothing": 0.1}
AT_BOUNDS = INSIDE | {"alpha": 0.0, "gamma": 0.0, "label_smoothing": 0.0}
FORMS = {  # labels, and what a loss is built from
    "integer": (LABELS, "LMFLoss", (COUNTS,)),
    "soft": (SOFT.astype(np.float64), "LMFLoss", (COUNTS,)),
    "sigmoid": (SOFT.round().astype(np.int32), "SigmoidLMFLoss", (3, 9)),
    "by label": (SOFT.round().astype(np.int32), "SigmoidLMFLoss", ((1, 4, 9), (5, 5, 2))),
    "soft sigmoid": (SOFT.astype(np.float64), "SigmoidLMFLoss", ((1, 4, 9), (5, 5, 2))),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize("numbers", [INSIDE, AT_BOUNDS], ids=["inside", "at bounds"])
@forms
def test_gradients_of_the_hyper_parameters(jax, losses, form, numbers):
    """Against differences of the reference in each number, upwards, and each array's entry."""
    labels, name, counts = FORMS[form]
    z, h = LOGITS.astype(np.float64), 1e-6
    with jax.enable_x64(True):
        options = {"class_weight": "balanced", "logit_adjustment": 0.5}
        loss = getattr(losses, name)(*counts, **options, **numbers)
        loss = jax.tree.map(jax.numpy.asarray, loss)
        slopes = jax.jit(jax.grad(lambda loss: loss(z, labels)))(loss)
    vectors = ("margins", "class_weight", "logit_adjustment")
    arrays = {name: np.asarray(getattr(loss, name)) for name in vectors}
    exact = reference.lmf_loss if name == "LMFLoss" else reference.sigmoid_lmf_loss

    def value(**changes):
        return exact(z, labels, **(arrays | numbers | changes))

    for name, x in numbers.items():
        numeric = (4 * value(**{name: x + h}) - value(**{name: x + 2 * h}) - 3 * value()) / (2 * h)
        np.testing.assert_allclose(getattr(slopes, name), numeric, rtol=1e-6, err_msg=name)
    for name, x in arrays.items():
        steps = h * np.eye(x.size).reshape(-1, *x.shape)
        numeric = [(value(**{name: x + e}) - value(**{name: x - e})) / (2 * h) for e in steps]
        numeric = np.reshape(numeric, x.shape)
        atol = 1e-8 + 1e-7 * np.abs(numeric).max()  # of differences of the whole loss
        np.testing.assert_allclose(
            getattr(slopes, name), numeric, rtol=1e-5, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("form", ["integer", "sigmoid"])
def test_smoothing_that_is_learned_from_0(jax, losses, form):
    """As one-hot labels give: its slope, and what it does to the logits' gradient."""
    labels, name, counts = FORMS[form]
    soft = np.eye(3)[labels] if form == "integer" else labels
    loss = getattr(losses, name)(*counts, scale=3.0)

    @jax.jit
    def slopes(smoothing, z, labels):
        def of(smoothing, z):
            return loss.replace(label_smoothing=smoothing)(z, labels)

        return {
            "slope": jax.grad(of)(smoothing, z),
            "mapped": jax.vmap(jax.grad(of), (0, None))(smoothing[None], z),
            "logits first": jax.jacrev(jax.grad(of, 1), 0)(smoothing, z),
            "logits last": jax.jacrev(jax.grad(of, 0), 1)(smoothing, z),
            "logits first, compiled": jax.jacrev(jax.jit(jax.grad(of, 1)), 0)(smoothing, z),
            "forward mode": jax.jacfwd(jax.grad(of, 1), 0)(smoothing, z),
        }

    start = np.float32(0)
    actual, expected = (slopes(start, LOGITS, y) for y in (labels, soft.astype(np.float32)))
    for kind, slope in expected.items():
        size = np.abs(slope).max()
        assert size > 0.1
        np.testing.assert_allclose(actual[kind] / size, slope / size, atol=1e-5, err_msg=kind)


def test_learned_distributions_get_their_gradient(jax, losses):
    margins = class_margins(COUNTS).astype(np.float32)
    grad = jax.grad(lambda q: losses.lmf_loss(LOGITS, q, margins).sum())(SOFT)
    each = [reference.lmf_loss(LOGITS, np.full(6, j), margins, reduction="none") for j in range(3)]
    np.testing.assert_allclose(grad, np.stack(each, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", -1.0),
        ("scale", 0.0),
        ("alpha", np.inf),
        ("beta", np.nan),
        ("label_smoothing", 2.0),
    ],
)
def test_a_bad_traced_number_gives_nan(jax, losses, name, value):
    """What cannot raise inside a trace must not look like a loss."""
    loss = losses.LMFLoss(COUNTS).replace(**{name: value})
    assert np.isnan(jax.jit(lambda loss: loss(LOGITS, LABELS))(loss))
    good = losses.LMFLoss(COUNTS)
    assert np.isfinite(jax.jit(lambda loss: loss(LOGITS, LABELS))(good))


@forms
def test_labels_from_outside_the_trace(jax, losses, form):
    """Arrays of which a trace knows no entry, though they are no tracers."""
    labels, name, counts = FORMS[form]
    loss, y = getattr(losses, name)(*counts), jax.numpy.asarray(labels.astype(np.float32))
    y = y if "soft" in form else y.astype("int32")

    def both(z):
        return loss(z, y), *loss.normalizers(y)

    expected = both(LOGITS)
    np.testing.assert_allclose(jax.jit(both)(LOGITS), expected, rtol=1e-6)
    _, looped = jax.lax.scan(lambda carry, z: (carry, both(z)), 0, LOGITS[None])
    np.testing.assert_allclose(np.ravel(looped), expected, rtol=1e-6)


@pytest.mark.parametrize("watch", ["operations", "checkify"])
@pytest.mark.parametrize("form", ["integer", "soft", "by label", "soft sigmoid"])
def test_finite_input_sets_off_no_alarm(jax, losses, form, watch):
    """In value, gradient, Hessian and every slope; a NaN among the logits still does."""
    from jax.experimental import checkify

    labels, name, counts = FORMS[form]
    labels = labels.astype("float32" if "soft" in form else "int32")
    loss = getattr(losses, name)(*counts, scale=3.0, logit_adjustment=0.5 * (form != "soft"))
    learned = jax.tree.map(jax.numpy.float32, loss)
    where = LABELS != 1 if name == "LMFLoss" else LOGITS > -1

    def of(z, loss):
        return loss(z, labels, where=where)

    def run(z):
        return (
            jax.value_and_grad(of)(z, loss),
            jax.grad(of, 1)(z, learned),
            jax.hessian(of)(z, loss),
        )

    z = jax.numpy.asarray(LOGITS)
    spoilt = z.at[0, 0].set(np.nan)
    if watch == "operations":
        with alarms(jax, [z]):
            run(z)
            for mode in (jax.disable_jit(), jax.disable_jit(False)):
                with mode, pytest.raises(FloatingPointError):
                    of(spoilt, loss)
        return
    checked = jax.jit(checkify.checkify(run, errors=checkify.float_checks))
    checked(z)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated by primitive"):
        checked(spoilt)[0].throw()


def test_replace(losses):
    loss = losses.LMFLoss(COUNTS).replace(gamma=0.5)
    expected = reference.LMFLoss(COUNTS, gamma=0.5)(LOGITS, LABELS)
    np.testing.assert_allclose(loss(LOGITS, LABELS), expected, rtol=1e-5)
    with pytest.raises(TypeError, match=r"^replace takes margins, .*, got 'max_margin'; "):
        loss.replace(max_margin=1.0)


def test_losses_are_frozen(losses):
    with pytest.raises(AttributeError, match="cannot assign to field 'gamma'"):
        losses.LMFLoss(COUNTS).gamma = 2.0


def test_a_number_must_be_a_scalar(losses):
    sentence = "gamma must be a number, got shape (2,); map over losses with jax.vmap"
    loss = losses.LMFLoss(COUNTS).replace(gamma=load("jax").numpy.ones(2))
    with refuses(ValueError, sentence):
        loss(LOGITS, LABELS)


def test_shapes_are_checked_inside_a_trace(jax, losses):
    sentence = "integer labels must have shape (6,), the logits' without the class axis, got (5,)"
    with refuses(ValueError, sentence):
        jax.jit(losses.LMFLoss(COUNTS))(LOGITS, LABELS[:5])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_integer_labels_of_every_kind(losses, dtype):
    margins = class_margins(COUNTS)
    actual = losses.lmf_loss(LOGITS, LABELS.astype(dtype), margins)
    np.testing.assert_array_equal(actual, losses.lmf_loss(LOGITS, LABELS, margins))


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_wide_labels_stay_out_of_range(losses, dtype):
    """2^32 + 1 cut to 32 bits would be the class 1."""
    labels = LABELS.astype(dtype)
    labels[2] = 2**32 + 1
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        losses.lmf_loss(LOGITS, labels, class_margins(COUNTS))


def test_a_loop_of_training_steps(jax, losses):
    """Inside scan, with a changing hyper-parameter: gradient descent lowers the loss."""
    loss = losses.LMFLoss(COUNTS, scale=1.0)

    def step(z, gamma):
        value, grad = jax.value_and_grad(loss.replace(gamma=gamma))(z, LABELS)
        return z - grad, value

    _, values = jax.lax.scan(step, jax.numpy.asarray(LOGITS), jax.numpy.full(50, 1.5))
    assert np.isfinite(values).all()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("C", [2, 32, 33])  # up to 32 are reduced in another way
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_few_and_many_classes(jax, losses, tau, C, axis):
    """Value, gradient and Hessian-vector product, with a masked row of NaN."""
    rng = np.random.default_rng(C)
    z, v, y = rng.normal(0, 2, (5, C)), rng.normal(0, 1, (5, C)), rng.integers(0, C, 5)
    where = np.array([True, True, False, True, True])
    z[2] = np.nan
    counts = range(1, C + 1)
    options = {"scale": 4.0, "class_weight": "balanced", "logit_adjustment": tau}
    exact, h = reference.LMFLoss(counts, **options), 1e-5

    def gradient(z):
        vectors, numbers = (exact.margins, exact.class_weight), {"scale": 4.0, "where": where}
        numbers["logit_adjustment"] = exact.logit_adjustment
        return reference.lmf_loss_and_grad(z, y, *vectors, **numbers)[1]

    with jax.enable_x64(True):
        loss = losses.LMFLoss(counts, axis=axis, **options)

        def of(z):
            return loss(jax.numpy.moveaxis(z, -1, axis), y, where=where)

        value, grad = jax.jit(jax.value_and_grad(of))(z)
        product = jax.jit(lambda z, v: jax.jvp(jax.grad(of), (z,), (v,))[1])(z, v)
    np.testing.assert_allclose(value, exact(z, y, where=where), rtol=1e-12)
    np.testing.assert_allclose(grad, gradient(z), rtol=1e-11, atol=1e-15)
    expected = (gradient(z + h * v) - gradient(z - h * v)) / (2 * h)
    np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["ldam_loss", "focal_loss"])
def test_curvature_at_even_odds(jax, losses, name):
    """Where each formula changes sides, as at the zeros of a fresh last layer."""
    vectors = (np.zeros(2),) if name == "ldam_loss" else ()
    numbers = {"scale": 2.0} if name == "ldam_loss" else {"gamma": 1.5}
    exact, h, step = getattr(reference, name), 1e-4, np.array([[1.0, 0.0]])

    def value(z):
        return exact(z, [0], *vectors, **numbers, reduction="sum")

    def of(z):
        return getattr(losses, name)(z, np.zeros(1, int), *vectors, **numbers).sum()

    with jax.enable_x64(True):
        hessian = jax.hessian(of)(np.zeros((1, 2)))
    second = (value(h * step) - 2 * value(0 * step) + value(-h * step)) / h**2
    assert second > 0.1
    np.testing.assert_allclose(hessian[0, 0, 0, 0], second, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_memory(jax, losses, tau):
    """One array of the logits' size at most, beside the gradient; XLA's figure does not vary."""
    z, y = np.zeros((512, 1000), np.float32), np.zeros(512, np.int32)
    step = jax.jit(jax.value_and_grad(losses.LMFLoss(range(1, 1001), logit_adjustment=tau)))
    with without_kernel():
        memory = step.lower(z, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * z.nbytes


WHAT_MAY_MOVE = """
import logging, sys
import jax, numpy as np

{moved}
records, log = [], logging.getLogger("lmf_multi")
log.addFilter(records.append)  # what it returns, None, keeps them from being written
log.setLevel(logging.DEBUG)
from lmf_multi import reference
from lmf_multi.jax import LMFLoss
from lmf_multi.jax._cpu import has_kernel

rng = np.random.default_rng(0)
z, y = rng.normal(0, 2, (6, 3)).astype("float32"), np.array([0, 1, 2, 2, 1, 0])
where, exact = np.arange(6) != 3, reference.LMFLoss((625, 16, 1))
loss = LMFLoss((625, 16, 1))
expected = reference.lmf_loss_and_grad(z, y, exact.margins, exact.class_weight, where=where)
for run in (jax.value_and_grad(loss), jax.jit(jax.value_and_grad(loss))):
    value, grad = run(z, y, where=where)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-7)
assert not has_kernel()
(record,) = records
assert record.levelno == logging.DEBUG
print(record.getMessage())
"""
MODULES = ("jax.extend", "jax.extend.core", "jax.interpreters.batching", "jax.interpreters.mlir")
MOVES = {
    "modules": f"for name in {MODULES}: sys.modules[name] = None",
    "a module": "sys.modules['jax.extend.core'] = None",
    "a name": "from jax.interpreters import mlir; del mlir.ShardingContext",
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_interfaces_cost_the_kernel_alone(jax, move):
    """Of another version of JAX: the loss takes operations, and says why once, for debugging."""
    run = subprocess.run(
        [sys.executable, "-c", WHAT_MAY_MOVE.format(moved=MOVES[move])],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "kernel" in run.stdout
