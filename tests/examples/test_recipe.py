"""The recipe: rates, optimisers and the like are the same in three frameworks."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from examples.training.mixup import mix
from examples.training.run import Run
from examples.training.settings import LOSSES, parse
from lmf_multi import class_margins, class_weights, log_priors, reference
from tests.examples.test_trainers import (
    LOSS_OF,
    NEEDS,
    SHARED,
    assert_same_run,
    history,
    result,
    weights_of,
)
from tests.frameworks import load


def load_all(name):
    """Import what a trainer needs, or skip the test."""
    for package in (*SHARED, *NEEDS[name]):
        load(package)


@pytest.fixture(params=NEEDS)
def framework(request):
    """The name of one, and its module of the recipe."""
    load_all(request.param)
    return request.param, load(f"examples.training.recipe_{request.param}")


def recipe(flags):
    return parse("torch", flags.split(), "")


# --- rates


def rates_of_torch(module, settings, head_alone):
    torch = load("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], settings.learning_rate)
    scheduler = module.build_scheduler(settings, optimizer, head_alone)
    for _ in range(settings.stage(head_alone)[0]):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def rates_of_flax(module, settings, head_alone):
    rate = module.schedule(settings, head_alone)
    return [float(rate(epoch)) for epoch in range(settings.stage(head_alone)[0])]


def rates_of_keras(module, settings, head_alone):
    keras = load("keras")
    model, found = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), []
    model.compile(keras.optimizers.SGD(settings.learning_rate), "mse")
    keeping = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: found.append(float(model.optimizer.learning_rate))
    )
    first = settings.epochs if head_alone else 0
    last = first + settings.stage(head_alone)[0]
    one = np.zeros((1, 1), np.float32)
    callbacks = [module.rates(SimpleNamespace(settings=settings, head_from=None)), keeping]
    model.fit(one, one, initial_epoch=first, epochs=last, verbose=0, callbacks=callbacks)
    return found


RATES_OF = {"torch": rates_of_torch, "flax": rates_of_flax, "keras": rates_of_keras}


@pytest.mark.parametrize("head_alone", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        "--decay-epochs 2 --decay-factor 0.5",
        "--decay-epochs 2 --decay-factor 0.5 --warmup 3",
        "--schedule cosine",
        "--schedule cosine --warmup 2",
        "--schedule constant",
        "--schedule constant --warmup 1",
    ],
)
def test_rates_are_the_same_everywhere(framework, flags, head_alone):
    name, module = framework
    settings = recipe(f"--loss crt --epochs 7 --head-epochs 3 --learning-rate 0.1 {flags}")
    first, number = (7, 3) if head_alone else (0, 7)
    expected = [settings.learning_rate_at(epoch) for epoch in range(first, first + number)]
    found = list(RATES_OF[name](module, settings, head_alone))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ("--epochs 5 --decay-epochs 2 --warmup 1", [0.5, 1, 1, 0.1, 0.1]),
        ("--epochs 5 --schedule constant --warmup 3", [0.25, 0.5, 0.75, 1, 1]),
        ("--epochs 4 --schedule cosine", [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        ("--epochs 3 --schedule cosine --warmup 1", [0.5, 1, 0.5]),
        (
            "--loss crt --head-epochs 2 --epochs 3 --schedule cosine --warmup 1",
            [0.5, 1, 0.5, 1, 0.5],
        ),
    ],
)
def test_rates_by_hand(flags, rates):
    settings = recipe(f"{flags} --learning-rate 1")
    found = [settings.learning_rate_at(epoch) for epoch in range(settings.all_epochs)]
    np.testing.assert_allclose(found, rates, rtol=1e-12)


# --- optimisers


def steps_of_torch(module, settings, start, gradients):
    torch = load("torch")
    model = torch.nn.ParameterList([torch.tensor(start)])
    training = module.begin(settings, model)
    for gradient in gradients:
        model[0].grad = torch.tensor(gradient)
        training.step()
        yield model[0].detach().numpy().copy()


def steps_of_flax(module, settings, start, gradients):
    optax, jnp = load("optax"), load("jax.numpy")
    optimizer = module.build_optimizer(settings, len(gradients))
    weights = jnp.array(start)
    state = optimizer.init(weights)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.array(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
        yield np.asarray(weights)


def steps_of_keras(module, settings, start, gradients):
    keras = load("keras")
    variable = keras.Variable(start)
    optimizer = module.build_optimizer(settings)
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        yield keras.ops.convert_to_numpy(variable).copy()


STEPS_OF = {"torch": steps_of_torch, "flax": steps_of_flax, "keras": steps_of_keras}


def steps_by_hand(name, start, gradients, rate, decay):
    """Of Adam, AdamW and SGD as their papers have them."""
    weights, first, second = start.astype(float), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        if name == "adamw":
            weights = weights - rate * decay * weights
        else:
            gradient = gradient + decay * weights
        if name == "sgd":
            first = 0.9 * first + gradient
            weights = weights - rate * (gradient + 0.9 * first)
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 1e-3 * gradient**2
            scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            weights = weights - rate * first / (1 - 0.9**step) / scale
        yield weights


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_are_the_same_everywhere(framework, name):
    of, module = framework
    rng = np.random.default_rng(0)
    start = rng.normal(size=5).astype(np.float32)
    gradients = rng.normal(size=(6, 5)).astype(np.float32)
    settings = recipe(f"--optimizer {name} --learning-rate 0.1 --weight-decay 0.3")
    found = list(STEPS_OF[of](module, settings, start, gradients))
    expected = list(steps_by_hand(name, start, gradients, rate=0.1, decay=0.3))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def clipped(gradient, longest):
    return gradient * min(1, longest / np.linalg.norm(gradient))


def test_a_long_gradient_is_clipped_alike_everywhere(framework):
    """Before the weight decay, which is no part of it; a short one stays as it is."""
    of, module = framework
    rng = np.random.default_rng(0)
    start, gradients = (rng.normal(size=shape).astype(np.float32) for shape in (5, (6, 5)))
    gradients[3:] /= 100
    settings = recipe("--optimizer sgd --clip-norm 1 --learning-rate 0.1 --weight-decay 0.3")
    found = list(STEPS_OF[of](module, settings, start, gradients))
    short = [clipped(gradient, 1.0) for gradient in gradients]
    assert sum(np.allclose(a, b) for a, b in zip(short, gradients, strict=True)) == 3
    expected = list(steps_by_hand("sgd", start, short, rate=0.1, decay=0.3))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


# --- flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--warmup 3 --epochs 3",
            "--warmup must be less than --epochs 3, got 3; train for more epochs",
        ),
        (
            "--schedule cosine --decay-epochs 3",
            "--decay-epochs belongs to --schedule step, got --schedule cosine",
        ),
        (
            "--accumulate 3",
            "--batch-size must be a multiple of the 3 parts of --accumulate, got 32",
        ),
        ("--clip-norm 0", "argument --clip-norm: must be positive and finite, got 0.0"),
        (
            "--schedule constant --decay-factor 0.3",
            "--decay-factor belongs to --schedule step, got --schedule constant",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe(flags)
    assert capsys.readouterr().err.endswith(f"error: {sentence}\n")


# --- a file


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--loss ce --label-smoothing 0.1",
        "--loss focal --class-weight none --gamma 0.5 --bf16",
        "--loss lmf --drw 3 --alpha 0.7",
        "--loss crt --head-epochs 4 --schedule cosine --optimizer sgd --imbalance 1e-05",
        "--image-size 32 --clip-norm 2.5 --mixup 0.3 --ema 0.99 --warmup 3 --early-stopping 7",
        "--weights a'b\"c/ü.pt --seed 4 --decay-epochs 3",
    ],
)
def test_what_a_run_writes_says_its_settings(flags, tmp_path):
    config = load("examples.training.config")
    settings = recipe(flags + " --out x")
    config.write(tmp_path, settings.flags())
    again = parse("torch", ["--config", str(tmp_path / "config.toml"), "--out", "x"], "")
    assert again == settings


def test_flags_replace_the_files(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('learning-rate = 0.5\nbatch_size = 8\nloss = "ce"\nbf16 = true\nresume = false')
    settings = recipe(f"--config {file} --batch-size 16 --no-bf16")
    assert (settings.learning_rate, settings.batch_size, settings.loss) == (0.5, 16, "ce")
    assert (settings.bf16, settings.resume) == (False, False)
    assert recipe(f"--batch-size 16 --config {file}").bf16 is True


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lerning_rate = 1", "{} has the key lerning_rate, which is no flag here; -h lists them"),
        ("learn = 1", "{} has the key learn, which is no flag here; -h lists them"),
        ('config = "x"', "{} has the key config, which is no flag here; -h lists them"),
        (
            "[training]\nepochs = 3",
            "{} has the key training, which is no flag here; -h lists them",
        ),
        ("epochs = [3]", "{} must have text, a number, true or false for epochs, got [3]"),
        ("epochs = ", "--config must be a TOML file, got {}: Invalid value"),
        ("epochs = 0", "argument --epochs: must be at least 1, got 0"),
        ('loss = "dice"', "argument --loss: invalid choice: 'dice'"),
        ("epochs = true", "argument --epochs: expected one argument"),
        ('bf16 = "yes"', "ignored explicit argument 'yes'"),
        ("gamma = 2\nloss = 'ce'", "--gamma belongs to focal, lmf, got --loss ce"),
        (None, "No such file or directory: '{}'"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(content, sentence, tmp_path, capsys):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        recipe(f"--config {file}")
    *_, last = capsys.readouterr().err.splitlines()
    assert sentence.format(file) in last and "error: " in last


@pytest.mark.parametrize("study", ["compare", "heads"])
def test_a_study_takes_no_file(study, tmp_path, capsys):
    load("jax")
    with pytest.raises(SystemExit, match="2"):
        load(f"examples.{study}").main(["--config=run.toml", "--out", str(tmp_path / "study")])
    assert "--config is one training's; give the study its flags" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


# --- whole runs

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
