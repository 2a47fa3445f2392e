"""What only Keras has: training, saving, label shapes, probabilities, masks, sample weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmf_multi import class_margins, log_priors, reference
from tests.adapters import Keras
from tests.cases import Case, rounded
from tests.checks import refuses
from tests.frameworks import KERAS_BACKEND, load

COUNTS, WEIGHTS = (625, 16, 1), [0.5, 1.0, 3.0]
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (12, 3)).astype(np.float32)
LABELS = np.tile([0, 1, 2], 4)
INPUTS = (RNG.normal(0, 0.5, (12, 4)) + np.eye(3, 4)[LABELS]).astype(np.float32)


@pytest.fixture(scope="module")
def losses(keras):
    return load("lmf_multi.keras")


def numpy(tensor):
    return np.asarray(load("keras").ops.convert_to_numpy(tensor), np.float64)


def linear_model(keras, loss, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="logits")])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, **options)
    return model


# --- training


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit_compile"])
def test_fit(keras, losses, compiled):
    model = linear_model(keras, losses.LMFLoss(COUNTS), jit_compile=compiled)
    first = reference.LMFLoss(COUNTS)(numpy(model(INPUTS)), LABELS)
    history = model.fit(INPUTS, LABELS, batch_size=12, epochs=30, shuffle=False, verbose=0)
    np.testing.assert_allclose(history.history["loss"][0], first, rtol=1e-5)
    assert history.history["loss"][-1] < 0.5 * first
    last = model.evaluate(INPUTS, LABELS, batch_size=12, verbose=0)
    np.testing.assert_allclose(
        last, reference.LMFLoss(COUNTS)(numpy(model(INPUTS)), LABELS), rtol=1e-5
    )


def weighted_mean(logits, sample_weight, w):
    """Each term's numerator weighted by example, its denominator the plain one."""
    margins = class_margins(COUNTS)
    ldam = reference.ldam_loss(logits, LABELS, margins, w, reduction="none")
    focal = reference.focal_loss(logits, LABELS, w, reduction="none")
    total = np.sum(np.asarray(w)[LABELS])
    return 1.5 * (sample_weight * ldam).sum() / total + (sample_weight * focal).sum() / len(focal)


def test_fit_with_sample_weight(keras, losses):
    model = linear_model(keras, losses.LMFLoss(COUNTS, class_weight=WEIGHTS))
    sample_weight = np.linspace(0, 2, 12).astype(np.float32)
    expected = weighted_mean(numpy(model(INPUTS)), sample_weight, WEIGHTS)
    options = {"batch_size": 12, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(INPUTS, LABELS, sample_weight=sample_weight, **options)
    np.testing.assert_allclose(history.history["loss"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None]], ids=["(N,)", "(N,1)"])
def test_fit_with_class_weight(keras, losses, labels):
    model = linear_model(keras, losses.LMFLoss(COUNTS, class_weight=WEIGHTS))
    by_class = {0: 0.5, 1: 1.0, 2: 4.0}
    expected = weighted_mean(numpy(model(INPUTS)), np.array([0.5, 1.0, 4.0])[LABELS], WEIGHTS)
    options = {"batch_size": 12, "epochs": 1, "shuffle": False, "verbose": 0}
    history = model.fit(INPUTS, labels, class_weight=by_class, **options)
    np.testing.assert_allclose(history.history["loss"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fit_with_mixed_precision(keras, losses, policy):
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = linear_model(keras, losses.LMFLoss(COUNTS))
        logits = model(INPUTS)
        assert keras.backend.standardize_dtype(logits.dtype) == policy.removeprefix("mixed_")
        logits = numpy(keras.ops.cast(logits, "float32"))
        history = model.fit(INPUTS, LABELS, batch_size=12, epochs=30, shuffle=False, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy(before)
    expected = reference.LMFLoss(COUNTS)(logits, LABELS)
    # a compiled step may keep the layer's output in float32: within the half type's rounding
    np.testing.assert_allclose(history.history["loss"][0], expected, rtol=2e-2)
    assert history.history["loss"][-1] < 0.5 * expected


# --- saving


LOAD = """
import json, sys, warnings
import numpy as np, keras
import lmf_multi.keras
model = keras.models.load_model(sys.argv[1])
inputs, labels = np.load(sys.argv[2]), np.load(sys.argv[3])
print(json.dumps([type(model.loss).__name__, model.loss.get_config(),
                  model.evaluate(inputs, labels, batch_size=12, verbose=0)]))
"""


def test_save_and_load_in_a_fresh_process(keras, losses, tmp_path):
    options = {"class_weight": np.array(WEIGHTS), "logit_adjustment": 0.5, "ignore_class": -1}
    loss = losses.LMFLoss({0: 625, 1: 16, 2: 1}, gamma=0.5, **options)
    model = linear_model(keras, loss)
    model.fit(INPUTS, LABELS, epochs=1, verbose=0)
    expected = model.evaluate(INPUTS, LABELS, batch_size=12, verbose=0)
    paths = [tmp_path / name for name in ("model.keras", "inputs.npy", "labels.npy")]
    model.save(paths[0])
    np.save(paths[1], INPUTS)
    np.save(paths[2], LABELS)
    root = Path(reference.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(root), "KERAS_BACKEND": KERAS_BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    name, config, value = json.loads(result.stdout.splitlines()[-1])
    assert name == "LMFLoss"
    assert config == loss.get_config()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def is_plain(value):
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("tau", [0.0, np.float32(1.5)])
@pytest.mark.parametrize("weight", [np.array(WEIGHTS), tuple(WEIGHTS), "balanced", None])
@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
def test_config_is_plain_and_rebuilds_the_loss(keras, losses, name, weight, tau):
    cls = getattr(losses, name)
    numbers = {"max_margin": np.float32(0.25), "label_smoothing": 0.1, "class_weight": weight}
    numbers["logit_adjustment"] = tau
    counts = (np.array(COUNTS),) if name != "FocalLoss" or isinstance(weight, str) or tau else ()
    loss = cls(*counts, **numbers, axis=1, reduction="sum", name="mine", dtype="bfloat16")
    config = loss.get_config()
    assert all(map(is_plain, config.values())), config
    assert json.loads(json.dumps(config)) == config
    assert (config["dtype"], config["logit_adjustment"]) == ("bfloat16", tau)
    twins = [
        cls.from_config(config),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss)),
        keras.losses.deserialize(keras.losses.serialize(loss)),
    ]
    for twin in twins:
        assert type(twin) is cls
        assert twin.get_config() == config
        np.testing.assert_array_equal(numpy(twin(LABELS, LOGITS)), numpy(loss(LABELS, LOGITS)))


@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss", "SigmoidLMFLoss"])
def test_configs_from_before_there_was_an_adjustment(losses, name):
    counts = {"SigmoidLMFLoss": (3, 9), "FocalLoss": ()}.get(name, (COUNTS,))
    loss = getattr(losses, name)(*counts)
    config = loss.get_config()
    assert config.pop("logit_adjustment") == 0.0
    assert type(loss).from_config(config).get_config() == loss.get_config()


# --- logit adjustment


def test_balanced_softmax(losses):
    """-log(n_y e^{z_y} / Σ n_k e^{z_k}), Ren et al., arXiv 2007.10740, equation 3."""
    n, z = np.array(COUNTS, np.float64), LOGITS.astype(np.float64)
    weighted = n * np.exp(z)
    expected = -np.log(weighted[np.arange(12), LABELS] / weighted.sum(1))
    loss = losses.FocalLoss(COUNTS, gamma=0.0, logit_adjustment=1.0, reduction="none")
    np.testing.assert_allclose(loss.logit_adjustment, log_priors(COUNTS))
    np.testing.assert_allclose(numpy(loss(LABELS, LOGITS)), expected, rtol=1e-5)
    added = log_priors(COUNTS).astype(np.float32)
    value = losses.focal_loss(LOGITS, LABELS, gamma=0.0, logit_adjustment=added)
    np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)


def test_other_class_weights_leave_the_adjustment(losses):
    """As ``DeferredReweighting`` sets them."""
    for name in ("LMFLoss", "LDAMLoss", "FocalLoss"):
        loss = getattr(losses, name)(COUNTS, class_weight="balanced", logit_adjustment=1.5)
        for weight in (WEIGHTS, "effective", None):
            loss.set_class_weight(weight)
            options = {"class_weight": weight, "logit_adjustment": 1.5}
            expected = getattr(reference, name)(COUNTS, **options)(LOGITS, LABELS)
            np.testing.assert_allclose(numpy(loss(LABELS, LOGITS)), expected, rtol=1e-5)
            assert loss.get_config()["logit_adjustment"] == 1.5


def test_an_adjustment_of_probabilities(keras, losses):
    """Of a model that ends in a softmax or a sigmoid: what is added is to its logits."""
    p = np.exp(LOGITS.astype(np.float64))
    p = (p / p.sum(1, keepdims=True)).astype("float32")
    loss = losses.LMFLoss(COUNTS, scale=5.0, logit_adjustment=1.0, from_logits=False)
    expected = reference.LMFLoss(COUNTS, scale=5.0, logit_adjustment=1.0)(np.log(p), LABELS)
    value = loss(LABELS, keras.ops.convert_to_tensor(p))
    np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)
    t, by_label = np.eye(3, dtype="int32")[LABELS], (COUNTS, COUNTS[::-1])
    loss = losses.SigmoidLMFLoss(*by_label, logit_adjustment=1.0, from_logits=False)
    expected = reference.SigmoidLMFLoss(*by_label, logit_adjustment=1.0)(np.log(p / (1 - p)), t)
    np.testing.assert_allclose(numpy(loss(t, keras.ops.convert_to_tensor(p))), expected, rtol=1e-4)


def test_fit_with_an_adjustment(keras, losses):
    """The model's own logits are then those of classes that count alike."""
    model = linear_model(keras, losses.LMFLoss(COUNTS, logit_adjustment=1.0))
    exact = reference.LMFLoss(COUNTS, logit_adjustment=1.0)
    first = exact(numpy(model(INPUTS)), LABELS)
    options = {"batch_size": 12, "shuffle": False, "verbose": 0}
    history = model.fit(INPUTS, LABELS, epochs=3, **options).history["loss"]
    np.testing.assert_allclose(history[0], first, rtol=1e-5)
    assert history[-1] < history[0]


# --- labels and predictions


def label_forms():
    q = RNG.dirichlet([1] * 3, 12).astype(np.float32)
    return {
        "sparse": (LABELS, LABELS),
        "sparse (N, 1)": (LABELS[:, None], LABELS),
        "sparse as floats": (LABELS.astype(np.float32), LABELS),
        "uint8": (LABELS.astype(np.uint8), LABELS),
        "one-hot": (np.eye(3, dtype=np.float32)[LABELS], LABELS),
        "one-hot integers": (np.eye(3, dtype=np.int32)[LABELS], LABELS),
        "soft": (q, q),
    }


@pytest.mark.parametrize("form", label_forms())
@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
def test_label_forms_and_the_mean(losses, name, form):
    """The mean over the batch is that of the other frameworks."""
    labels, expected = label_forms()[form]
    options = {"class_weight": "balanced", "label_smoothing": 0.05}
    value = getattr(losses, name)(COUNTS, **options)(labels, LOGITS)
    expected = getattr(reference, name)(COUNTS, **options)(LOGITS, expected)
    np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1)], ids=str)
def test_pixels(losses, shape):
    z, y = LOGITS.reshape(2, 6, 3), LABELS.reshape(2, 6)
    loss = losses.LMFLoss(COUNTS, ignore_class=1)
    expected = reference.LMFLoss(COUNTS)(z, y, where=y != 1)
    np.testing.assert_allclose(numpy(loss(y.reshape(shape), z)), expected, rtol=1e-5)
    first = losses.LMFLoss(COUNTS, ignore_class=1, axis=1)
    np.testing.assert_allclose(numpy(first(y, np.moveaxis(z, -1, 1))), expected, rtol=1e-5)


def test_pixels_with_sample_weight(losses):
    z, y = LOGITS.reshape(2, 6, 3), LABELS.reshape(2, 6)
    loss = losses.LMFLoss(COUNTS, reduction="sum")
    each = reference.LMFLoss(COUNTS, reduction="none")(z, y)
    for weight in (np.array([0.5, 2.0]), np.array([[0.5], [2.0]]), RNG.uniform(0, 2, (2, 6))):
        weight = weight.astype(np.float32)
        value = loss(y, z, sample_weight=weight)
        expected = (each * (weight[:, None] if weight.ndim == 1 else weight)).sum()
        np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)


def test_ignore_class_needs_sparse_labels(losses):
    sentence = (
        "ignore_class needs sparse labels, got labels of the predictions' shape (12, 3); "
        "use sample_weight"
    )
    with refuses(ValueError, sentence):
        losses.LMFLoss(COUNTS, ignore_class=1)(np.eye(3, dtype=np.float32)[LABELS], LOGITS)


@pytest.mark.parametrize("value", [255.0, True], ids=repr)
def test_ignore_class_is_a_whole_number(losses, value):
    sentence = f"ignore_class must be a whole number, got {value!r}; pass None to ignore no label"
    with refuses(TypeError, sentence):
        losses.LMFLoss(COUNTS, ignore_class=value)


def test_a_fraction_is_no_label(keras, losses):
    """Nor one that is ignored, where it is a tensor and can only be given another number."""
    sentence = "sparse labels must be whole numbers, got 0.5; "
    sentence += "distributions must have the predictions' shape"
    labels = np.where(np.arange(len(LABELS)) == 0, 0.5, LABELS).astype(np.float32)
    with refuses(ValueError, sentence):
        losses.LMFLoss(COUNTS)(labels, LOGITS)
    for ignore_class in (None, -1):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
            losses.LMFLoss(COUNTS, ignore_class=ignore_class)(
                keras.ops.convert_to_tensor(labels), LOGITS
            )


# Keras on JAX has no float64 unless JAX_ENABLE_X64 is set
DTYPES = ["float32", "float64"][: 1 + (KERAS_BACKEND != "jax")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "reduction", ["mean", "batch_mean", "sum", "mean_with_sample_weight", "none"]
)
def test_the_loss_has_its_dtype(keras, losses, reduction, dtype):
    """Whichever operations of Keras reduce it: some make float32 of float64."""
    for inputs in (slice(None), slice(0)):
        loss = losses.LMFLoss(COUNTS, reduction=reduction, dtype=dtype)
        value = loss(LABELS[inputs], LOGITS[inputs], np.ones(len(LABELS[inputs])))
        assert keras.backend.standardize_dtype(value.dtype) == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_give_the_numbers_of_their_logits(keras, losses, dtype):
    p = np.exp(LOGITS.astype(np.float64))
    p = (p / p.sum(1, keepdims=True)).astype(dtype)
    loss = losses.LMFLoss(COUNTS, from_logits=False, scale=5.0, dtype=dtype)
    expected = reference.LMFLoss(COUNTS, scale=5.0)(np.log(p.astype(np.float64)), LABELS)
    rtol = {"float32": 1e-5, "float64": 1e-12}[dtype]
    value = loss(LABELS, keras.ops.convert_to_tensor(p, dtype=dtype))
    np.testing.assert_allclose(numpy(value), expected, rtol=rtol)


def test_a_model_that_ends_in_a_softmax(keras, losses):
    """Trains as the one that ends in logits, step for step."""
    paths = []
    for from_logits in (True, False):
        model = linear_model(keras, None)
        if not from_logits:
            model.add(keras.layers.Softmax())
        loss = losses.LMFLoss(COUNTS, from_logits=from_logits, scale=5.0)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
        history = model.fit(INPUTS, LABELS, batch_size=12, epochs=5, shuffle=False, verbose=0)
        paths.append(history.history["loss"])
    assert paths[0][-1] < paths[0][0]
    np.testing.assert_allclose(paths[1], paths[0], rtol=1e-4)


def test_a_probability_of_0_is_an_impossible_class(losses):
    p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], np.float32)
    value = losses.LMFLoss(COUNTS, from_logits=False, reduction="none")([0, 0], p)
    with np.errstate(divide="ignore"):
        expected = reference.LMFLoss(COUNTS, reduction="none")(np.log(p), [0, 0])
    np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)


# --- shapes that TensorFlow does not know while it traces

only_tensorflow = pytest.mark.skipif(
    KERAS_BACKEND != "tensorflow", reason="runs with Keras on tensorflow"
)


def traced(loss, arrays, jit, rank=True):
    """Value and gradient of a graph, traced for the arrays' dtypes and no more than their ranks."""
    tf = load("tensorflow")
    arrays = [tf.constant(array) for array in arrays]
    shapes = [[None] * len(array.shape) if rank else None for array in arrays]

    @tf.function(
        input_signature=[tf.TensorSpec(s, a.dtype) for s, a in zip(shapes, arrays, strict=True)],
        jit_compile=jit,
        autograph=False,
    )
    def step(z, y, *sample_weight):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(y, z, *sample_weight)
        return value, tape.gradient(value, z)

    return [result.numpy() for result in step(*arrays)]


def untraced(loss, z, y, *sample_weight):
    tf = load("tensorflow")
    z = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(y, z, *sample_weight)
    return [value.numpy(), tape.gradient(value, z).numpy()]


def cases_of_unknown_shape():
    pixels, maps = LOGITS.reshape(2, 3, 2, 3), LABELS.reshape(2, 3, 2)
    first = np.ascontiguousarray(np.moveaxis(pixels, -1, 1))
    one_hot = np.eye(3)[LABELS]
    column, square = LABELS[:, None], LABELS[:3, None]
    t, one_label = np.eye(3, dtype=int)[LABELS], {"positive_counts": 1, "negative_counts": 625}
    return {
        "sparse": ("LMFLoss", {}, LOGITS, LABELS),
        "(N, 1)": ("LMFLoss", {}, LOGITS, column),
        "(N, 1), N = C": ("LMFLoss", {}, LOGITS[:3], square),
        "(1, 1)": ("LMFLoss", {}, LOGITS[:1], column[1:2]),
        "(N, 1) of floats": ("LMFLoss", {}, LOGITS, column.astype("float32")),
        "(N, 1) without weights": ("FocalLoss", {"class_counts": None}, LOGITS, column),
        "(N, 1) smoothed": ("LMFLoss", {"label_smoothing": 0.1}, LOGITS, column),
        "(N, 1) with ignore_class": ("LMFLoss", {"ignore_class": 1}, LOGITS, column),
        "adjusted": ("LMFLoss", {"logit_adjustment": 1.0}, LOGITS, LABELS),
        "(N, 1) without weights, adjusted": (
            "FocalLoss",
            {"logit_adjustment": 1.0},
            LOGITS,
            column,
        ),
        "one-hot": ("LMFLoss", {}, LOGITS, one_hot.astype("float32")),
        "one-hot integers": ("LMFLoss", {}, LOGITS, one_hot.astype(int)),
        "soft": ("LDAMLoss", {}, LOGITS, (0.8 * one_hot + 0.1).astype("float32")),
        "pixels": ("LMFLoss", {}, pixels, maps),
        "pixels (N, H, W, 1)": ("LMFLoss", {}, pixels, maps[..., None]),
        "channels first": ("LMFLoss", {"axis": 1}, first, maps),
        "channels first (N, 1, H, W)": ("LMFLoss", {"axis": 1}, first, maps[:, None]),
        "weights": ("LMFLoss", {}, LOGITS, LABELS, np.linspace(0, 2, 12, dtype="float32")),
        "weights (N, 1)": ("LMFLoss", {}, LOGITS, LABELS, np.linspace(0, 2, 12)[:, None]),
        "weights of images": ("LMFLoss", {}, pixels, maps, np.array([0.5, 2], "float32")),
        "weights of pixels": ("LMFLoss", {}, pixels, maps, np.linspace(0, 2, 12).reshape(2, 3, 2)),
        "sigmoid": ("SigmoidLMFLoss", {}, LOGITS, t),
        "sigmoid, adjusted": ("SigmoidLMFLoss", {"logit_adjustment": 1.0}, LOGITS, t),
        "sigmoid, (N,) and (N, 1)": ("SigmoidLMFLoss", one_label, LOGITS[:, :1], t[:, 0]),
        "sigmoid, (N, 1) and (N,)": ("SigmoidLMFLoss", one_label, LOGITS[:, 0], t[:, :1]),
        "sigmoid, weights": ("SigmoidLMFLoss", {}, LOGITS, t, np.linspace(0, 2, 12)),
    }


@only_tensorflow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("form", cases_of_unknown_shape())
def test_shapes_that_tracing_does_not_know(losses, form, jit):
    """What has another form by its shape has the eager value and gradient."""
    name, options, *arrays = cases_of_unknown_shape()[form]
    counts = {"class_counts": COUNTS}
    if name == "SigmoidLMFLoss":
        counts = {"positive_counts": COUNTS, "negative_counts": COUNTS[::-1]}
    loss = getattr(losses, name)(**(counts | options))
    for value, expected in zip(traced(loss, arrays, jit), untraced(loss, *arrays), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@only_tensorflow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_labels_out_of_range_whose_shape_tracing_does_not_know(losses, jit):
    loss = losses.LMFLoss(COUNTS, reduction="none")
    value, grad = traced(loss, [LOGITS[:3], np.array([[0], [3], [1]])], jit)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(np.isnan(grad).all(1), [False, True, False])


@only_tensorflow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_shapes_that_disagree_when_the_graph_runs(losses, jit):
    """Of as many elements, or of sizes that broadcasting would take; margins of another size."""
    error = load("tensorflow").errors.InvalidArgumentError
    said = "labels_must_have_shape" if jit else r"labels must have shape\] \[2 6\] \[got\] \[6 2\]"
    loss, pixels = losses.LMFLoss(COUNTS), LOGITS.reshape(2, 6, 3)
    with pytest.raises(error, match=said):
        traced(loss, [pixels, LABELS.reshape(6, 2)], jit)
    soft = np.eye(3, dtype="float32")[LABELS]
    with pytest.raises(error, match=r"labels.must.have.shape"):
        traced(loss, [LOGITS, soft[:1]], jit)
    label = losses.SigmoidLMFLoss(3, 9)
    with pytest.raises(error, match=r"labels.must.have.shape"):
        traced(label, [LOGITS, np.eye(3, dtype=int)[LABELS][:, :1]], jit)
    with pytest.raises(error, match="is not compatible with expected shape"):
        traced(loss, [LOGITS[:, :2], LABELS % 2], jit)
    labels = losses.SigmoidLMFLoss(COUNTS, COUNTS)
    with pytest.raises(error, match="is not compatible with expected shape"):
        traced(labels, [LOGITS[:, :1], LABELS[:, None] % 2], jit)


@only_tensorflow
def test_an_unknown_number_of_axes_is_refused(losses):
    sentence = (
        "predictions must have a known number of axes while a graph is traced, "
        "got shape <unknown>; give it one with tf.ensure_shape"
    )
    with refuses(ValueError, sentence):
        traced(losses.LMFLoss(COUNTS), [LOGITS, LABELS], jit=False, rank=False)


# --- short rows, which TensorFlow's XLA gets in another form than long ones


@pytest.mark.parametrize("num_classes", [8, 9])
@pytest.mark.parametrize("mode", Keras.modes)
def test_short_and_long_rows(mode, num_classes):
    rng = np.random.default_rng(num_classes)
    z = rounded(rng.normal(-2, 5, (64, num_classes)) * rng.choice([1, 100], (64, 1)), "float32")
    y, upstream = rng.integers(0, num_classes, 64), np.linspace(0.5, 2, 64)
    case = Case(z, y, tuple(range(num_classes, 0, -1)), upstream=upstream, scale=5.0)
    case.check(Keras(mode)(case))


@pytest.mark.parametrize("num_classes", [3, 9])
@pytest.mark.parametrize("mode", Keras.modes)
def test_nan_of_either_sign(mode, num_classes):
    z = np.zeros((4, num_classes))
    z[0, 1], z[2, 1] = np.nan, np.copysign(np.nan, -1)
    case = Case(z, np.zeros(4, int), tuple(range(num_classes, 0, -1)))
    value, grad, *_ = Keras(mode)(case)
    np.testing.assert_array_equal(np.isnan(value), [True, False, True, False])
    np.testing.assert_array_equal(np.isnan(grad).all(1), [True, False, True, False])
    np.testing.assert_array_equal(np.isnan(grad).any(1), [True, False, True, False])


@pytest.mark.parametrize("mode", Keras.traced_modes)
def test_labels_that_32_bits_would_wrap(mode):
    """In a compiled step a label outside the classes is NaN, also with the last bits of a class."""
    wide = KERAS_BACKEND != "jax"  # which has 32 bits only
    y = np.array([0, 2**32 if wide else 2**31 - 1, 1])
    case = Case(np.zeros((3, 3)), y, (3, 2, 1), label_dtype="int64" if wide else "int32")
    value = Keras(mode)(case).value
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])


def forms_of_each_loss():
    one_hot, p = np.eye(3, dtype="float32")[LABELS], np.exp(LOGITS)
    p = (p / p.sum(1, keepdims=True)).astype("float32")
    return {
        "integer": ("LMFLoss", {}, 1000 * LOGITS, LABELS),
        "masked": ("LMFLoss", {"ignore_class": 1}, LOGITS, LABELS),
        "cross-entropy": ("FocalLoss", {"class_counts": None, "gamma": 0.0}, LOGITS, LABELS),
        "many classes": ("FocalLoss", {"class_counts": None}, LOGITS.reshape(1, 36), LABELS[:1]),
        "smoothed": ("LDAMLoss", {"label_smoothing": 0.1}, LOGITS, LABELS),
        "adjusted": ("LMFLoss", {"logit_adjustment": 1.0}, 1000 * LOGITS, LABELS),
        "adjusted, one-hot": ("LMFLoss", {"logit_adjustment": 1.0}, 1000 * LOGITS, one_hot),
        "one-hot": ("LMFLoss", {}, 1000 * LOGITS, one_hot),
        "axis 0": ("LMFLoss", {"axis": 0}, LOGITS.T.copy(), LABELS),
        "probabilities": ("LMFLoss", {"from_logits": False}, p, LABELS),
        "sigmoid": ("SigmoidLMFLoss", {}, 1000 * LOGITS, one_hot.astype(int)),
        "sigmoid, soft": ("SigmoidLMFLoss", {}, LOGITS, one_hot / 2),
        "sigmoid, adjusted": ("SigmoidLMFLoss", {"logit_adjustment": 1.0}, LOGITS, one_hot / 2),
        "sigmoid, masked": ("SigmoidLMFLoss", {"ignore_class": 0}, LOGITS, one_hot.astype(int)),
        "sigmoid, probabilities": ("SigmoidLMFLoss", {"from_logits": False}, p, one_hot),
    }


@only_tensorflow
@pytest.mark.parametrize("form", forms_of_each_loss())
def test_no_alarm_on_finite_input(losses, form):
    """``tf.debugging.enable_check_numerics`` looks at what every operation gives; XLA has none."""
    name, options, z, y = forms_of_each_loss()[form]
    by_label = {"positive_counts": COUNTS, "negative_counts": COUNTS[::-1]}
    counts = by_label if name == "SigmoidLMFLoss" else {"class_counts": COUNTS}
    loss, debugging = getattr(losses, name)(**(counts | options)), load("tensorflow").debugging
    expected = untraced(loss, z, y)
    debugging.enable_check_numerics()
    try:
        for found in (untraced(loss, z, y), traced(loss, [z, y], jit=False)):
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-7)
    finally:
        debugging.disable_check_numerics()


# --- masks and reductions of Keras' own


def test_a_mask_that_layers_pass_on(keras, losses):
    z, y = LOGITS.reshape(2, 6, 3), LABELS.reshape(2, 6)
    mask = np.arange(12).reshape(2, 6) % 3 != 1
    predictions = keras.ops.convert_to_tensor(z)
    predictions._keras_mask = keras.ops.convert_to_tensor(mask)
    expected = reference.LMFLoss(COUNTS)(z, y, where=mask)
    np.testing.assert_allclose(numpy(losses.LMFLoss(COUNTS)(y, predictions)), expected, rtol=1e-5)


@pytest.mark.parametrize("eagerly", [False, True], ids=["compiled", "run_eagerly"])
@pytest.mark.parametrize("name", ["LMFLoss", "SigmoidLMFLoss"])
def test_masks_in_fit_and_evaluate(keras, losses, name, eagerly):
    """Numbers and training are those of ``ignore_class``, whose numbers are the reference's."""
    rng, counts = np.random.default_rng(0), [COUNTS]
    tokens, y = rng.integers(1, 5, (8, 6)), rng.integers(0, 3, (8, 6))
    tokens[:, 4:] = tokens[0, 1:] = 0
    if name == "SigmoidLMFLoss":
        counts, y = [COUNTS, COUNTS[::-1]], rng.integers(0, 2, (8, 6, 3))
    ignored = np.where((tokens == 0).reshape(8, 6, *[1] * (y.ndim - 2)), -1, y)
    paths = []
    for mask_zero, labels in ((True, y), (False, ignored)):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Embedding(5, 4, mask_zero=mask_zero), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((6,)), *layers])
        loss = getattr(losses, name)(*counts, ignore_class=None if mask_zero else -1)
        model.compile("sgd", loss=loss, run_eagerly=eagerly)
        options = {"batch_size": 8, "verbose": 0}
        history = model.fit(tokens, labels, epochs=3, shuffle=False, **options).history["loss"]
        paths.append([*history, model.evaluate(tokens, labels, **options)])
        paths.append(model.get_weights()[-2])
    assert paths[0][0] != paths[0][-1]
    np.testing.assert_allclose(paths[0], paths[2], rtol=1e-5)
    np.testing.assert_allclose(paths[1], paths[3], rtol=1e-5)
    if name == "LMFLoss":
        expected = reference.LMFLoss(COUNTS)(numpy(model(tokens)), y, where=tokens != 0)
        np.testing.assert_allclose(paths[0][-1], expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "batch_mean", "sum", "none"])
def test_call_gives_each_examples_loss(losses, reduction):
    """Whatever the reduction, as ``keras.losses.Loss`` has it."""
    each = reference.LMFLoss(COUNTS, reduction="none")(LOGITS, LABELS, where=LABELS != 1)
    value = losses.LMFLoss(COUNTS, reduction=reduction, ignore_class=1).call(LABELS, LOGITS)
    np.testing.assert_allclose(numpy(value), each, rtol=1e-5)


@pytest.mark.parametrize("ignore_class", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_subclass_that_overrides_call(keras, losses, weighted, masked, ignore_class):
    """Its losses are reduced as Keras reduces; masks and ``ignore_class`` count as ever."""

    class Twice(losses.LMFLoss):
        def call(self, y_true, y_pred):
            return 2 * super().call(y_true, y_pred)

    predictions, valid = keras.ops.convert_to_tensor(LOGITS), np.ones(12, bool)
    if masked:
        valid = np.arange(12) % 5 != 2
        predictions._keras_mask = keras.ops.convert_to_tensor(valid)
    valid = valid & (ignore_class != LABELS)
    each = 2 * reference.LMFLoss(COUNTS, reduction="none")(LOGITS, LABELS, where=valid)
    weight = RNG.uniform(0, 2, 12).astype(np.float32) if weighted else None
    each, total = (each * weight, (valid * weight).sum()) if weighted else (each, valid.sum())
    expected = {
        "sum_over_batch_size": each.sum() / valid.sum(),
        "batch_mean": each.sum() / valid.sum(),
        "mean_with_sample_weight": each.sum() / total,
        "sum": each.sum(),
        "none": each,
    }
    for reduction, number in expected.items():
        loss = Twice(COUNTS, reduction=reduction, ignore_class=ignore_class)
        value = loss(LABELS, predictions, sample_weight=weight)
        np.testing.assert_allclose(numpy(value), number, rtol=1e-5, err_msg=reduction)


def test_what_a_subclass_makes_of_its_losses(keras, losses):
    """Tensors come in; one value for a whole example, a mask and one number may go out."""
    y, z = LABELS.reshape(2, 6), LOGITS.reshape(2, 6, 3)
    each = reference.LMFLoss(COUNTS, reduction="none")(z, y)

    class PerRow(losses.LMFLoss):
        def call(self, y_true, y_pred):
            assert keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred)
            return keras.ops.sum(super().call(y_true, y_pred), -1)

    np.testing.assert_allclose(numpy(PerRow(COUNTS)(y, z)), each.sum(1).mean(), rtol=1e-5)
    predictions = keras.ops.convert_to_tensor(z)
    predictions._keras_mask = keras.ops.convert_to_tensor(np.arange(12).reshape(2, 6) >= 6)
    value = PerRow(COUNTS)(y, predictions)
    np.testing.assert_allclose(numpy(value), each[1].sum(), rtol=1e-5)

    class Largest(losses.LMFLoss):
        def call(self, y_true, y_pred):
            return keras.ops.max(super().call(y_true, y_pred))

    np.testing.assert_allclose(numpy(Largest(COUNTS)(y, z)), each.max(), rtol=1e-5)


def test_a_sample_weight_for_each_class_is_refused(losses):
    sentence = "sample_weight must have one value for each loss, of shape (12,), got shape (12, 3)"
    with refuses(ValueError, sentence):
        losses.LMFLoss(COUNTS)(LABELS, LOGITS, sample_weight=np.ones((12, 3), np.float32))


def test_mean_with_sample_weight(losses):
    each = reference.LMFLoss(COUNTS, reduction="none")(LOGITS, LABELS)
    weight = RNG.uniform(0, 2, 12).astype(np.float32)
    loss = losses.LMFLoss(COUNTS, reduction="mean_with_sample_weight")
    value = loss(LABELS, LOGITS, sample_weight=weight)
    np.testing.assert_allclose(numpy(value), (each * weight).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(numpy(loss(LABELS, LOGITS)), each.mean(), rtol=1e-5)


def test_reduction_names(losses):
    for mine, theirs in [("mean", "mean"), ("sum_over_batch_size", "mean"), (None, "none")]:
        value = losses.LMFLoss(COUNTS, reduction=mine)(LABELS, LOGITS)
        expected = reference.LMFLoss(COUNTS, reduction=theirs)(LOGITS, LABELS)
        np.testing.assert_allclose(numpy(value), expected, rtol=1e-5)


def test_gradient_accumulation(keras, losses):
    """Keras averages the parts: with batch_mean and parts of one size that is the whole batch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (16, 5)).astype("float32"), np.repeat([0, 0, 1, 2], 4)

    def kernel_after(batch_size, steps):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
        model.compile(optimizer, loss=losses.LMFLoss(COUNTS, reduction="batch_mean"))
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        return model.get_weights()[0]

    np.testing.assert_allclose(kernel_after(4, 4), kernel_after(16, None), rtol=1e-4, atol=1e-6)
