"""The spec: every bad argument and its sentence, every form of counts, every weighting scheme."""

import copy
import dataclasses
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lmf_multi import LMFSpec, class_counts, class_margins, class_weights, log_priors, reference
from lmf_multi.spec import check_inputs, check_sigmoid_inputs
from tests.checks import refuses
from tests.frameworks import load

NUMBERS = ("alpha", "beta", "gamma", "max_margin", "scale", "label_smoothing", "logit_adjustment")
AT_LEAST_0 = ("alpha", "beta", "gamma")
POSITIVE = ("max_margin", "scale")


# --- class counts


AT_LEAST_1 = (
    "class_counts must be at least 1 for every class, got {}; "
    "drop the class or merge it with another"
)
WHOLE = "class_counts must be whole numbers, got {}; pass numbers of examples, not frequencies"
SHAPE = (
    "class_counts must hold one count for each of at least 2 classes, got shape {}; "
    "count labels with lmf_multi.class_counts"
)
KEYS = "class_counts must be keyed by the integer labels, got key {}; pass a list in label order"
GAP = "class_counts must name every class from 0 to 2, got none for class 1; add its count"
NEGATIVE_KEY = "class_counts must be keyed by labels from 0 on, got key -1; drop the key"


def test_counts_of_pandas_are_by_label():
    """``value_counts`` is in order of frequency; its index says which class each count is of."""
    pandas = load("pandas")
    labels = pandas.Series([2] * 3 + [0] * 2 + [1])
    assert LMFSpec(labels.value_counts()).class_counts == (2, 1, 3)
    names = pandas.Series(["nv", "nv", "mel"])
    with refuses(TypeError, KEYS.format("'nv'")):
        LMFSpec(names.value_counts())


@pytest.mark.parametrize(
    ("counts", "kind", "sentence"),
    [
        ([5, 0, 1], ValueError, AT_LEAST_1.format("0 for class 1")),
        ([5, 1, -3], ValueError, AT_LEAST_1.format("-3 for class 2")),
        ({0: 5, 1: 0}, ValueError, AT_LEAST_1.format("0 for class 1")),
        ([2.5, 1], ValueError, WHOLE.format("2.5 for class 0")),
        ([1, float("nan")], ValueError, WHOLE.format("nan for class 1")),
        ([float("inf"), 1], ValueError, WHOLE.format("inf for class 0")),
        ([7], ValueError, SHAPE.format("(1,)")),
        ([], ValueError, SHAPE.format("(0,)")),
        ({}, ValueError, SHAPE.format("(0,)")),
        (7, ValueError, SHAPE.format("()")),
        ([[3, 1]], ValueError, SHAPE.format("(1, 2)")),
        (["3", "1"], TypeError, "class_counts must be numbers, got ['3', '1']"),
        ([3, None], TypeError, "class_counts must be numbers, got [3, None]"),
        (None, TypeError, "class_counts must be numbers, got None"),
        (
            LMFSpec([3, 1]),
            TypeError,
            "class_counts must be numbers, got an LMFSpec; pass it to from_spec",
        ),
        ({0: 3, 2: 1}, ValueError, GAP),
        ({-1: 9, 0: 3, 1: 1}, ValueError, NEGATIVE_KEY),
        ({"benign": 3, "malignant": 1}, TypeError, KEYS.format("'benign'")),
        ({False: 3, True: 1}, TypeError, KEYS.format("False")),
        ({0.0: 3, 1.0: 1}, TypeError, KEYS.format("0.0")),
    ],
)
def test_bad_counts_are_refused(counts, kind, sentence):
    for build in (LMFSpec, class_margins, lambda counts: class_weights(counts, "balanced")):
        with refuses(kind, sentence):
            build(counts)


@pytest.mark.parametrize(
    "counts",
    [
        [625, 16, 1],
        (625, 16, 1),
        [625.0, 16.0, 1.0],
        np.array([625, 16, 1], np.uint16),
        np.array([625, 16, 1], np.float32),
        {0: 625, 1: 16, 2: 1},
        {2: 1, 0: 625, 1: 16},
        {np.int64(0): np.int64(625), np.int64(1): 16, np.int64(2): 1},
        Counter([0] * 625 + [1] * 16 + [2]),
    ],
    ids=repr,
)
def test_counts_of_every_form(counts):
    spec = LMFSpec(counts)
    assert spec.class_counts == (625, 16, 1)
    assert all(type(count) is int for count in spec.class_counts)
    assert spec == LMFSpec([625, 16, 1])


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_counts_and_weights_as_tensors(framework):
    module = load(framework)
    as_tensor = {
        "torch": lambda values: module.tensor(values),
        "jax": lambda values: module.numpy.array(values),
        "tensorflow": lambda values: module.constant(values),
    }[framework]
    spec = LMFSpec(as_tensor([625, 16, 1]), class_weight=as_tensor([0.5, 1.0, 2.0]))
    assert spec == LMFSpec([625, 16, 1], class_weight=[0.5, 1.0, 2.0])
    np.testing.assert_array_equal(class_counts(as_tensor([[0, 2], [2, 1]])), [1, 1, 2])


def test_counts_with_a_gradient_attached():
    torch = load("torch")
    assert LMFSpec(torch.tensor([3.0, 1.0], requires_grad=True)).class_counts == (3, 1)


# --- numbers


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_must_be_finite(name, value):
    with refuses(ValueError, f"{name} must be finite, got {value}"):
        LMFSpec([3, 1], **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, "1.5", b"1", True, np.True_, [1.0], (1.0,), {}, 1j])
def test_numbers_must_be_numbers(name, value):
    with refuses(TypeError, f"{name} must be a number, got {value!r}"):
        LMFSpec([3, 1], **{name: value})


@pytest.mark.parametrize("name", AT_LEAST_0)
def test_shares_and_focusing_may_be_0_but_not_negative(name):
    assert getattr(LMFSpec([3, 1], **{name: 0}), name) == 0.0
    with refuses(ValueError, f"{name} must be at least 0, got -0.5"):
        LMFSpec([3, 1], **{name: -0.5})


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -0.5])
def test_margin_and_scale_must_be_positive(name, value):
    with refuses(ValueError, f"{name} must be positive, got {value}"):
        LMFSpec([3, 1], **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_smoothing_must_be_a_share(value):
    with refuses(ValueError, f"label_smoothing must be between 0 and 1, got {value}"):
        LMFSpec([3, 1], label_smoothing=value)


@pytest.mark.parametrize("smoothing", [0, 1])
def test_smoothing_may_be_nothing_or_all(smoothing):
    assert LMFSpec([3, 1], label_smoothing=smoothing).label_smoothing == smoothing


@pytest.mark.parametrize("value", [2, np.float32(2), np.int64(2)], ids=repr)
def test_numbers_of_every_kind_become_floats(value):
    spec = LMFSpec([3, 1], gamma=value)
    assert spec.gamma == 2.0
    assert type(spec.gamma) is float


def test_arrays_are_no_numbers():
    with refuses(TypeError, "gamma must be a number, got array(1.)"):
        LMFSpec([3, 1], gamma=np.array(1.0))
    torch = load("torch")
    with refuses(TypeError, "gamma must be a number, got tensor(1.)"):
        LMFSpec([3, 1], gamma=torch.tensor(1.0))


def test_class_functions_check_their_numbers():
    with refuses(ValueError, "max_margin must be positive, got -0.5"):
        class_margins([3, 1], max_margin=-0.5)
    with refuses(ValueError, "max_margin must be positive, got 0"):
        class_weights([3, 1], "margin", max_margin=0)
    with refuses(ValueError, "effective_beta must be at least 0 and less than 1, got 1"):
        class_weights([3, 1], "effective", effective_beta=1)
    with refuses(ValueError, "effective_beta must be finite, got nan"):
        class_weights([3, 1], "effective", effective_beta=float("nan"))


# --- class weights


NAMES = "class_weight must be one of margin, complement, balanced, effective, an array or None, "
PER_CLASS = "class_weight must have shape (2,), one number for each class, got {}"
FINITE = "class_weight must be finite and at least 0, got {}"
KIND = "class_weight must be numbers, a name or None, got {}"


@pytest.mark.parametrize(
    ("weight", "kind", "sentence"),
    [
        ("inverse", ValueError, NAMES + "got 'inverse'"),
        ([1, 2, 3], ValueError, PER_CLASS.format("(3,)")),
        ([[1, 2]], ValueError, PER_CLASS.format("(1, 2)")),
        (5.0, ValueError, PER_CLASS.format("()")),
        ([1, -1], ValueError, FINITE.format("-1 for class 1")),
        ([float("nan"), 1.0], ValueError, FINITE.format("nan for class 0")),
        ([1.0, float("inf")], ValueError, FINITE.format("inf for class 1")),
        ([0, 0], ValueError, "class_weight must be positive for at least one class, got all 0"),
        (["1", "2"], TypeError, KIND.format("['1', '2']")),
        ([True, False], TypeError, KIND.format("[True, False]")),
    ],
)
def test_bad_class_weights_are_refused(weight, kind, sentence):
    with refuses(kind, sentence):
        LMFSpec([3, 1], class_weight=weight)
    with refuses(kind, sentence):
        class_weights([3, 1], weight)


# n = (6, 3, 1), worked by hand from SPEC's table; effective with b = 1/2: (1/2)/(1 - 2^-n) is
# 32/63, 4/7, 1 with the sum 131/63.
@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("margin", {}, [0.5 * (1 / 6) ** 0.25, 0.5 * (1 / 3) ** 0.25, 0.5]),
        ("margin", {"max_margin": 2.0}, [2 * (1 / 6) ** 0.25, 2 * (1 / 3) ** 0.25, 2]),
        ("complement", {}, [0.2, 0.35, 0.45]),
        ("balanced", {}, [5 / 9, 10 / 9, 10 / 3]),
        ("effective", {"effective_beta": 0.5}, [96 / 131, 108 / 131, 189 / 131]),
        ("effective", {"effective_beta": 0.0}, [1, 1, 1]),
        ([0, 2, 1.5], {}, [0, 2, 1.5]),
        (None, {}, [1, 1, 1]),
    ],
)
def test_weights_worked_by_hand(scheme, options, expected):
    weights = class_weights([6, 3, 1], scheme, **options)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, expected, rtol=1e-15)


def test_margins_worked_by_hand():
    # 10^4, 5^4 and 1 examples: fourth roots 10, 5 and 1
    np.testing.assert_allclose(class_margins([10_000, 625, 1]), [0.05, 0.1, 0.5], rtol=1e-15)
    np.testing.assert_allclose(class_margins([1250, 2], max_margin=2.0), [0.4, 2.0], rtol=1e-15)


def test_balanced_weights_are_those_of_scikit_learn():
    compute_class_weight = load("sklearn.utils.class_weight").compute_class_weight
    counts = [6705, 1113, 1099, 514, 327, 142, 115]
    labels = np.repeat(np.arange(7), counts)
    expected = compute_class_weight("balanced", classes=np.arange(7), y=labels)
    np.testing.assert_allclose(class_weights(counts, "balanced"), expected, rtol=1e-14)


def test_effective_weights_do_not_cancel():
    # in exact fractions of the float 0.9999; written as 1 - b**n it loses digits for n = 1
    b, n = Fraction(0.9999), [1, 7, 2000, 10_000]
    inverse = [(1 - b) / (1 - b**count) for count in n]
    expected = [float(4 * value / sum(inverse)) for value in inverse]
    np.testing.assert_allclose(class_weights(n, "effective"), expected, rtol=1e-15)


# --- the spec as a value


def test_defaults_are_the_published_configuration():
    spec = LMFSpec([625, 16, 1])
    assert (spec.alpha, spec.beta, spec.gamma) == (1.5, 1.0, 1.5)
    assert (spec.max_margin, spec.scale, spec.label_smoothing) == (0.5, 30.0, 0.0)
    np.testing.assert_allclose(spec.margins, [0.1, 0.25, 0.5], rtol=1e-15)
    np.testing.assert_array_equal(spec.weights, spec.margins)
    assert spec.num_classes == 3
    assert spec.logit_adjustment == 0.0
    np.testing.assert_array_equal(spec.adjustments, np.zeros(3))


def test_adjustments_are_tau_times_the_logarithms_of_the_shares():
    """Any number is a τ; those of prediction are often below 0."""
    np.testing.assert_allclose(np.exp(log_priors([625, 16, 1])) * 642, [625, 16, 1], rtol=1e-14)
    for tau in (1, -0.5, 3.0):
        spec = LMFSpec([625, 16, 1], logit_adjustment=tau)
        np.testing.assert_allclose(spec.adjustments, tau * np.log(np.array([625, 16, 1]) / 642))
        with pytest.raises(ValueError, match="read-only"):
            spec.adjustments[0] = 1.0
    with refuses(ValueError, AT_LEAST_1.format("0 for class 1")):
        log_priors([5, 0, 1])


def test_the_recommended_loss_by_its_formula():
    """Cross-entropy of z + log π, of which the label's is less its margin."""
    counts, z, y = np.array([600, 30, 5]), np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), [1, 2]
    margins = 0.5 * (counts.min() / counts) ** 0.25
    adjusted = z + np.log(counts / counts.sum()) - margins * np.eye(3)[y]
    expected = np.logaddexp.reduce(adjusted, axis=1) - adjusted[[0, 1], y]
    loss = reference.LMFLoss.from_spec(LMFSpec.recommended(counts), reduction="none")
    np.testing.assert_allclose(loss(z, y), expected, rtol=1e-12)


@pytest.mark.parametrize("class_weight", ["balanced", None, [1, 2.5, 0], np.ones(3)], ids=repr)
def test_repr_rebuilds_the_spec(class_weight):
    spec = LMFSpec({0: 9, 1: 4, 2: 1}, alpha=2, gamma=0, class_weight=class_weight)
    for twin in (eval(repr(spec)), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert twin == spec
        assert hash(twin) == hash(spec)
    assert LMFSpec([9, 4, 2]) != LMFSpec([9, 4, 1])


def test_repr_of_many_classes_is_short():
    spec = LMFSpec(range(1, 8143), class_weight=np.arange(1, 8143))
    assert "class_counts=(1, 2, 3, ..., 8140, 8141, 8142), alpha=1.5" in repr(spec)
    assert "class_weight=(1.0, 2.0, 3.0, ..., 8140.0, 8141.0, 8142.0), label" in repr(spec)
    assert "..." not in repr(LMFSpec(range(1, 21)))
    with refuses(
        TypeError, "class_counts must be numbers, got ['0', '1', '2', ..., '7', '8', '9']"
    ):
        LMFSpec(list(map(str, [*range(10), *range(10), 7, 8, 9])))


def test_spec_is_frozen():
    spec = LMFSpec([9, 4])
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'alpha'"):
        spec.alpha = 2.0
    for array in (spec.margins, spec.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_spec_keeps_no_view_of_the_callers_array():
    weights = np.array([1.0, 2.0])
    spec = LMFSpec([9, 4], class_weight=weights)
    weights[0] = 7.0
    np.testing.assert_array_equal(spec.weights, [1.0, 2.0])


def test_hyper_parameters_go_by_name():
    with pytest.raises(TypeError, match="positional argument"):
        LMFSpec([9, 4], 1.5)


# --- counting labels


def test_counts_from_labels():
    counts = class_counts(np.array([[0, 2], [2, -100]]), num_classes=4, ignore_index=-100)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [1, 0, 2, 0])
    np.testing.assert_array_equal(class_counts([0, 2, 2]), [1, 0, 2])
    np.testing.assert_array_equal(class_counts(np.array([], np.int64), 3), [0, 0, 0])


RANGE = "labels must be in [0, {0}), got {1}; mask examples without a class with ignore_index={1}"
EMPTY = "labels must not be empty, got none; pass num_classes"
ONE_HOT = "labels must be integers, got float64; take argmax of one-hot labels"


@pytest.mark.parametrize(
    ("labels", "num_classes", "kind", "sentence"),
    [
        ([0, 3], 3, ValueError, RANGE.format(3, 3) + ", or subtract 1 if labels begin at 1"),
        ([0, 4], 3, ValueError, RANGE.format(3, 4)),
        ([0, -1], None, ValueError, RANGE.format(1, -1)),
        (np.array([], np.int64), None, ValueError, EMPTY),
        ([[0.0, 1.0]], None, TypeError, ONE_HOT),
        ([0, 1], 2.5, ValueError, "num_classes must be a positive whole number, got 2.5"),
    ],
)
def test_bad_labels_are_not_counted(labels, num_classes, kind, sentence):
    with refuses(kind, sentence):
        class_counts(labels, num_classes)


# --- the checks of one call, as every framework uses them


def call(logits=((2, 3), "float32"), labels=((2,), "int64"), axis=-1, margins=(3,), where=None):
    return check_inputs(logits, labels, axis, {"margins": margins}, where)


def test_label_form_is_told_by_the_dtype():
    assert call() is False
    assert call(labels=((2,), "uint8")) is False
    assert call(labels=((2, 3), "bfloat16")) is True
    assert call(((None, 3), "float32"), ((4,), "int32"), margins=None) is False


DTYPES = "logits must be one of float16, bfloat16, float32, float64, got int64"
AXIS = "logits must have the class axis {}"
BINARY = (
    "logits must have at least 2 classes along axis -1, got shape (2, 1); "
    "give a binary problem two logits"
)
VECTOR = (
    "margins must have shape (3,), one number for each class of the logits (2, 3), "
    "got (2,); check class_counts"
)
FLOATING = (
    "floating labels are distributions and must have the logits' shape (2, 3), got (2,); "
    "cast class indices to integers"
)
INTEGER = (
    "integer labels must have shape (2,), the logits' without the class axis, got (2, 3); "
    "cast one-hot labels to floating point"
)
BOOLEAN = "labels must be integers or distributions in floating point, got bool"
WHERE = "where must have shape (2,), one value for each example, got (2, 3)"


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"logits": ((2, 3), "int64")}, TypeError, DTYPES),
        ({"logits": ((), "float32")}, ValueError, AXIS.format("-1, got shape ()")),
        ({"axis": 2}, ValueError, AXIS.format("2, got shape (2, 3)")),
        ({"logits": ((2, 1), "float32")}, ValueError, BINARY),
        ({"margins": (2,)}, ValueError, VECTOR),
        ({"labels": ((2,), "float32")}, ValueError, FLOATING),
        ({"labels": ((2, 3), "int64")}, ValueError, INTEGER),
        ({"labels": ((2,), "bool")}, TypeError, BOOLEAN),
        ({"where": ((2,), "uint8")}, TypeError, "where must be bool, got uint8; use mask != 0"),
        ({"where": ((2, 3), "bool")}, ValueError, WHERE),
    ],
)
def test_bad_inputs_are_refused(arguments, kind, sentence):
    with refuses(kind, sentence):
        call(**arguments)


IMAGES = ((2, 3, 4, 5), "float32")
NEEDS = "integer labels must have shape {}, the logits' without the class axis, got {}"
FLOATS = "floating labels are distributions and must have the logits' shape {}, got {}"
VECTORS = "margins must have shape ({},), one number for each class of the logits {}, got ({},); {}"


@pytest.mark.parametrize(
    ("logits", "labels", "axis", "sentence"),
    [
        # an axis of size 1 too many
        ((2, 3, 4, 5), (2, 1, 4, 5), 1, NEEDS.format((2, 4, 5), (2, 1, 4, 5))
         + "; remove the axis of size 1 with labels.squeeze(1)"),
        ((2, 3), (2, 1), -1, NEEDS.format((2,), (2, 1))
         + "; remove the axis of size 1 with labels.squeeze(1)"),
        ((2, 4, 5, 3), (2, 4, 5, 1), -1, NEEDS.format((2, 4, 5), (2, 4, 5, 1))
         + "; remove the axis of size 1 with labels.squeeze(3)"),
        ((2, 3, 4, 5), (1, 2, 4, 5), 1, NEEDS.format((2, 4, 5), (1, 2, 4, 5))
         + "; remove the axis of size 1 with labels.squeeze(0)"),
        # the classes along another axis
        ((2, 4, 5, 3), (2, 4, 5), 1, NEEDS.format((2, 5, 3), (2, 4, 5))
         + "; the class axis is 1, not 3: pass {}"),
        ((2, 3, 4, 5), (2, 4, 5), -1, NEEDS.format((2, 3, 4), (2, 4, 5))
         + "; the class axis is -1, not 1: pass {}"),
        # neither
        ((2, 3, 4, 5), (2, 4, 6), 1, NEEDS.format((2, 4, 5), (2, 4, 6))),
        ((4, 3), (3,), -1, NEEDS.format((4,), (3,))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [True, False], ids=["axis", "no axis"])
def test_labels_of_another_shape_are_told_what_to_do(logits, labels, axis, sentence, given):
    to = axis if axis != -1 else -1
    j = sentence.partition("not ")[2].partition(":")[0]
    call = f"axis={j}" if given else f"logits.movedim({j}, {to})"
    arguments = (logits, "float32"), (labels, "int64"), axis, {}
    with refuses(ValueError, sentence.replace("{}", call)):
        check_inputs(*arguments, axis_is_given=given)


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ((2, 1, 4, 5), "; remove the axis of size 1 with labels.squeeze(1) and cast class indices "
         "to integers"),
        ((2, 4, 5), "; cast class indices to integers"),
        ((2, 3, 4), "; the class axis is 1, not 3: pass axis=3 and cast class indices to integers"),
        ((2, 4, 5, 3), ""),
    ],
)  # fmt: skip
def test_floating_labels_of_another_shape(labels, remedy):
    with refuses(ValueError, FLOATS.format(IMAGES[0], labels) + remedy):
        check_inputs(IMAGES, (labels, "float32"), 1, {})


@pytest.mark.parametrize(
    ("shape", "axis", "size", "remedy"),
    [
        ((2, 4, 5, 3), 1, 3, "the class axis is 1, not 3: pass logits.movedim(3, 1)"),
        ((2, 9, 3), 1, 3, "the class axis is 1, not 2: pass logits.movedim(2, 1)"),
        ((2, 4, 5, 3), 1, 5, "check class_counts"),  # along no usual axis
        ((3, 4), 1, 3, "check class_counts"),  # the batch
    ],
)
def test_vectors_of_another_axis(shape, axis, size, remedy):
    sentence = VECTORS.format(shape[axis], shape, size, remedy)
    with refuses(ValueError, sentence):
        check_inputs((shape, "float32"), ((2,), "int64"), axis, {"margins": (size,)}, None, False)


def test_masks_of_another_shape():
    sentence = (
        "where must have shape (2, 4, 5), one value for each example, got (2, 1, 4, 5); "
        "remove the axis of size 1 with where.squeeze(1)"
    )
    with refuses(ValueError, sentence):
        check_inputs(IMAGES, ((2, 4, 5), "int64"), 1, {}, ((2, 1, 4, 5), "bool"))


@pytest.mark.parametrize(
    ("logits", "labels", "remedy"),
    [
        ((2, 4, 5), (2, 1, 4, 5), "; remove the axis of size 1 with labels.squeeze(1)"),
        ((2, 1, 4, 5), (2, 4, 5), "; add the axis of size 1 with labels[:, None]"),
        ((2, 4, 5, 1), (2, 4, 5), "; add the axis of size 1 with labels[:, :, :, None]"),
        ((6, 1), (6,), "; add the axis of size 1 with labels[:, None]"),
        ((2, 4), (2, 5), ""),
    ],
)
def test_sigmoid_labels_of_another_shape(logits, labels, remedy):
    with refuses(ValueError, f"labels must have the logits' shape {logits}, got {labels}{remedy}"):
        check_sigmoid_inputs((logits, "float32"), (labels, "int64"), 0, {"margins": (2,)})


def test_sigmoid_vectors_of_another_axis():
    sentence = (
        "margins must have shape (2,) or (4, 2), negative and positive of each label of the logits "
        "(2, 4, 5, 3), got (3, 2); the label axis is 1, not 3: pass logits.movedim(3, 1)"
    )
    with refuses(ValueError, sentence):
        logits = (2, 4, 5, 3), "float32"
        check_sigmoid_inputs(logits, logits, 1, {"margins": (3, 2)}, None, False)


@pytest.mark.parametrize("value", [255.0, True, "255", [255]], ids=repr)
def test_a_label_to_ignore_is_a_whole_number(value):
    sentence = f"ignore_index must be a whole number, got {value!r}; pass None to ignore no label"
    with refuses(TypeError, sentence):
        class_counts([0, 255], ignore_index=value)
    np.testing.assert_array_equal(class_counts([0, 255], ignore_index=np.uint8(255)), [1])
