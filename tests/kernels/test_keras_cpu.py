"""The CPU kernel as TensorFlow's XLA calls it, beside the suite of every backend."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmf_multi import _kernel, reference
from tests.adapters import Keras as KerasAdapter
from tests.cases import masked_case
from tests.engines import without_kernel
from tests.frameworks import KERAS_BACKEND, load, need_kernel

if KERAS_BACKEND != "tensorflow":
    pytest.skip("runs with Keras on tensorflow", allow_module_level=True)

RNG = np.random.default_rng(0)
COUNTS = (625, 16, 1)
CPU = "lmf_multi.keras._tensorflow._cpu"


@pytest.fixture(scope="module")
def losses():
    return load("lmf_multi.keras")


@pytest.fixture(autouse=True)
def cpu(losses):
    """The module, or a skip where the kernel was not compiled or TensorFlow cannot call it."""
    cpu = load(CPU)
    need_kernel(cpu.has_kernel(), "keras")
    return cpu


def batch(tf, *shape, dtype="float32"):
    """Logits and labels."""
    z, y = RNG.normal(0, 3, shape), RNG.integers(0, shape[-1], shape[:-1])
    return tf.cast(z, dtype), tf.constant(y, tf.int32)


def value_and_grad(tf, loss):
    def run(z, y):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(y, z)
        return value, tape.gradient(value, z)

    return run


def step(tf, loss, jit=True, **options):
    """Value and gradient, compiled by XLA."""
    return tf.function(value_and_grad(tf, loss), jit_compile=jit, **options)


def calls(function, *arguments):
    """How often the graph calls a module of XLA."""
    graph = function.get_concrete_function(*arguments).graph
    return sum(operation.type == "XlaCallModule" for operation in graph.get_operations())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5000, 7), -1),
        ((45, 1000), -1),
        ((2, 90, 100, 5), -1),
        ((2, 90, 100, 5), 1),
        ((19, 4, 65), 0),
        ((40,), 0),
    ],
)
def test_sizes(shape, axis, dtype):
    """Tiles, vectors and threads that are busy and not; a fifth of the examples masked."""
    case = masked_case(RNG, shape, dtype=dtype, axis=axis)
    case.check(KerasAdapter("xla")(case))


def test_graphs_that_xla_compiles_call_it(tf, losses):
    z, y = batch(tf, 6, 3)
    loss = losses.LMFLoss(COUNTS)
    assert calls(step(tf, loss), z, y) == 1
    assert calls(step(tf, losses.LMFLoss(COUNTS, logit_adjustment=1.0)), z, y) == 1
    assert calls(step(tf, loss, jit=False), z, y) == 0
    in_double = losses.LMFLoss(COUNTS, dtype="float64")
    assert calls(step(tf, in_double), tf.cast(z, tf.float64), y) == 0
    with without_kernel():
        assert calls(step(tf, loss), z, y) == 0
    inner = step(tf, loss, jit=None)
    outer = tf.function(lambda z, y: inner(z, y), jit_compile=True)
    for value, expected in zip(outer(z, y), step(tf, loss)(z, y), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(300, 14), (2, 14, 30, 5), (2, 1, 40, 40), (77,)], ids=str)
def test_the_sigmoid_form_calls_it(tf, losses, shape, tau):
    """With labels between 0 and 1 too, and masked ones; as operations have it."""
    L = shape[1] if len(shape) > 1 else 1
    counts = (RNG.integers(1, 90, L), RNG.integers(90, 900, L)) if L > 1 else (10, 90)
    options = {"axis": min(1, len(shape) - 1), "ignore_class": -1, "reduction": "none"}
    options["logit_adjustment"] = tau
    loss = losses.SigmoidLMFLoss(*counts, **options)
    x, t = tf.constant(RNG.normal(0, 3, shape), tf.float32), RNG.integers(-1, 2, shape)
    for labels in (tf.constant(t, tf.int32), tf.constant(RNG.random(shape), tf.float32)):
        run = step(tf, loss)
        assert calls(run, x, labels) == 1
        with without_kernel():
            expected = step(tf, loss)(x, labels)
        for one, other in zip(run(x, labels), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectors", [(2,), (4, 2)], ids=str)
@pytest.mark.parametrize("added", [(), (4,)], ids=str)
def test_an_adjustment_by_label_of_vectors_that_are_not(tf, losses, added, vectors):
    """And the other way round; the kernel takes all of them by label."""
    x, t = tf.constant(RNG.normal(0, 3, (9, 4)), tf.float32), tf.constant(np.eye(9, 4), tf.int32)
    margins, w = RNG.random((2, *vectors)).astype("float32") + 0.1
    added = np.asarray(RNG.normal(0, 2, added), np.float32)

    def loss(t, x):
        return losses.sigmoid_lmf_loss(x, t, margins, w, logit_adjustment=added)

    run = step(tf, loss)
    assert calls(run, x, t) == 1
    options = {"logit_adjustment": added, "reduction": "none"}
    expected = reference.sigmoid_lmf_loss_and_grad(x.numpy(), t.numpy(), margins, w, **options)
    for one, other in zip(run(x, t), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_sizes_that_tracing_does_not_know(tf, losses, tau):
    """One trace; a number of classes that is unknown is left to the operations."""
    z, y = batch(tf, 6, 5, 4, 3)
    loss = losses.LMFLoss(COUNTS, logit_adjustment=tau)
    of_any = [tf.TensorSpec((None, 5, None, 3)), tf.TensorSpec((None, 5, None), tf.int32)]
    run, exact = step(tf, loss, input_signature=of_any), step(tf, loss)
    assert calls(run) == 1
    for rows, columns in ((6, 4), (2, 4), (6, 1), (1, 2)):
        some = z[:rows, :, :columns], y[:rows, :, :columns]
        for value, expected in zip(run(*some), exact(*some), strict=True):
            np.testing.assert_array_equal(value, expected)
    value, grad = run(z[:0], y[:0])
    assert value == 0 and grad.shape == (0, 5, 4, 3)
    classes = [tf.TensorSpec((6, None)), tf.TensorSpec((6,), tf.int32)]
    assert calls(step(tf, loss, input_signature=classes)) == 1  # the margins tell their number
    assert calls(step(tf, losses.FocalLoss(), input_signature=classes)) == 0


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
@pytest.mark.parametrize("weight", [None, (0.5, 1.0, 3.0)])
def test_terms_and_vectors(tf, losses, name, weight, tau):
    """Each is there and not."""
    z, y = batch(tf, 60, 3)
    counts = () if name == "FocalLoss" and not tau else (COUNTS,)
    options = {"class_weight": weight, "logit_adjustment": tau}
    value, _ = step(tf, getattr(losses, name)(*counts, **options))(z, y)
    expected = getattr(reference, name)(*counts, **options)(z.numpy(), y.numpy())
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_labels_out_of_range_give_nan(tf, losses):
    for bad in (-3, -2, -1, 3, 2**31 - 1):
        z, y = batch(tf, 40, 3)
        y = tf.tensor_scatter_nd_update(y, [[5], [9]], [bad, -100])
        loss = losses.LMFLoss(COUNTS, reduction="none", ignore_class=-100)
        value, grad = step(tf, loss)(z, y)
        spoilt = np.arange(40) == 5
        np.testing.assert_array_equal(np.isnan(value), spoilt)
        np.testing.assert_array_equal(np.isnan(grad).all(1), spoilt)
        assert value[9] == 0 and not grad[9].numpy().any()


def test_second_derivatives(tf, losses):
    z, y = batch(tf, 12, 3)
    loss = losses.LMFLoss(COUNTS, scale=2.0, logit_adjustment=0.5)
    direction = tf.constant(RNG.normal(0, 1, (12, 3)))

    def product(z, y):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value, grad = value_and_grad(tf, loss)(z, y)
            both = tf.reduce_sum(grad * tf.cast(direction, z.dtype)) + value**2
        return tape.gradient(both, z)

    run = tf.function(product, jit_compile=True)
    assert calls(run, z, y)
    expected = product(z, y)
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(run(z, y) / largest, expected / largest, rtol=0, atol=1e-5)


def test_fit(tf, losses):
    """An uneven last batch among them; the loss is the one without the kernel."""
    keras, x, y = load("keras"), RNG.normal(0, 1, (70, 5)), RNG.integers(0, 3, 70)

    def history():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile("adam", loss=losses.LMFLoss(COUNTS), jit_compile=True)
        return model.fit(x, y, batch_size=32, epochs=3, verbose=0).history["loss"]

    found = history()
    with without_kernel():
        expected = history()
    assert expected[0] != expected[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


LOAD = """
import sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
z, y = tf.constant([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0]]), tf.constant([0, 1])
print(float(model.step(z, y)))
try:
    model.traced(z, y)
except tf.errors.NotFoundError as error:
    print(str(error).replace(chr(10), " "))
import lmf_multi.keras
print(float(model.traced(z, y)))
"""


def test_saved_models(tf, losses, tmp_path):
    """A step runs without this package; a trace that holds the call says what to import."""
    loss, model = losses.LMFLoss(COUNTS, logit_adjustment=1.0), tf.Module()
    z, y = tf.constant([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0]]), tf.constant([0, 1])
    model.step = tf.function(lambda z, y: loss(y, z), jit_compile=True)
    assert calls(model.step, z, y) == 1
    value, model.traced = float(model.step(z, y)), model.step.get_concrete_function(z, y)
    tf.saved_model.save(model, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(reference.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    step, error, traced = done.stdout.splitlines()[-3:]
    np.testing.assert_allclose([float(step), float(traced)], value, rtol=1e-6)
    assert "(import lmf_multi.keras before running this step)" in error


@pytest.mark.parametrize("reason", ["not compiled", "too old", "another version"])
def test_absence_is_said_once(tf, losses, cpu, monkeypatch, caplog, reason):
    z, y = batch(tf, 6, 3)
    expected = losses.LMFLoss(COUNTS)(y, z)
    if reason == "not compiled":
        monkeypatch.setattr(_kernel, "_LIBRARY", Path("absent"))
        _kernel.opened.cache_clear()
    elif reason == "too old":
        xla = load("tensorflow.compiler.tf2xla.python.xla")
        monkeypatch.setattr(xla, "call_module_maximum_supported_version", lambda: 8)
    else:
        monkeypatch.setattr(_kernel.library(), "lmf_multi_register_xla", lambda *_: 0)
    cpu._registers.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, logger="lmf_multi"):
            values = [step(tf, losses.LMFLoss(COUNTS))(z, y)[0] for _ in range(2)]
    finally:
        monkeypatch.undo()
        _kernel.opened.cache_clear()
        cpu._registers.cache_clear()
    np.testing.assert_allclose(values, 2 * [expected], rtol=1e-6)
    (record,) = (record for record in caplog.records if record.name == "lmf_multi")
    assert record.levelno == logging.DEBUG
    said = {
        "not compiled": "it was not compiled",
        "too old": "version 8",
        "another version": "refuses",
    }
    assert said[reason] in record.getMessage()
    assert cpu.has_kernel()
