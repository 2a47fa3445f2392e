"""Whole runs by the recipe: what it says is done, alike in three trainers, and after a resume."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import f1_score

from examples.training.mixup import mix
from examples.training.run import Run
from examples.training.settings import LOSSES, parse
from lmf_multi import class_margins, class_weights, log_priors, reference
from tests.examples.test_recipe import load_all, recipe
from tests.examples.test_train_keras import MIRRORED
from tests.examples.test_trainers import (
    LOSS_OF,
    NEEDS,
    ROOT,
    assert_same_run,
    by_torchrun,
    history,
    result,
    weights_of,
)
from tests.frameworks import KERAS_BACKEND, load

SHORT = ["--epochs", "2", "--learning-rate", "1e-3"]


def trained(name, *arguments):
    """Train in this process: the status, or the sentence that ended it."""
    load_all(name)
    try:
        return load(f"examples.train_{name}").main([*SHORT, *map(str, arguments)])
    except SystemExit as stopped:
        return str(stopped)


@pytest.fixture(params=NEEDS)
def name(request):
    """A trainer's; what Keras sets for the whole process is set back."""
    yield request.param
    if request.param == "keras":
        load("keras").config.set_dtype_policy("float32")


def scoring(monkeypatch, *scores):
    """Have the validation images score so, epoch by epoch."""
    scores = iter(scores)
    monkeypatch.setattr("examples.training.results.macro_f1", lambda *_: next(scores, 0.0))


def found_in(out):
    found = json.loads((out / "result.json").read_text())
    rates = [float(row["learning_rate"]) for row in history(out)]
    return found["epochs_run"], found["best_validation"]["epoch"], rates


EARLY = ["--early-stopping", 2, "--epochs", 6, "--decay-epochs", 3]


def test_a_run_stops_early_and_a_resumed_one_at_the_same_epoch(name, monkeypatch, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    scoring(monkeypatch, 0.1, 0.3, 0.2, 0.3, 0.9)
    assert trained(name, *EARLY, "--out", whole) == 0
    assert found_in(whole) == (4, 2, [1e-3, 1e-3, 1e-3, 1e-4])
    assert json.loads((whole / "result.json").read_text())["epochs"] == 6
    sentence = "Stopped early after epoch 4 of 6: no better validation macro-F1 in 2 epochs."
    assert sentence in capsys.readouterr().out
    assert trained(name, *EARLY, "--out", whole, "--resume") == 0
    assert "the run is finished" in capsys.readouterr().out

    stopping(monkeypatch, epoch=2, step=8)
    scoring(monkeypatch, 0.1, 0.3, 0.2)
    assert trained(name, *EARLY, "--out", stopped) == 130
    monkeypatch.undo()
    scoring(monkeypatch, 0.3, 0.9)
    assert trained(name, *EARLY, "--out", stopped, "--resume") == 0
    assert_same_run(stopped, whole)


def stopping(monkeypatch, epoch, step):
    """Ask to stop at a step, counted from 1, of an epoch, counted from 0."""
    took_step = Run.took_step

    def stopping_step(self, *arguments):
        self._asked_to_stop = (self.epoch, self.step) == (epoch, step - 1)
        took_step(self, *arguments)

    monkeypatch.setattr(Run, "took_step", stopping_step)


def test_crts_head_follows_where_the_network_stopped_early(name, monkeypatch, tmp_path):
    """At once, by the schedule's beginning; it stops early for itself, also when resumed in it."""
    flags = [*EARLY, "--loss", "crt", "--head-epochs", 5, "--decay-epochs", 2]
    scores = (0.3, 0.2, 0.1, 0.1, 0.2, 0.1, 0.1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    scoring(monkeypatch, *scores)
    assert trained(name, *flags, "--out", whole) == 0
    assert found_in(whole) == (7, 5, [1e-3, 1e-3, 1e-4, 1e-3, 1e-3, 1e-4, 1e-4])
    stopping(monkeypatch, epoch=5, step=3)
    scoring(monkeypatch, *scores[:5])
    assert trained(name, *flags, "--out", stopped) == 130
    monkeypatch.undo()
    scoring(monkeypatch, *scores[5:])
    assert trained(name, *flags, "--out", stopped, "--resume") == 0
    assert_same_run(stopped, whole)


# --- mixup


def test_mixup_takes_means_of_images_and_labels():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    labels = np.array([0, 2, 1, 1, 0, 2])
    shares = []
    for step in range(50):
        pixels, soft = mix(images, labels, 3, 0.4, (0, 1, step))
        again, _ = mix(images, labels, 3, 0.4, (0, 1, step))
        np.testing.assert_array_equal(again, pixels)
        assert pixels.dtype == np.uint8 and soft.dtype == np.float32
        np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
        # of which two images each is a mean, by its labels and by its pixels
        share = soft[range(6), labels].min()
        means = share * images[:, None] + (1 - share) * images[None]
        far = np.abs(pixels[:, None] - means).max((2, 3, 4))
        assert (far.min(1) <= 0.51).all()
        other = far.argmin(1)
        expected = share * np.eye(3)[labels] + (1 - share) * np.eye(3)[labels[other]]
        np.testing.assert_allclose(soft, expected, atol=3e-3)
        shares.append(share)
    assert len(set(shares)) == 50
    drawn = [mix(images, labels, 3, 2.0, (1, i))[1][0, 0] for i in range(2000)]
    drawn = np.array([share for share in drawn if share < 1])  # which is mixed with another class
    np.testing.assert_allclose(drawn.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(drawn.std(), (1 / 20) ** 0.5, atol=0.02)  # Beta(2, 2)'s


def test_each_step_and_epoch_mixes_anew(tmp_path):
    """Whatever it goes on from, and but for the head's."""
    load("sklearn")
    settings = recipe(f"--mixup 0.4 --loss crt --epochs 2 --seed 5 --out {tmp_path}")
    data = load("examples.data.datasets").load("digits", None, imbalance=50.0, split_seed=0)
    whole, later = Run(settings, data), Run(settings, data)
    whole.epoch = later.epoch = 1
    later.step = 3
    batches, rest = list(whole.train_batches()), list(later.train_batches())
    assert len(batches) == 8 and len(rest) == 5
    for (images, labels), (same, same_labels) in zip(batches[3:], rest, strict=True):
        np.testing.assert_array_equal(images, same)
        np.testing.assert_array_equal(labels, same_labels)
    assert len({tuple(np.unique(labels)) for _, labels in batches}) == 8  # proportions
    whole.head_alone = True
    assert all(labels.ndim == 1 for _, labels in whole.train_batches())


@pytest.mark.parametrize("options", ["", " --label-smoothing 0.1"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_mixed_labels(name, loss, options):
    load_all(name)
    settings = parse(name, f"--loss {loss}{options}".split(), "")
    rng = np.random.default_rng(0)
    counts, labels = np.array([90, 30, 10, 3]), rng.dirichlet([1] * 4, 16).astype(np.float32)
    logits = rng.normal(size=(16, 4)).astype(np.float32)
    given = dict(settings.loss_options)
    w = class_weights(counts, given.pop("class_weight", None))
    adjusted = logits + given.pop("logit_adjustment", 0.0) * log_priors(counts)
    margins = class_margins(counts, given.pop("max_margin", 0.5)) * (loss in ("ldam", "lmf"))
    if loss not in ("focal", "ldam", "lmf"):  # cross-entropy is LDAM without margins
        given |= {"alpha": 1.0, "beta": 0.0, "scale": 1.0}
    given |= {"focal": {"alpha": 0.0}, "ldam": {"alpha": 1.0, "beta": 0.0}}.get(loss, {})
    expected = reference.lmf_loss(adjusted.astype(float), labels, margins, w, **given)
    found = LOSS_OF[name](settings, counts, logits, labels)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_mixed_images_are_learnt_from_and_a_resumed_run_mixes_the_same(name, monkeypatch, tmp_path):
    """Stopped within an epoch; in parts, whose labels' weights are the mixed ones'."""
    flags = ["--mixup", 0.4, "--accumulate", 2, "--loss", "bwcce"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert trained(name, *flags, "--out", whole) == 0
    assert trained(name, "--loss", "bwcce", "--accumulate", 2, "--out", tmp_path / "plain") == 0
    first, second = (float(row["train_loss"]) for row in history(whole))
    assert second < first and first != float(history(tmp_path / "plain")[0]["train_loss"])
    stopping(monkeypatch, epoch=1, step=3)
    assert trained(name, *flags, "--out", stopped) == 130
    monkeypatch.undo()
    assert trained(name, *flags, "--out", stopped, "--resume") == 0
    assert_same_run(stopped, whole)


# --- averaged weights


def final_weights(name, out, epoch):
    found = weights_of(name, out / "checkpoints" / f"{epoch:05d}-0000000")
    return {path: value for path, value in found.items() if "head" in path}


def test_averaged_weights_are_validated_and_the_others_trained(name, monkeypatch, tmp_path):
    """Of three steps, each of them an epoch, made in two parts that count as one."""
    load_all(name)
    monkeypatch.setattr(load(f"examples.train_{name}").models, "build", PIXELS_OF[name])
    flags = [*SGD, "--batch-size", 280]
    for epochs in (1, 2, 3):
        assert trained(name, *flags, "--epochs", epochs, "--out", tmp_path / str(epochs)) == 0
    one, two, three = (final_weights(name, tmp_path / str(n), n) for n in (1, 2, 3))
    out = tmp_path / "ema"
    more = ["--ema", 0.7, "--accumulate", 2, "--epochs", 3]
    assert trained(name, *flags, *more, "--out", out) == 0
    losses = [[float(row["train_loss"]) for row in history(path)] for path in (out, tmp_path / "3")]
    np.testing.assert_allclose(*losses, rtol=1e-5)  # of the weights that are trained
    found = final_weights(name, out, 3)
    assert len(found) == 2
    for weight, value in found.items():
        average = 0.7 * (0.7 * one[weight] + 0.3 * two[weight]) + 0.3 * three[weight]
        np.testing.assert_allclose(value, average, rtol=1e-4, atol=1e-6)
        assert not np.allclose(value, three[weight], rtol=1e-3)
    # validated by the average, which is what predictions come from
    assert history(out)[2]["val_loss"] != history(tmp_path / "3")[2]["val_loss"]
    kept = np.load(out / "predictions.npz")["val_logits"]
    best = result(out)["best_validation"]
    f1 = f1_score(np.load(out / "predictions.npz")["val_labels"], kept.argmax(1), average="macro")
    np.testing.assert_allclose(f1, best["macro_f1"], rtol=1e-12)


# --- a batch in parts


def pixels_of_torch(*_, **__):
    torch = load("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten())
    model.head = torch.nn.Linear(28 * 28 * 3, 10)
    return model


def pixels_of_flax(*_, rngs, **__):
    nnx = load("flax.nnx")

    class Linear(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(28 * 28 * 3, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(x.reshape(len(x), -1))

    return Linear()


def pixels_of_keras(*_, **__):
    layers = load("keras").layers
    pixels = layers.Input((28, 28, 3))
    head = layers.Dense(10, name="head")(layers.Flatten()(layers.Rescaling(1 / 255)(pixels)))
    return load("keras").Model(pixels, head)


PIXELS_OF = {"torch": pixels_of_torch, "flax": pixels_of_flax, "keras": pixels_of_keras}
SGD = ["--optimizer", "sgd", "--learning-rate", "1e-3"]


@pytest.mark.parametrize(
    "flags",
    [
        "--loss lmf --scale 3",
        "--loss lmf --scale 3 --drw 1 --clip-norm 5",
        "--loss ldam --scale 3 --class-weight effective",
        "--loss focal",
        "--loss bwcce --class-weight balanced",
        "--loss la",
        "--loss ldam --scale 3 --mixup 0.5",
        "--loss ce --label-smoothing 0.1 --mixup 0.5",
    ],
)
def test_parts_of_a_batch_train_as_the_whole(name, flags, monkeypatch, tmp_path):
    """Of a network without batch norm: each part counts by its share of the batch's weight."""
    load_all(name)
    trainer = load(f"examples.train_{name}")
    monkeypatch.setattr(trainer.models, "build", PIXELS_OF[name])
    for parts in (1, 4):
        out = tmp_path / str(parts)
        assert trained(name, *SGD, *flags.split(), "--accumulate", parts, "--out", out) == 0
    found, expected = (history(tmp_path / parts) for parts in ("4", "1"))
    for row, other in zip(found, expected, strict=True):
        for column in ("train_loss", "val_loss"):
            np.testing.assert_allclose(float(row[column]), float(other[column]), rtol=2e-5)
    found, expected = (
        np.load(tmp_path / parts / "predictions.npz")["logits"] for parts in ("4", "1")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


IN_PARTS = """
import sys
import numpy as np, torch, torch.distributed as dist
from examples.training.recipe_torch import backward
from examples.training.settings import LOSSES, parse
from examples.train_torch import build_loss, replicated

torch.distributed.init_process_group("gloo")
rank, batch = dist.get_rank(), np.load(sys.argv[1])
x, y = (torch.from_numpy(batch[name][rank::2]) for name in ("x", "y"))
for name in LOSSES:
    model = torch.nn.Linear(5, 3)
    torch.nn.init.constant_(model.weight, 0.1)
    torch.nn.init.constant_(model.bias, 0.0)
    replica = replicated(model, 2)
    criterion = build_loss(parse("torch", ["--loss", name], ""), batch["counts"], world=2)
    loss_of = lambda x, y, totals: criterion(replica(x), y, normalizers=totals)
    loss = backward(loss_of, criterion, (x, y), replica, 3)
    np.savez(f"{sys.argv[1]}-{name}-{rank}.npz", loss=loss.item(), gradient=model.weight.grad)
dist.barrier()
dist.destroy_process_group()
"""


def test_parts_of_two_processes_have_the_whole_batchs_gradient(tmp_path):
    load_all("torch")
    torch, trainer = load("torch"), load("examples.train_torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)).astype(np.float32)
    y = np.array([0, 2, 0, 1, 0, 2, 1, 2, 0, 0, 0, 1])
    counts = np.array([90, 30, 3])
    by_torchrun(tmp_path, IN_PARTS, counts=counts, x=x, y=y)
    for name in LOSSES:
        model = torch.nn.Linear(5, 3)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.constant_(model.bias, 0.0)
        criterion = trainer.build_loss(parse("torch", ["--loss", name], ""), counts)
        loss = criterion(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        parts = [np.load(tmp_path / f"batch.npz-{name}-{rank}.npz") for rank in (0, 1)]
        np.testing.assert_allclose(np.mean([p["loss"] for p in parts]), loss.item(), rtol=1e-5)
        for part in parts:
            np.testing.assert_allclose(
                part["gradient"], model.weight.grad.numpy(), rtol=1e-4, atol=1e-6
            )


def test_keras_refuses_what_its_replicas_would_do_apart(tmp_path):
    load_all("keras")
    if KERAS_BACKEND != "tensorflow":
        pytest.skip("runs with Keras on tensorflow")
    command = [sys.executable, "-c", MIRRORED, "--clip-norm", "1", "--out", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: --clip-norm needs one device with Keras on TensorFlow, got 2; "
        "KERAS_BACKEND=jax has it on several"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_older_than_a_flag_goes_on(tmp_path, capsys):
    """Its checkpoint does not name the schedule; another than the earlier one is refused."""
    out = tmp_path / "run"
    assert trained("torch", "--epochs", 1, "--out", out) == 0
    checkpoint = out / "checkpoints" / "00001-0000000"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["decides"].pop("schedule") == "step"
    (checkpoint / "state.json").write_text(json.dumps(state))
    digests = json.loads((checkpoint / "sha256.json").read_text())
    digests["state.json"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    (checkpoint / "sha256.json").write_text(json.dumps(digests))
    refused = trained("torch", "--out", out, "--resume", "--schedule", "constant")
    assert "--resume needs the schedule that the run began with, 'step', got 'constant'" in refused
    assert trained("torch", "--out", out, "--resume") == 0
    assert "Going on after epoch 1 of 2." in capsys.readouterr().out


def test_a_run_can_be_repeated_from_what_it_wrote(name, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--loss", "focal", "--gamma", 0.5, "--epochs", 1, "--seed", 3, "--mixup", 0.4]
    assert trained(name, *flags, "--out", one) == 0
    assert (
        load(f"examples.train_{name}").main(
            ["--config", str(one / "config.toml"), "--out", str(two)]
        )
        == 0
    )
    assert_same_run(one, two)


def test_crts_head_needs_no_warm_up(tmp_path):
    """Its optimiser is a new one, at the whole rate from the first step."""
    flags = ["--loss", "crt", "--head-epochs", 1, "--warmup", 1, "--schedule", "constant"]
    assert trained("torch", *flags, "--out", tmp_path / "run") == 0
    file = tmp_path / "run" / "checkpoints" / "00003-0000000" / "checkpoint.pt"
    (group,) = load("torch").load(file, weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == group["initial_lr"] == 1e-3


def test_a_wave_has_the_epochs_that_it_began_with(tmp_path):
    flags = ["--schedule", "cosine", "--out", tmp_path / "run"]
    assert trained("torch", *flags) == 0
    longer = trained("torch", *flags, "--resume", "--epochs", 3)
    assert "--resume needs the epochs that the run began with, 2, got 3" in longer


# --- all of it

ALL = [
    *("--optimizer", "adamw", "--schedule", "cosine", "--warmup", 1, "--clip-norm", 1),
    *("--accumulate", 2, "--mixup", 0.2, "--label-smoothing", 0.1, "--ema", 0.8),
    *("--loss", "crt", "--head-epochs", 2, "--early-stopping", 2),
]


def test_a_run_with_all_of_it_goes_on_as_it_would_have(name, monkeypatch, tmp_path):
    """Stopped within an epoch of the network, and of the head."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert trained(name, *ALL, "--out", whole) == 0
    for epoch in (1, 2):
        with monkeypatch.context() as patch:
            stopping(patch, epoch=epoch, step=3)
            assert trained(name, *ALL, "--out", stopped, "--resume") == 130
    assert trained(name, *ALL, "--out", stopped, "--resume") == 0
    assert_same_run(stopped, whole)
    checkpoints = [path.name for path in (stopped / "checkpoints").iterdir()]
    assert "00004-0000000" in checkpoints
