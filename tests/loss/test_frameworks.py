"""What every framework shares beside its numbers: constructors, and errors by their sentence."""

import dataclasses

import numpy as np
import pytest

from lmf_multi import LMFSpec, log_priors, reference
from tests.adapters import ADAPTERS
from tests.checks import refuses
from tests.frameworks import load

COUNTS, WEIGHTS = [625, 16, 1], [0.5, 1.0, 3.0]
MARGINS = np.array([0.1, 0.25, 0.5])
Z = np.random.default_rng(0).normal(0, 1, (6, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 2, 1, 0], np.int32)
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module", params=[a for a in ADAPTERS if a.mode == "eager"], ids=str)
def eager(request):
    request.param.losses  # noqa: B018  imports the framework, or skips
    return request.param


def array(eager, values):
    """PyTorch wants tensors; the others take NumPy."""
    return load("torch").tensor(values) if eager.framework == "torch" else values


def value_of(eager, loss, z=Z, y=Y):
    z, y = array(eager, z), array(eager, y)
    return float(loss(y, z) if eager.framework == "keras" else loss(z, y))


# --- constructors: the same arguments, the same loss as the reference's


SPEC = LMFSpec(COUNTS, alpha=0.7, beta=0.3, gamma=2, max_margin=0.8, scale=5, label_smoothing=0.1)
ADJUSTED = dataclasses.replace(SPEC, logit_adjustment=1.5)
CONSTRUCTORS = [
    ("LMFLoss", "from_spec", (SPEC,)),
    ("LMFLoss", "from_spec", (ADJUSTED,)),
    ("LMFLoss", "from_spec", (LMFSpec.recommended(COUNTS),)),
    ("LDAMLoss", "from_spec", (ADJUSTED,)),
    ("FocalLoss", "from_spec", (ADJUSTED,)),
    ("FocalLoss", "from_spec", (dataclasses.replace(ADJUSTED, class_weight=None),)),
    ("LMFLoss", "from_legacy", (COUNTS, WEIGHTS, 0.2, 0.7, 2, 0.8, 5)),
    ("LMFLoss", "from_legacy", (COUNTS,)),
    ("LMFLoss", "from_official", (COUNTS,)),
    ("LMFLoss", "from_official", (COUNTS, WEIGHTS, 0.2, 0.7, 2, 0.8, 5)),
    ("LDAMLoss", "from_spec", (SPEC,)),
    ("LDAMLoss", "from_legacy", (COUNTS, 0.8, WEIGHTS, 5)),
    ("LDAMLoss", "from_official", (COUNTS,)),
    ("FocalLoss", "from_spec", (SPEC,)),
    ("FocalLoss", "from_legacy", (WEIGHTS, 2)),
    ("FocalLoss", "from_legacy", ()),
    ("FocalLoss", "from_official", (WEIGHTS,)),
]


@pytest.mark.parametrize("name", ["torch", "keras", "reference"])
def test_a_changed_hyper_parameter_is_shown_and_kept(name):
    """Printed, and still there after the class weights are replaced; JAX losses are frozen."""
    options = {"label_smoothing": 0.1, "logit_adjustment": 1.5}
    loss = load(f"lmf_multi.{name}").LMFLoss(COUNTS, **options)
    loss.gamma, loss.scale = 3.0, 5.0
    if name != "reference":
        loss.set_class_weight("balanced")
    shown = {"gamma=3.0", "scale=5.0", "label_smoothing=0.1", "logit_adjustment=1.5"}
    assert shown <= set(repr(loss)[8:-1].split(", "))
    assert (loss.gamma, loss.scale) == (3.0, 5.0)
    np.testing.assert_allclose(loss.logit_adjustment, 1.5 * log_priors(COUNTS), rtol=1e-14)


@pytest.mark.parametrize(("name", "constructor", "arguments"), CONSTRUCTORS)
def test_constructors(eager, name, constructor, arguments):
    loss, expected = (
        getattr(getattr(losses, name), constructor)(*arguments)
        for losses in (eager.losses, reference)
    )
    np.testing.assert_allclose(value_of(eager, loss), expected(Z, Y), rtol=1e-5)


@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
@pytest.mark.parametrize("weight", ["margin", "complement", "balanced", "effective", WEIGHTS, None])
def test_every_class_weight(eager, name, weight):
    options = {} if weight == "margin" and name == "LMFLoss" else {"class_weight": weight}
    counts = (COUNTS,) if name != "FocalLoss" or isinstance(weight, str) else ()
    loss, expected = (
        getattr(losses, name)(*counts, max_margin=0.3, **options)
        for losses in (eager.losses, reference)
    )
    np.testing.assert_allclose(value_of(eager, loss), expected(Z, Y), rtol=1e-5)


def test_legacy_alpha_weights_focal(eager):
    """With alpha 0 the legacy constructor leaves LDAM, the official one focal."""
    legacy = eager.losses.LMFLoss.from_legacy(COUNTS, WEIGHTS, 0.0, 1.0)
    ldam = reference.LDAMLoss(COUNTS, class_weight=WEIGHTS)
    np.testing.assert_allclose(value_of(eager, legacy), ldam(Z, Y), rtol=1e-5)
    official = eager.losses.LMFLoss.from_official(COUNTS, WEIGHTS, 0.0, 1.0)
    focal = reference.FocalLoss(class_weight=WEIGHTS)
    np.testing.assert_allclose(value_of(eager, official), focal(Z, Y), rtol=1e-5)


# --- errors


@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
def test_counts_are_no_spec(eager, name):
    """Each loss's own constructor takes counts, ``from_spec`` a spec."""
    sentence = (
        "spec must be an LMFSpec, got [3, 1]; pass class counts to LMFSpec, or to the loss itself"
    )
    with refuses(TypeError, sentence):
        getattr(eager.losses, name).from_spec([3, 1])


VECTOR = (
    "{} must have shape (3,), one number for each class of the logits (6, 3), got (2,); "
    "check class_counts"
)
INTEGER = "integer labels must have shape (6,), the logits' without the class axis, got (5,)"
FLOATING = (
    "floating labels are distributions and must have the logits' shape (6, 3), got (6,); "
    "cast class indices to integers"
)
BOOLEAN = "labels must be integers or distributions in floating point, got bool"
LOGITS = "logits must be one of float16, bfloat16, float32, float64, got int32"


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"margins": MARGINS[:2]}, ValueError, VECTOR.format("margins")),
        ({"class_weight": MARGINS[:2]}, ValueError, VECTOR.format("class_weight")),
        ({"logit_adjustment": MARGINS[:2]}, ValueError, VECTOR.format("logit_adjustment")),
        ({"labels": Y[:5]}, ValueError, INTEGER),
        ({"labels": Y.astype(np.float32)}, ValueError, FLOATING),
        ({"labels": Y == 0}, TypeError, BOOLEAN),
        ({"logits": Z.astype(np.int32)}, TypeError, LOGITS),
        ({"gamma": -1}, ValueError, "gamma must be at least 0, got -1"),
        ({"scale": 0}, ValueError, "scale must be positive, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"beta": "1"}, TypeError, "beta must be a number, got '1'"),
        ({"beta": True}, TypeError, "beta must be a number, got True"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be between 0 and 1, got 2"),
    ],
)
def test_bad_arguments_are_refused(eager, arguments, kind, sentence):
    arguments = {"logits": Z, "labels": Y, "margins": MARGINS, **arguments}
    z, y = (array(eager, arguments.pop(name)) for name in ("logits", "labels"))
    with refuses(kind, sentence):
        eager.losses.lmf_loss(z, y, **arguments)


NAN = float("nan")
AT_LEAST_0 = "class_weight must be finite and at least 0, got {} for class 1"
ADJUSTMENT = "logit_adjustment must be finite, got {}"


@pytest.mark.parametrize("form", ["list", "array", "tensor"])
@pytest.mark.parametrize(
    ("name", "vector", "kind", "sentence"),
    [
        ("class_weight", [1.0, -2.0, 1.0], ValueError, AT_LEAST_0.format(-2.0)),
        ("class_weight", [1.0, NAN, 1.0], ValueError, AT_LEAST_0.format(NAN)),
        ("class_weight", [1.0, -np.inf, 1.0], ValueError, AT_LEAST_0.format(-np.inf)),
        ("class_weight", [0.0, 0.0, 0.0], ValueError, "class_weight must be positive for at least "
         "one class, got all 0"),
        ("margins", [0.1, NAN, 0.5], ValueError, "margins must be finite, got nan for class 1"),
        ("margins", [0.1, 0.2, np.inf], ValueError, "margins must be finite, got inf for class 2"),
    ],
)  # fmt: skip
def test_bad_vectors_are_refused(eager, name, vector, kind, sentence, form):
    """Where a look at them waits for nothing; the classes take none that is bad."""
    vector = vector if form == "list" else np.array(vector, np.float32)
    if form == "tensor":
        module = {"torch": "torch", "jax": "jax.numpy", "keras": "keras.ops"}[eager.framework]
        module = load(module)
        vector = (module.tensor if module.__name__ == "torch" else module.array)(vector)
    z, y = array(eager, Z), array(eager, Y)
    vectors = {"margins": MARGINS, name: vector}
    calls = [lambda: eager.losses.lmf_loss(z, y, **vectors)]
    if name == "margins":
        calls.append(lambda: eager.losses.ldam_loss(z, y, vector))
    else:
        calls.append(lambda: eager.losses.focal_loss(z, y, vector))
    for call in calls:
        with refuses(kind, sentence):
            call()
    with refuses(ValueError, ADJUSTMENT.format("nan for class 2")):
        eager.losses.focal_loss(z, y, logit_adjustment=[0.0, -1.0, NAN])
    # of three labels in the sigmoid form
    pairs, t = {"margins": [[0.1, 0.5]] * 3, name: [[0.1, 0.5], [0.2, NAN], [0.1, 0.5]]}, y[:, None]
    with pytest.raises(
        ValueError, match=f"{name} must be finite.*, got nan for class 1 of label 1"
    ):
        eager.losses.sigmoid_lmf_loss(z, t * array(eager, np.zeros((1, 3), np.int32)), **pairs)
    for added, what in ((NAN, "nan"), ([0.0, np.inf, 0.0], "inf for class 1")):
        with refuses(ValueError, ADJUSTMENT.format(what)):
            t = array(eager, np.zeros_like(Z, np.int32))
            eager.losses.sigmoid_lmf_loss(z, t, [0.1, 0.5], logit_adjustment=added)


def test_vectors_of_other_kinds_are_refused(eager):
    z, y = array(eager, Z), array(eager, Y)
    for vector in ([True, False, True], ["1", "2", "3"], [1.0, None, 2.0]):
        with refuses(TypeError, f"class_weight must be numbers, got {vector}"):
            eager.losses.focal_loss(z, y, vector)


def test_images_of_another_layout(eager):
    """The class axis is 1 in PyTorch and -1 elsewhere, where it can be given."""
    first = RNG.normal(0, 1, (2, 3, 4, 5)).astype(np.float32)
    last, y = np.moveaxis(first, 1, -1), array(eager, np.zeros((2, 4, 5), np.int32))
    shape, axis, pass_ = (2, 3, 4, 5), -1, "1: pass axis=1"
    wrong, right, given = first, last, {"axis": 1}
    if eager.framework == "torch":
        shape, axis, pass_ = (2, 4, 5, 3), 1, "3: pass logits.movedim(3, 1)"
        wrong, right, given = last, first, {}
    sentence = (
        f"margins must have shape ({shape[axis]},), one number for each class of the logits "
        f"{shape}, got (3,); the class axis is {axis}, not {pass_}"
    )
    with refuses(ValueError, sentence):
        eager.losses.lmf_loss(array(eager, wrong), y, MARGINS)
    expected = eager.losses.lmf_loss(array(eager, right), y, MARGINS)
    moved = array(eager, wrong) if given else array(eager, wrong).movedim(3, 1)
    value = eager.losses.lmf_loss(moved, y, MARGINS, **given)
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=1e-5)


def test_masks_with_a_channel(eager):
    z = array(eager, RNG.normal(0, 1, (2, 3, 4, 5)).astype(np.float32))
    y = array(eager, np.zeros((2, 1, 4, 5), np.int32))
    axis = {} if eager.framework == "torch" else {"axis": 1}
    sentence = (
        "integer labels must have shape (2, 4, 5), the logits' without the class axis, "
        "got (2, 1, 4, 5); remove the axis of size 1 with labels.squeeze(1)"
    )
    with refuses(ValueError, sentence):
        eager.losses.lmf_loss(z, y, MARGINS, **axis)


def test_a_mask_must_be_boolean(eager):
    if eager.framework == "torch":
        pytest.skip("ignore_index is PyTorch's mask")
    with refuses(TypeError, "where must be bool, got int32; use mask != 0"):
        eager.losses.lmf_loss(Z, Y, MARGINS, where=np.ones(6, np.int32))
    sentence = "where must have shape (6,), one value for each example, got (6, 3)"
    with refuses(ValueError, sentence):
        eager.losses.lmf_loss(Z, Y, MARGINS, where=np.ones((6, 3), bool))


def test_classes_refuse_what_the_spec_refuses(eager):
    names = "none, sum, mean, batch_mean"
    if eager.framework == "keras":
        names = "sum_over_batch_size, mean, batch_mean, sum, mean_with_sample_weight, none, None"
    for name in ("LMFLoss", "LDAMLoss", "FocalLoss"):
        counts = () if name == "FocalLoss" else (COUNTS,)
        with refuses(ValueError, f"reduction must be one of {names}, got 'average'"):
            getattr(eager.losses, name)(*counts, reduction="average")
        with refuses(ValueError, "max_margin must be positive, got 0"):
            getattr(eager.losses, name)(*counts, max_margin=0)
    with refuses(ValueError, "gamma must be at least 0, got -1"):
        eager.losses.FocalLoss(gamma=-1)
    sentence = (
        "class_weight 'balanced' is computed from class counts, got class_counts=None; "
        "pass class_counts, or as an array what lmf_multi.class_weights computes"
    )
    with refuses(ValueError, sentence):
        eager.losses.FocalLoss(class_weight="balanced")


@pytest.mark.parametrize("counts", [[1.0, 1.0, 50.0], [0.25, 0.75], 2.0, COUNTS], ids=str)
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 3.0]], ids=["none", "array"])
def test_focal_takes_no_counts_in_vain(eager, counts, weight):
    """Most likely they are meant as weights; a spec's counts are no mistake."""
    sentence = (
        "class_counts has no effect without a named class_weight or logit_adjustment, "
        f"got class_counts={counts} and class_weight={weight}; "
        "pass numbers as class_weight=[...], or name a scheme, as class_weight='balanced'"
    )
    with refuses(ValueError, sentence):
        eager.losses.FocalLoss(counts, class_weight=weight)
    spec = LMFSpec(COUNTS, class_weight=weight)
    loss, expected = (each.FocalLoss.from_spec(spec) for each in (eager.losses, reference))
    np.testing.assert_allclose(value_of(eager, loss), expected(Z, Y), rtol=1e-5)


def test_classes_and_logits_must_agree(eager):
    loss = eager.losses.LMFLoss([5, 3])
    with refuses(ValueError, VECTOR.format("margins")):
        value_of(eager, loss)


def test_adjustments_are_of_class_counts_or_of_the_right_shape(eager):
    """Names are for classes, and focal needs the counts."""
    losses, z = eager.losses, array(eager, Z)
    with refuses(
        ValueError,
        "logit_adjustment is computed from class counts, got class_counts=None and "
        "logit_adjustment=1.0; pass class_counts",
    ):
        losses.FocalLoss(logit_adjustment=1.0)
    with refuses(
        TypeError,
        "logit_adjustment must be an array (C,) in functions, got 'balanced'; compute it with "
        "lmf_multi.log_priors or use LMFLoss",
    ):
        losses.lmf_loss(z, array(eager, Y), MARGINS, logit_adjustment="balanced")
    t = array(eager, np.zeros_like(Z, np.int32))
    for added in ([0.5, 1.0], [[0.5, 1.0, 2.0]]):
        with refuses(
            ValueError,
            "logit_adjustment must have shape () or (3,), one number for each label of the logits "
            f"(6, 3), got {np.shape(added)}; check positive_counts",
        ):
            losses.sigmoid_lmf_loss(z, t, [0.1, 0.5], logit_adjustment=added)
