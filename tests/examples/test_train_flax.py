"""The Flax trainer on several devices and hosts, its optimiser, and what it asks of a TPU."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from examples.training.settings import parse
from tests.checks import refuses
from tests.examples.test_trainers import NEEDS, ROOT, SHARED, jax_cache, run  # noqa: F401
from tests.frameworks import load

# Starts the trainer, and keeps every step's loss as it was on process 0.
LOSSES = """
import json, sys
import jax
from examples import train_flax
from examples.training.run import Run

file, *arguments = sys.argv[1:]
took_step, losses = Run.took_step, []

def keeping_step(self, loss):
    losses.append(float(loss))
    took_step(self, loss)

Run.took_step = keeping_step
status = train_flax.main(arguments)
if jax.process_index() == 0:
    json.dump(losses, open(file, "w"))
sys.exit(status)
"""
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
FLAGS = ["--data", "digits", "--epochs", "1"]


@pytest.fixture(scope="module", autouse=True)
def flax():
    for package in (*SHARED, *NEEDS["flax"]):
        load(package)


def start(out, *flags, **variables):
    """A process that trains one epoch."""
    command = [sys.executable, "-c", LOSSES, f"{out}.json", *FLAGS, "--out", str(out), *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """Wait for processes; what the first one printed."""
    printed = [process.communicate() for process in processes]
    for process, (_, stderr) in zip(processes, printed, strict=True):
        assert process.returncode == 0, stderr
    return printed[0][0]


def start_two(out, *flags):
    """Two processes on this machine, as if they were two hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(out, "--distributed", *flags, **told, JAX_PROCESS_ID=str(i)) for i in range(2)]


def losses(out):
    return json.loads(out.with_name(f"{out.name}.json").read_text())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    finish(start(out, "--epochs", "2"))
    return losses(out)


def test_eight_devices_train_as_one(one_device, tmp_path):
    finish(start(tmp_path / "run", **EIGHT))
    np.testing.assert_allclose(losses(tmp_path / "run")[:4], one_device[:4], rtol=1e-4)


def test_two_hosts_train_as_one_and_go_on(one_device, tmp_path):
    """Process 0 alone writes and shows; the order of what is predicted is the split's."""
    out = tmp_path / "run"
    printed = finish(*start_two(out))
    assert printed.count("Test macro-F1") == 1
    np.testing.assert_allclose(losses(out)[:4], one_device[:4], rtol=1e-4)
    kept = np.load(out / "predictions.npz")
    logits, labels = logits_of(out / "checkpoints" / "00001-0000000")
    np.testing.assert_array_equal(kept["labels"], labels)
    np.testing.assert_allclose(kept["logits"], logits, rtol=1e-4, atol=1e-4)
    resumed = finish(*start_two(out, "--resume", "--epochs", "2"))
    assert "Going on after epoch 1 of 2." in resumed
    # by the second epoch rounding has grown; a run that began anew would have the first loss
    np.testing.assert_allclose(losses(out)[0], one_device[8], rtol=0.02)


def logits_of(checkpoint):
    """Logits and labels of the test images, from what is on the disk, on one device."""
    nnx, checkpoints = load("flax.nnx"), load("examples.training.checkpoints_flax")
    models, data = load("examples.models.flax"), load("examples.data.datasets")
    model = models.build("small", 10, rngs=nnx.Rngs(1))
    part = nnx.State({"model": nnx.state(model)})
    nnx.update(model, checkpoints.load(checkpoint, part)["model"])
    model.eval()
    test = data.load("digits").test
    (images, labels), *_ = test.batches(np.arange(len(test)), len(test))
    return model(models.normalize(images)), labels


def test_dropout_goes_on_after_ctrl_c(tmp_path, monkeypatch):
    """A network that drops half of the pixels, stopped within an epoch: the same predictions."""
    nnx, trainer = load("flax.nnx"), load("examples.train_flax")

    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(28 * 28 * 3, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(x.reshape(len(x), -1)))

    def took_step(self, loss):
        was(self, loss)
        if self.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    def predictions(out, *statuses):
        for status in statuses:
            assert trainer.main([*FLAGS, "--out", str(tmp_path / out), "--resume"]) == status
        return (tmp_path / out / "predictions.npz").read_bytes()

    was, stop = trainer.Run.took_step, None
    monkeypatch.setattr(trainer.models, "build", lambda *_, rngs, **__: Dropping(rngs))
    monkeypatch.setattr(trainer.Run, "took_step", took_step)
    whole = predictions("whole", 0)
    checkpoint = tmp_path / "whole" / "checkpoints" / "00001-0000000"
    saved = load("examples.training.checkpoints_flax").read(checkpoint)
    assert saved["model.dropout.rngs.count.value"] == 8  # one mask a step
    stop = 3
    assert predictions("stopped", 130, 0) == whole


def test_a_checkpoint_that_orbax_wrote_is_refused(tmp_path):
    with refuses(
        FileNotFoundError,
        f"{tmp_path} must hold state.msgpack, which checkpoints of before 0.2.0 do not; "
        "train anew, with another --out",
    ):
        load("examples.training.checkpoints_flax").read(tmp_path)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    done = run("flax", *FLAGS, "--batch-size", "12", "--out", tmp_path, env=os.environ | EIGHT)
    assert done.returncode == 1
    assert done.stderr == "error: batch_size must be a multiple of the 8 devices, got 12\n"


def test_the_optimizer_is_pytorchs():
    """Adam with coupled weight decay, and the step decay, over two decays."""
    torch, jnp, optax = load("torch"), load("jax.numpy"), load("optax")
    flags = "--learning-rate 0.1 --weight-decay 0.3 --decay-epochs 2 --decay-factor 0.5"
    settings, steps = parse("flax", flags.split(), ""), 2
    optimizer = load("examples.training.recipe_flax").build_optimizer(settings, steps)
    rng = np.random.default_rng(0)
    theirs = torch.nn.Parameter(torch.tensor(rng.normal(size=5), dtype=torch.float32))
    ours = jnp.array(theirs.detach().numpy())
    adam = torch.optim.Adam([theirs], lr=settings.learning_rate, weight_decay=0.3)
    decay = torch.optim.lr_scheduler.StepLR(adam, 2, 0.5)
    state = optimizer.init(ours)
    for step in range(10):
        gradient = rng.normal(size=5).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        adam.step()
        if step % steps == steps - 1:
            decay.step()
        updates, state = optimizer.update(jnp.array(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


# --- for a TPU that is not here


def test_a_step_that_does_not_fit_is_one_sentence():
    load("libtpu")
    jax, ahead_of_time = load("jax"), load("examples.training.ahead_of_time")
    mesh = jax.sharding.Mesh(np.array(ahead_of_time.devices("v5e:2x4")), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    matrix = jax.ShapeDtypeStruct((2**17, 2**17), np.float32, sharding=sharding)  # of 64 GiB
    sentence = "the step does not fit; try a smaller --batch-size, --bf16 or more chips: "
    with pytest.raises(ValueError, match=f"^{sentence}RESOURCE_EXHAUSTED.*$"):
        ahead_of_time.compile_step(jax.jit(lambda x: x @ x), matrix)
    assert ahead_of_time.verdict("v5e:2x4", 20 * 2**30) == (
        "It does not fit: 125.0% of the chip's 16 GiB."
    )
    assert ahead_of_time.verdict("v9:2x4", 1) == (
        "The memory of a v9 chip is not known here: no verdict."
    )


def test_a_step_compiled_for_a_tpu_tells_its_memory(tmp_path):
    load("libtpu")
    flags = [
        "--image-size",
        "64",
        "--batch-size",
        "64",
        "--aot",
        "v5e:2x4",
        "--out",
        tmp_path / "x",
    ]
    done = run("flax", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and not (tmp_path / "x").exists()
    assert "v5e:2x4, 8 chips" in done.stdout
    found = {
        row[1].strip(): float(row[2].replace(",", ""))
        for row in re.finditer(r"│ ([^│]+)│ *([\d,.]+) MiB", done.stdout)
    }
    state = 4 * 3 * PARAMETERS_OF_SMALL / 2**20  # the parameters and Adam's two moments
    batch = 8 * 64 * 64 * 3 / 2**20
    arguments = found["arguments: state and batch"]
    assert state + batch < arguments < 1.1 * (state + batch) + 0.2
    donated = found["of these in the memory of donated arguments"]
    assert state < donated <= found["outputs: state and loss"] < 1.1 * state + 0.2
    # each image's first activations alone, float32
    assert found["temporaries: activations, gradients"] > 8 * 32 * 32 * 32 * 4 / 2**20
    needed = arguments + found["outputs: state and loss"] - donated
    needed += found["temporaries: activations, gradients"] + found["program"]
    np.testing.assert_allclose(found["needed in all"], needed, atol=0.3)
    assert f"It fits: {found['needed in all'] / 2**14:.1%} of the chip's 16 GiB." in done.stdout


# convolutions, batch norm's scales and biases, and the head
PARAMETERS_OF_SMALL = (
    9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 2 * (32 + 64 + 128 + 256) + 256 * 10 + 10
)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["v5e:3x3"], "--aot must name a TPU topology such as v5e:2x4, and needs libtpu"),
        (["v5e:2x4", "--resume"], "--aot only compiles; leave --resume and --distributed out"),
        (["v5e:2x4", "--batch-size", "36"], "batch_size must be a multiple of the 8 devices"),
    ],
)
def test_what_cannot_be_compiled_ahead_is_one_sentence(flags, sentence, capsys):
    load("libtpu")
    with pytest.raises(SystemExit) as stop:
        load("examples.train_flax").main(["--aot", *flags])
    assert f"error: {sentence}" in f"{stop.value}{capsys.readouterr().err}"
