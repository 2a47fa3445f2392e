"""The three trainers as users start them: to the end, stopped, killed, resumed, and refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from examples.training.run import epoch_order
from examples.training.settings import LOSSES, parse
from lmf_multi import (
    adjust_logits,
    class_margins,
    class_weights,
    log_priors,
    reference,
    tune_adjustment,
)
from tests.frameworks import KERAS_BACKEND, load

ROOT = Path(__file__).parents[2]
NEEDS = {
    "torch": ["torch", "torchvision"],
    "flax": ["jax", "flax", "optax"],
    "keras": ["keras", KERAS_BACKEND],
}
SHARED = ["PIL", "sklearn", "rich", "tensorboard"]
EPOCHS, STEPS = 3, 8  # 280 digits in batches of 32
COMMON = ["--data", "digits", "--loss", "lmf", "--epochs", str(EPOCHS), "--learning-rate", "1e-3"]
LMF_PUBLISHED = {
    "alpha": 1.5,
    "beta": 1.0,
    "gamma": 1.5,
    "max_margin": 0.5,
    "scale": 30.0,
    "class_weight": "margin",
    "label_smoothing": 0.0,
    "logit_adjustment": 0.0,
}
# the features as cross-entropy trains them, then the head for two epochs
CRT = [*COMMON, "--loss", "crt", "--epochs", "2", "--head-epochs", "2", "--sampler", "balanced"]


@pytest.fixture(scope="module", autouse=True)
def jax_cache(tmp_path_factory):
    """The short processes share what one of them has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("jax")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module", params=NEEDS)
def trainer(request):
    """A framework's name; its packages are there."""
    for package in (*SHARED, *NEEDS[request.param]):
        load(package)
    return request.param


def run(trainer, *arguments, code=None, **options):
    """Start a trainer in a process of its own, or a program that ends by starting one."""
    start = ["-c", code] if code else ["-m", f"examples.train_{trainer}"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory):
    """A run that was never interrupted: its folder and what it printed."""
    return completed(trainer, tmp_path_factory, COMMON)


def completed(trainer, tmp_path_factory, arguments):
    out = tmp_path_factory.mktemp(trainer) / "run"
    done = run(trainer, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def result(out):
    """What decides a result file: all but the speed, which no two runs share."""
    found = json.loads((out / "result.json").read_text())
    assert found.pop("measured")["images_per_second"] > 0
    return found


def history(out):
    """The rows of a history, without their speed."""
    with (out / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same_run(out, other):
    """Bit for bit."""
    assert result(out) == result(other)
    assert history(out) == history(other)
    assert (out / "predictions.npz").read_bytes() == (other / "predictions.npz").read_bytes()


# --- to the end


def test_a_run_leaves_its_scores_and_predictions(trainer, finished):
    out, _ = finished
    found, kept = json.loads((out / "result.json").read_text()), np.load(out / "predictions.npz")
    logits, labels = kept["logits"], kept["labels"]
    assert logits.dtype == np.float32 and logits.shape == (len(labels), 10)
    assert len(set(kept["ids"])) == len(labels) == found["data"]["test"]
    predicted, test = logits.argmax(1), found["test"]
    assert len(set(predicted)) > 1
    f1 = f1_score(labels, predicted, average=None, zero_division=0)
    np.testing.assert_allclose(test["f1"], f1, rtol=1e-12)
    np.testing.assert_allclose(test["macro_f1"], f1.mean(), rtol=1e-12)
    balanced = balanced_accuracy_score(labels, predicted)
    np.testing.assert_allclose(test["balanced_accuracy"], balanced, rtol=1e-12)
    np.testing.assert_allclose(test["accuracy"], np.mean(labels == predicted), rtol=1e-12)
    confusion = np.array(test["confusion_matrix"])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(labels))
    np.testing.assert_allclose(np.diag(confusion) / confusion.sum(1), test["recall"], rtol=1e-12)
    assert len(test["precision"]) == 10
    assert found["framework"] == trainer and found["seed"] == 0 and found["epochs"] == EPOCHS
    assert found["loss"]["name"] == "lmf" and found["loss"]["scale"] == 30
    assert found["data"]["class_counts"] == [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]
    assert found["measured"]["peak_memory_bytes"] > 10**7
    assert {"python", "numpy"} < set(found["versions"])
    assert str(ROOT) not in (out / "result.json").read_text()


def test_a_run_keeps_validation_logits_and_tunes_tau_on_them(trainer, finished):
    out, printed = finished
    kept, found = np.load(out / "predictions.npz"), json.loads((out / "result.json").read_text())
    best = found["best_validation"]
    f1 = f1_score(kept["val_labels"], kept["val_logits"].argmax(1), average="macro")
    np.testing.assert_allclose(f1, best["macro_f1"], rtol=1e-12)  # they are the chosen epoch's
    assert kept["val_logits"].dtype == np.float32
    counts = found["data"]["class_counts"]
    tau = tune_adjustment(kept["val_logits"], kept["val_labels"], counts)
    assert found["tuned"]["tau"] == tau
    adjusted = adjust_logits(kept["logits"], counts, tau).argmax(1)
    f1 = f1_score(kept["labels"], adjusted, average="macro")
    np.testing.assert_allclose(found["tuned"]["test"]["macro_f1"], f1, rtol=1e-12)
    assert found["tuned"]["test"].keys() == found["test"].keys()
    assert f"macro-F1 {f1:.4f} with τ = {tau:.2f}, tuned on validation" in printed


# Starts a trainer whose second epoch is worse than its first.
WORSE = """
import importlib, sys
from examples.training import results

scores = iter((0.9, 0.1))
results.macro_f1 = lambda labels, logits: next(scores, 0.0)
sys.exit(importlib.import_module(f"examples.train_{sys.argv[1]}").main(sys.argv[2:]))
"""


def test_what_is_kept_is_of_the_best_epoch_not_of_the_last(trainer, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for out, epochs in ((one, "1"), (two, "2")):
        flags = [*COMMON, "--epochs", epochs, "--out", out]
        done = run(trainer, trainer, *flags, code=WORSE)
        assert done.returncode == 0, done.stderr
    assert result(two)["best_validation"] == {"macro_f1": 0.9, "epoch": 1}
    assert (one / "predictions.npz").read_bytes() == (two / "predictions.npz").read_bytes()


def test_a_run_learns_and_keeps_its_best_epoch(finished):
    out, printed = finished
    rows = history(out)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    scores = [float(row["val_macro_f1"]) for row in rows]
    best = result(out)["best_validation"]
    assert best == {"macro_f1": max(scores), "epoch": 1 + int(np.argmax(scores))}
    lines = re.findall(r"^epoch (\d)/3: loss (\S+), val loss \S+, val macro-F1", printed, re.M)
    np.testing.assert_allclose([float(loss) for _, loss in lines], losses, atol=5.1e-5)
    assert f"Test macro-F1 {result(out)['test']['macro_f1']:.4f}" in printed


def test_a_run_writes_events_for_tensorboard(finished):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    out, _ = finished
    (file,) = (out / "tensorboard").iterdir()
    content, position, found = file.read_bytes(), 0, {}
    while position < len(content):  # length (8), its checksum (4), event, its checksum (4)
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        position += 16 + length
        for value in event.summary.value:
            found[value.tag, event.step] = make_ndarray(value.tensor)
    for row in history(out):
        for name in ("train_loss", "val_macro_f1"):
            np.testing.assert_allclose(found[name, int(row["epoch"])], float(row[name]), rtol=1e-6)


IMPORTED = """
import importlib, sys
importlib.import_module(f"examples.train_{sys.argv[1]}").main(sys.argv[2:])
print("imported:", *({"torch", "jax", "tensorflow"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("framework", "imported"), [("torch", "torch"), ("flax", "jax")])
def test_a_trainer_imports_one_framework(framework, imported, tmp_path):
    """TensorFlow would greet, and break torch.compile, which must be loaded before it."""
    for package in (*SHARED, *NEEDS[framework]):
        load(package)
    arguments = [framework, *COMMON, "--epochs", "1", "--out", tmp_path / "run"]
    done = run(framework, *arguments, code=IMPORTED)
    assert done.stdout.splitlines()[-1] == f"imported: {imported}"
    assert done.stderr == ""


# --- killed, stopped, damaged

# Starts a trainer that kills itself, or is asked to stop, at a moment that a signal from outside
# would only meet by chance.
INTERRUPTED = """
import importlib, os, signal, sys
from examples.training.run import Run

trainer, when, how, *arguments = sys.argv[1:]
took_step, save, moments = Run.took_step, Run.save, set(when.split(", "))

def moment(name):
    if name in moments:
        moments.remove(name)
        os.kill(os.getpid(), getattr(signal, how))

def interrupting_step(self, *arguments):
    took_step(self, *arguments)
    moment(f"epoch {self.epoch + 1} step {self.step}")

def interrupting_save(self, write):
    def interrupting_write(folder):
        write(folder)
        moment(f"writing epoch {self.epoch}")
    save(self, interrupting_write)
    moment(f"after epoch {self.epoch}")

Run.took_step, Run.save = interrupting_step, interrupting_save
sys.exit(importlib.import_module(f"examples.train_{trainer}").main(arguments))
"""


def test_kills_do_not_change_the_result(trainer, finished, tmp_path):
    """Killed in the first epoch, while writing a checkpoint, and right after the last one."""
    out = tmp_path / "run"
    arguments = [*COMMON, "--out", out, "--resume"]
    for moment in ("epoch 1 step 5", "writing epoch 2", "after epoch 3"):
        killed = run(trainer, trainer, moment, "SIGKILL", *arguments, code=INTERRUPTED)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / "result.json").exists()
    done = run(trainer, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Going on after epoch 3 of 3." in done.stdout
    assert_same_run(out, finished[0])
    again = run(trainer, *arguments)
    assert again.returncode == 0 and "the run is finished" in again.stdout


def test_ctrl_c_saves_within_an_epoch_and_a_damaged_checkpoint_falls_back(
    trainer, finished, tmp_path
):
    out = tmp_path / "run"
    arguments = [*COMMON, "--out", out]
    stopped = run(trainer, trainer, "epoch 2 step 3", "SIGINT", *arguments, code=INTERRUPTED)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    reached = re.search(
        r"Stopped and saved after epoch 1 of 3, step (\d) of 8; --resume", stopped.stdout
    )
    assert reached and int(reached[1]) in (3, 4)  # the signal may be seen one step later
    newest = max((out / "checkpoints").iterdir())
    assert newest.name == f"00001-000000{reached[1]}"
    file = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    whole = file.read_bytes()

    refused = run(trainer, *arguments)
    assert refused.returncode == 1
    assert refused.stderr.strip() == (
        f"error: {out} holds a run already; --resume goes on with it, another --out keeps it"
    )

    file.write_bytes(whole[: len(whole) // 2])
    other = run(trainer, *arguments, "--resume", "--seed", "1")  # passes over it, then refuses
    assert f"checkpoint {newest.name} is damaged" in other.stdout
    assert other.returncode == 1
    assert other.stderr.strip().endswith(
        "--resume needs the seed that the run began with, 0, got 1; "
        "choose another --out to begin anew"
    )

    file.write_bytes(whole)
    stopped = run(
        trainer, trainer, "after epoch 2", "SIGTERM", *arguments, "--resume", code=INTERRUPTED
    )
    assert stopped.returncode == 130, stopped.stderr
    assert f"Going on after epoch 1 of 3, step {reached[1]} of 8." in stopped.stdout
    newest = max((out / "checkpoints").iterdir())
    file = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])
    done = run(trainer, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.name} is damaged" in done.stdout
    assert_same_run(out, finished[0])


# --- two stages


@pytest.fixture(scope="module")
def two_stages(trainer, tmp_path_factory):
    """The same of crt."""
    return completed(trainer, tmp_path_factory, CRT)


def test_crt_trains_as_cross_entropy_and_then_the_head_anew(trainer, two_stages, tmp_path):
    out, printed = two_stages
    done = run(
        trainer, *CRT[:-4], "--sampler", "balanced", "--loss", "ce", "--out", tmp_path / "ce"
    )
    assert done.returncode == 0, done.stderr
    rows = history(out)
    assert rows[:2] == history(tmp_path / "ce")
    assert len(rows) == 4 and [float(row["learning_rate"]) for row in rows] == [1e-3] * 4
    assert float(rows[2]["train_loss"]) > float(rows[1]["train_loss"])  # the head was drawn anew
    assert float(rows[3]["train_loss"]) < float(rows[2]["train_loss"])
    assert "epoch 4/4: loss " in printed
    best = result(out)["best_validation"]
    scores = [float(row["val_macro_f1"]) for row in rows[2:]]
    assert best == {"macro_f1": max(scores), "epoch": 3 + int(np.argmax(scores))}
    found = result(out)
    assert (found["epochs"], found["head_epochs"], found["sampler"]) == (2, 2, "balanced")
    chosen = result(tmp_path / "ce")["best_validation"]["epoch"]
    before = weights_of(trainer, tmp_path / "ce" / "checkpoints" / f"{chosen:05d}-0000000")
    after = weights_of(trainer, out / "checkpoints" / "00004-0000000")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert len(before) > 20 and before.keys() == after.keys()
    assert len(changed) == 2 and all("head" in name for name in changed)  # its kernel and bias


def weights_of(trainer, checkpoint):
    """Arrays by name, of a network and batch norm's moments."""
    if trainer == "torch":
        state = load("torch").load(checkpoint / "checkpoint.pt", weights_only=True)["model"]
        return {k: v.numpy() for k, v in state.items()}
    if trainer == "flax":
        packed = (checkpoint / "state.msgpack").read_bytes()
        arrays = load("flax.serialization").msgpack_restore(packed)
        return {name: array for name, array in arrays.items() if name.startswith("model.")}
    keras = load("keras")
    model = keras.models.load_model(checkpoint / "model.keras", compile=False)
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}


def test_kills_in_either_stage_do_not_change_the_result(trainer, two_stages, tmp_path):
    """Killed before the head is begun, and within its first epoch, whose half is saved."""
    out = tmp_path / "run"
    arguments = [*CRT, "--out", out, "--resume"]
    killed = run(trainer, trainer, "after epoch 2", "SIGKILL", *arguments, code=INTERRUPTED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stopped = run(trainer, trainer, "epoch 3 step 3", "SIGINT", *arguments, code=INTERRUPTED)
    assert stopped.returncode == 130, stopped.stderr
    assert re.search(r"Stopped and saved after epoch 2 of 4, step \d of 8;", stopped.stdout)
    killed = run(trainer, trainer, "writing epoch 4", "SIGKILL", *arguments, code=INTERRUPTED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    longer = run(trainer, *arguments, "--epochs", "3")
    assert "--resume needs the epochs that the run began with, 2, got 3" in longer.stderr
    done = run(trainer, *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, two_stages[0])


def test_a_balanced_epoch_draws_each_class_alike():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    about = {"sampler": "balanced", "seed": 3}
    order = epoch_order(labels, 30_000, epoch=0, **about)
    np.testing.assert_allclose(np.bincount(labels[order]) / 30_000, 1 / 3, atol=0.01)
    rare = np.bincount(order, minlength=1000)[990:]
    np.testing.assert_allclose(rare / 10_000, 0.1, atol=0.01)  # of which each is as likely
    assert order.min() == 0 and len(set(order)) > 900
    np.testing.assert_array_equal(order, epoch_order(labels, 30_000, epoch=0, **about))
    assert not np.array_equal(order, epoch_order(labels, 30_000, epoch=1, **about))
    shuffled = epoch_order(labels, 1000, sampler="shuffle", seed=3, epoch=0)
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(1000))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    for package in (*SHARED, *NEEDS["torch"]):
        load(package)
    moments, arguments = "epoch 2 step 2, epoch 2 step 3", [*COMMON, "--out", tmp_path / "run"]
    stopped = run("torch", "torch", moments, "SIGINT", *arguments, code=INTERRUPTED)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert "Stopped at once; --resume goes on from the last checkpoint." in stopped.stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00001-0000000"]


def test_a_loss_that_is_not_finite_stops_the_run(trainer, tmp_path):
    done = run(trainer, *COMMON, "--learning-rate", "1e30", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert re.search(
        r"^the loss is (nan|inf) in epoch 1, step \d of 8, so the run stops; "
        r"try a lower --learning-rate$",
        done.stderr,
        re.MULTILINE,
    )
    assert not (tmp_path / "run" / "result.json").exists()


# --- the loss that a name stands for


def loss_of_torch(settings, counts, logits, labels):
    torch = load("torch")
    criterion = load("examples.train_torch").build_loss(settings, counts)
    return criterion(torch.from_numpy(logits), torch.from_numpy(labels)).item()


def loss_of_flax(settings, counts, logits, labels):
    return float(load("examples.train_flax").build_loss(settings, counts)(logits, labels))


def loss_of_keras(settings, counts, logits, labels):
    load("keras")
    return float(load("examples.train_keras").build_loss(settings, counts)(labels, logits))


LOSS_OF = {"torch": loss_of_torch, "flax": loss_of_flax, "keras": loss_of_keras}


def mean_of(name, counts, logits, labels, options):
    """The loss's definition: weighted cross-entropy by hand, the others from the reference."""
    weight = options.pop("class_weight", None)
    logits = logits + options.pop("logit_adjustment", 0.0) * log_priors(counts)
    w = class_weights(counts, weight)
    if name in ("ce", "bwcce", "la", "crt"):
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ε, hard = options.pop("label_smoothing", 0.0), np.eye(len(w))[labels]
        return -(((1 - ε) * hard + ε / len(w)) * w * log_p).sum() / w[labels].sum()
    margins = class_margins(counts, options.pop("max_margin"))
    given = {"ldam": (margins, w), "lmf": (margins, w), "focal": (w,)}[name]
    return getattr(reference, f"{name}_loss")(logits, labels, *given, **options)


@pytest.mark.parametrize(
    "flags",
    [
        "--loss ce",
        "--loss bwcce",
        "--loss ce --label-smoothing 0.1",
        "--loss crt --label-smoothing 0.2",
        "--loss bwcce --label-smoothing 0.1",
        "--loss la --label-smoothing 0.1 --logit-adjustment 0.7",
        "--loss bwcce --class-weight balanced",
        "--loss focal",
        "--loss focal --gamma 0.5 --class-weight none --label-smoothing 0.1",
        "--loss ldam",
        "--loss ldam --scale 5 --max-margin 0.8 --class-weight effective",
        "--loss lmf",
        "--loss la",
        "--loss la --logit-adjustment 0.7",
        "--loss crt",
        "--loss focal --logit-adjustment 1.5 --class-weight none",
        "--loss ldam --logit-adjustment 1",
        "--loss lmf --logit-adjustment 0.5",
        "--loss lmf --alpha 0.3 --beta 2 --gamma 2 --max-margin 0.2 --scale 10 --drw 3",
    ],
)
def test_losses_are_what_their_names_say(trainer, flags):
    settings = parse(trainer, flags.split(), "")
    rng = np.random.default_rng(0)
    counts, labels = np.array([90, 30, 10, 3]), rng.integers(0, 4, 32)
    logits = rng.normal(size=(32, 4)).astype(np.float32)
    expected = mean_of(
        settings.loss, counts, logits.astype(np.float64), labels, dict(settings.loss_options)
    )
    found = LOSS_OF[trainer](settings, counts, logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- several processes, torchrun's

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def by_torchrun(folder, program, **batch):
    """Run a program in two processes, which find the batch at the path that they are given."""
    np.savez(folder / "batch.npz", **batch)
    (folder / "program.py").write_text(program)
    command = [*TORCHRUN, str(folder / "program.py"), str(folder / "batch.npz")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def of_two_processes(*flags):
    """The command of PyTorch's trainer, whose packages are there."""
    for package in (*SHARED, *NEEDS["torch"]):
        load(package)
    return [*TORCHRUN, "-m", "examples.train_torch", *COMMON, *flags]


def test_torchrun_trains_one_model_and_tests_every_image(tmp_path):
    """Each process reads its share; what is written is one model's, and the images' in order."""
    out = tmp_path / "run"
    command = of_two_processes("--epochs", "1", "--out", str(out))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test macro-F1") == 1
    torch, models, data = (
        load("torch"),
        load("examples.models.torch"),
        load("examples.data.datasets"),
    )
    weights = out / "checkpoints" / "00001-0000000" / "checkpoint.pt"
    model = models.build("small", 10, weights=weights).eval()
    test = data.load("digits").test
    (images, labels), *_ = test.batches(np.arange(len(test)), len(test))
    with torch.no_grad():
        logits = model(models.normalize(torch.from_numpy(images)))
    kept = np.load(out / "predictions.npz")
    np.testing.assert_array_equal(kept["labels"], labels)
    np.testing.assert_allclose(kept["logits"], logits, rtol=1e-4, atol=1e-4)


def test_ctrl_c_reaches_all_of_torchruns_processes_and_saves(tmp_path):
    """From the terminal and again from torchrun, at whatever steps they are."""
    out = tmp_path / "run"
    command = of_two_processes("--epochs", "100000", "--out", str(out))
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        for line in started.stdout:
            if line.startswith("epoch 2/"):
                break
        os.killpg(started.pid, signal.SIGINT)
        printed, _ = started.communicate()
    assert "Stopped and saved after epoch " in printed
    newest = max(path.name for path in (out / "checkpoints").iterdir())
    reached = re.search(r"after epoch (\d+) of 100000(?:, step (\d+) of 8)?;", printed)
    assert newest == f"{int(reached[1]):05d}-{int(reached[2] or 0):07d}"


WHOLE_BATCH = """
import sys
import numpy as np, torch, torch.distributed as dist
from examples.training.settings import LOSSES, parse
from examples.train_torch import build_loss

torch.distributed.init_process_group("gloo")
rank, batch = dist.get_rank(), np.load(sys.argv[1])
for name in LOSSES:
    settings = parse("torch", ["--loss", name], "")
    criterion = build_loss(settings, batch["counts"], world=2)
    logits = torch.from_numpy(batch["logits"][rank::2]).requires_grad_()
    loss = criterion(logits, torch.from_numpy(batch["labels"][rank::2]))
    loss.backward()
    np.savez(f"{sys.argv[1]}-{name}-{rank}.npz", loss=loss.item(), gradient=logits.grad)
dist.barrier()
dist.destroy_process_group()
"""


def test_torchrun_gives_each_loss_the_whole_batchs_mean(tmp_path):
    """Two processes with other class mixes: their averages are one process's loss and gradient."""
    torch, trainer = load("torch"), load("examples.train_torch")
    rng = np.random.default_rng(0)
    counts, labels = np.array([90, 30, 3]), np.array([0, 2, 0, 1, 0, 2, 1, 2])
    logits = rng.normal(size=(8, 3)).astype(np.float32)
    by_torchrun(tmp_path, WHOLE_BATCH, counts=counts, labels=labels, logits=logits)
    for name in LOSSES:
        z = torch.from_numpy(logits).requires_grad_()
        loss = trainer.build_loss(parse("torch", ["--loss", name], ""), counts)(
            z, torch.from_numpy(labels)
        )
        loss.backward()
        parts = [np.load(tmp_path / f"batch.npz-{name}-{rank}.npz") for rank in (0, 1)]
        np.testing.assert_allclose(np.mean([p["loss"] for p in parts]), loss.item(), rtol=1e-6)
        for rank, part in enumerate(parts):
            expected = z.grad.numpy()[rank::2]
            np.testing.assert_allclose(part["gradient"] / 2, expected, rtol=1e-5, atol=1e-7)


# --- flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loss ce --gamma 2", "--gamma belongs to focal, lmf, got --loss ce"),
        ("--loss la --alpha 2", "--alpha belongs to lmf, got --loss la"),
        (
            "--loss crt --logit-adjustment 1",
            "--logit-adjustment belongs to focal, ldam, lmf, la, got --loss crt",
        ),
        ("--loss la --drw 3", "--drw belongs to focal, ldam, lmf, got --loss la"),
        ("--loss ce --head-epochs 3", "--head-epochs belongs to crt, got --loss ce"),
        ("--sampler even", "argument --sampler: invalid choice: 'even'"),
        ("--loss focal --scale 3", "--scale belongs to ldam, lmf, got --loss focal"),
        ("--loss ce --drw 3", "--drw belongs to focal, ldam, lmf, got --loss ce"),
        (
            "--drw 3 --class-weight margin",
            "--drw sets the class weights itself; leave --class-weight out",
        ),
        ("--gamma -1", "gamma must be at least 0, got -1.0"),
        ("--scale nan", "scale must be finite, got nan"),
        ("--label-smoothing 1.5", "label_smoothing must be between 0 and 1, got 1.5"),
        ("--epochs 0", "argument --epochs: must be at least 1, got 0"),
        ("--epochs ten", "argument --epochs: invalid whole number value: 'ten'"),
        ("--learning-rate 0", "argument --learning-rate: must be positive and finite, got 0.0"),
        ("--weight-decay -1", "must be at least 0 and finite, got -1.0"),
        ("--image-size 4", "argument --image-size: must be at least 8, got 4"),
        ("--loss dice", "argument --loss: invalid choice: 'dice'"),
        (
            "--pretrained --weights w.pt",
            "--pretrained and --weights exclude each other; give one of them",
        ),
    ],
)
def test_a_flag_that_does_not_fit_is_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("torch", flags.split(), "")
    assert sentence in capsys.readouterr().err


def test_flags_that_are_one_frameworks_are_refused_by_the_others(capsys):
    for framework, flags in [("keras", "--compile"), ("torch", "--aot v5e:2x2")]:
        with pytest.raises(SystemExit, match="2"):
            parse(framework, flags.split(), "")
        assert f"unrecognized arguments: {flags}" in capsys.readouterr().err


def test_the_published_recipe_is_the_default():
    settings = parse("torch", [], "")
    assert settings.loss_options == LMF_PUBLISHED
    assert (settings.learning_rate, settings.weight_decay, settings.batch_size) == (1e-4, 5e-4, 32)
    assert settings.epochs == 100
    rates = [settings.learning_rate_at(epoch) for epoch in (0, 29, 30, 60, 99)]
    np.testing.assert_allclose(rates, [1e-4, 1e-4, 1e-5, 1e-6, 1e-7], rtol=1e-12)
    assert parse("torch", ["--loss", "la"], "").loss_options == {"logit_adjustment": 1}
    crt = parse("torch", ["--loss", "crt", "--epochs", "90"], "")
    assert (crt.head_epochs, crt.all_epochs) == (10, 100)
    np.testing.assert_allclose([crt.learning_rate_at(e) for e in (89, 90)], [1e-6, 1e-4])
    assert parse("torch", ["--loss", "crt", "--epochs", "1"], "").head_epochs == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data no/such/folder", "no/such/folder"),
        ("--batch-size 281", "batch_size must be at most the 280 training images, got 281"),
        ("--arch small --pretrained", "small"),
        ("--weights no/such/file", "no/such/file"),
        ("--device abacus", "--device abacus is not to be had"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(flags, sentence, capsys, tmp_path):
    trainer = load("examples.train_torch")
    with pytest.raises(SystemExit) as stopped:
        trainer.main([*flags.split(), "--epochs", "1", "--out", str(tmp_path / "run")])
    message = str(stopped.value)
    assert message.startswith("error: ") and sentence in message and "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_in_the_place_of_the_folder_is_one_sentence(below, tmp_path):
    trainer = load("examples.train_torch")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        trainer.main(["--epochs", "1", "--out", f"{tmp_path / 'file'}{below}"])
    message = str(stopped.value)
    assert message.startswith("error: ") and str(tmp_path / "file") in message
    assert "\n" not in message
    assert (tmp_path / "file").read_text() == "precious"
