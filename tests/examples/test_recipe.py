"""The recipe's own parts: rates, optimisers and flags are the same in three frameworks."""

from types import SimpleNamespace

import numpy as np
import pytest

from examples.training.settings import parse
from tests.examples.test_trainers import NEEDS, SHARED
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
        (None, "--config must be a TOML file, got {}: No such file or directory"),
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
