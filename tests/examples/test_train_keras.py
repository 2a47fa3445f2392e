"""The Keras trainer's own parts: optimiser, metrics, dropout after a resume, devices, the model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import f1_score

from examples.training.run import Run
from lmf_multi import class_margins, deferred_weights, reference
from tests.examples.test_trainers import NEEDS, ROOT, SHARED, assert_same_run, history
from tests.frameworks import KERAS_BACKEND, load

EPOCHS = ["--epochs", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def keras():
    for package in (*SHARED, *NEEDS["keras"]):
        load(package)
    return load("keras")


@pytest.fixture
def trainer(keras):
    """The module; what a run sets for the whole process is set back."""
    policy = keras.config.dtype_policy()
    yield load("examples.train_keras")
    keras.config.set_dtype_policy(policy)


# --- optimiser and metrics


def test_keras_adam_is_pytorchs(trainer, keras):
    """Weights, a bias and a learning rate that falls: six steps as torch.optim.Adam takes them."""
    torch, rng = load("torch"), np.random.default_rng(0)
    starts = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (3,))]
    ours = [keras.Variable(start) for start in starts]
    theirs = [torch.nn.Parameter(torch.tensor(start)) for start in starts]
    optimizer = load("examples.training.recipe_keras").Adam(0.1, l2=0.3)
    expected = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.3)
    for step in range(6):
        optimizer.learning_rate = expected.param_groups[0]["lr"] = 0.1 * 0.5**step
        gradients = [rng.normal(size=start.shape).astype(np.float32) for start in starts]
        optimizer.apply(list(map(keras.ops.convert_to_tensor, gradients)), ours)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        expected.step()
    for variable, parameter in zip(ours, theirs, strict=True):
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_keras_adam_survives_its_config(trainer, keras):
    config = keras.optimizers.serialize(load("examples.training.recipe_keras").Adam(0.1, l2=0.3))
    again = keras.optimizers.deserialize(config)
    assert isinstance(again, load("examples.training.recipe_keras").Adam)
    assert (again.l2, again.epsilon, again.weight_decay) == (0.3, 1e-8, None)


def test_keras_metrics_are_the_steps_loss_and_the_epochs_f1(trainer, keras):
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 4)).astype("float32"), rng.integers(0, 3, 8)) for _ in range(4)]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    criterion = load("lmf_multi.keras").LMFLoss([9, 5, 2])
    metrics = [trainer.StepLoss(criterion), trainer.MacroF1(name="macro_f1")]
    model.compile(keras.optimizers.SGD(0.0), loss=criterion, metrics=metrics)
    kept_logs = []
    kept = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: kept_logs.append(logs))
    generator = (batch for batch in batches)
    model.fit(generator, steps_per_epoch=4, verbose=0, shuffle=False, callbacks=[kept])
    logits = [model.predict(x, verbose=0) for x, _ in batches]
    losses = [float(criterion(y, z)) for (_, y), z in zip(batches, logits, strict=True)]
    assert len(set(losses)) == 4
    np.testing.assert_allclose([logs["step_loss"] for logs in kept_logs], losses, rtol=1e-5)
    labels, answers = np.concatenate([y for _, y in batches]), np.concatenate(logits).argmax(1)
    expected = f1_score(labels, answers, average="macro", zero_division=0)
    np.testing.assert_allclose(kept_logs[-1]["macro_f1"], expected, rtol=1e-5)


# --- dropout, class weights and rates


def with_dropout(arch, num_classes, image_size, **options):
    """A network in which two layers draw in different ways, as EfficientNet's do."""
    keras = load("keras")
    layers = keras.Sequential(
        [
            keras.Input((image_size, image_size, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Dropout(0.2, noise_shape=(None, 1, 1, 1)),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(num_classes),
        ]
    )
    return keras.Model(layers.inputs, layers.outputs[0])


def test_keras_goes_on_after_a_stop_as_it_would_have(trainer, monkeypatch, tmp_path):
    """With dropout, weights from the second epoch and a rate that falls before it."""
    monkeypatch.setattr(trainer.models, "build", with_dropout)
    scored, end_epoch = [], Run.end_epoch

    def keeping_epoch(self, val_logits, val_loss):
        scored.append((self.epoch, val_logits, val_loss))
        end_epoch(self, val_logits, val_loss)

    monkeypatch.setattr(Run, "end_epoch", keeping_epoch)
    flags = [*EPOCHS, "--drw", "1", "--decay-epochs", "1"]
    assert trainer.main([*flags, "--out", str(tmp_path / "whole")]) == 0

    data = load("examples.data.datasets").load("digits")
    counts = data.class_counts
    for epoch, logits, loss in scored:
        weight = deferred_weights(counts, epoch, 1)
        margins = class_margins(counts, 0.5)
        expected = reference.lmf_loss(logits.astype(float), data.val.labels, margins, weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert [epoch for epoch, *_ in scored] == [0, 1]
    for epoch, rate in [(1, 1e-3), (2, 1e-4)]:  # the first variables are Adam's own
        file = tmp_path / "whole" / "checkpoints" / f"{epoch:05d}-0000000" / "training.npz"
        with np.load(file) as saved:
            assert saved["arr_0"] == 8 * epoch
            np.testing.assert_allclose(saved["arr_1"], rate, rtol=1e-6)

    took_step = Run.took_step

    def stopping_step(self, *arguments):
        self._asked_to_stop = (self.epoch, self.step) == (1, 3)
        took_step(self, *arguments)

    out = tmp_path / "stopped"
    with monkeypatch.context() as stopping:
        stopping.setattr(Run, "took_step", stopping_step)
        assert trainer.main([*flags, "--out", str(out)]) == 130
    assert max((out / "checkpoints").iterdir()).name == "00001-0000004"
    assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
    assert_same_run(out, tmp_path / "whole")


# --- the model

LOADED = """
import sys
import keras, lmf_multi.keras, numpy as np
model = keras.models.load_model(sys.argv[1])
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(images, batch_size=32, verbose=0))
assert "examples" not in sys.modules
"""


def test_keras_opens_the_best_model_without_the_trainer(trainer, tmp_path):
    out = tmp_path / "run"
    assert trainer.main([*EPOCHS, "--head", "cosine", "--out", str(out)]) == 0
    best = json.loads((out / "result.json").read_text())["best_validation"]["epoch"]
    test = load("examples.data.datasets").load("digits").test
    (images, _), *_ = test.batches(np.arange(len(test)), len(test))
    np.save(tmp_path / "images.npy", images)
    model = out / "checkpoints" / f"{best:05d}-0000000" / "model.keras"
    command = [
        sys.executable,
        "-c",
        LOADED,
        model,
        tmp_path / "images.npy",
        tmp_path / "logits.npy",
    ]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = np.load(out / "predictions.npz")["logits"]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), kept, rtol=1e-4, atol=1e-5)


def test_keras_computes_in_bfloat16_and_keeps_float32(trainer, keras, tmp_path):
    out = tmp_path / "run"
    assert trainer.main([*EPOCHS, "--bf16", "--out", str(out)]) == 0
    model = keras.models.load_model(out / "checkpoints" / "00002-0000000" / "model.keras")
    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert {layer.compute_dtype for layer in convolutions} == {"bfloat16"}
    assert {variable.dtype for variable in model.variables} == {"float32"}
    assert model.layers[-1].compute_dtype == "float32"
    first, second = (float(row["train_loss"]) for row in history(out))
    assert second < first


# --- several devices

MIRRORED = """
import sys
from examples.training import keras_devices
from examples import train_keras
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
keras_devices.tensorflow_strategy = lambda: strategy
sys.exit(train_keras.main(sys.argv[1:]))
"""
FORCED = "import sys; from examples import train_keras; sys.exit(train_keras.main(sys.argv[1:]))"


def test_keras_trains_on_several_devices_as_on_one(keras, tmp_path):
    """The weighted mean and batch norm's moments are the whole batch's, and no image is lost."""
    if KERAS_BACKEND == "torch":
        pytest.skip("Keras on PyTorch trains on one device")
    several = {"tensorflow": MIRRORED, "jax": FORCED}[KERAS_BACKEND]
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    for name, code, variables in [("one", FORCED, {}), ("several", several, forced)]:
        command = [sys.executable, "-c", code, "--epochs", "2", "--loss", "bwcce"]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=env,
        )
        assert done.returncode == 0, done.stderr
    for row, expected in zip(history(tmp_path / "several"), history(tmp_path / "one"), strict=True):
        for name in ("train_loss", "val_loss"):
            np.testing.assert_allclose(float(row[name]), float(expected[name]), rtol=1e-3)


def test_keras_refuses_a_batch_that_devices_cannot_share(keras, tmp_path):
    if KERAS_BACKEND != "jax":
        pytest.skip("devices can be forced with Keras on JAX")
    command = [sys.executable, "-m", "examples.train_keras", "--batch-size", "30"]
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | forced,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == ("error: batch_size must be a multiple of the 4 devices, got 30")
