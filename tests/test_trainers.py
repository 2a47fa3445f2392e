"""The three trainers as users start them: to the end, stopped, killed, resumed, and refused."""

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from tests.frameworks import KERAS_BACKEND, load

ROOT = Path(__file__).parents[1]
NEEDS = {
    "torch": ["torch", "torchvision"],
    "flax": ["jax", "flax", "optax", "orbax"],
    "keras": ["keras", KERAS_BACKEND],
}
SHARED = ["PIL", "sklearn", "rich", "tensorboardX"]
EPOCHS, STEPS = 3, 8  # 280 digits in batches of 32
COMMON = ["--data", "digits", "--loss", "lmf", "--epochs", str(EPOCHS), "--learning-rate", "1e-3"]


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
    out = tmp_path_factory.mktemp(trainer) / "run"
    done = run(trainer, *COMMON, "--out", out)
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
    from tensorboardX.proto.event_pb2 import Event

    out, _ = finished
    (file,) = (out / "tensorboard").iterdir()
    content, position, found = file.read_bytes(), 0, {}
    while position < len(content):  # length (8), its checksum (4), event, its checksum (4)
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        position += 16 + length
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    for row in history(out):
        for name in ("train_loss", "val_macro_f1"):
            np.testing.assert_allclose(found[name, int(row["epoch"])], float(row[name]), rtol=1e-6)


# --- killed, stopped, damaged

# Starts a trainer that kills itself, or is asked to stop, at a moment that a signal from outside
# would only meet by chance.
INTERRUPTED = """
import importlib, os, signal, sys
from examples.run import Run

trainer, when, how, *arguments = sys.argv[1:]
took_step, save, moments = Run.took_step, Run.save, {when}

def moment(name):
    if name in moments:
        moments.remove(name)
        os.kill(os.getpid(), getattr(signal, how))

def interrupting_step(self, loss):
    took_step(self, loss)
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
