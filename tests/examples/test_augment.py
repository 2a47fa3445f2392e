"""Augmentation: what it does to an image, and that nothing but seed, epoch and image decides it."""

import json
import re

import numpy as np
import pytest

from examples.training.run import epoch_order
from examples.training.settings import parse
from tests.examples import trees
from tests.examples.test_trainers import (  # noqa: F401
    COMMON,
    INTERRUPTED,
    assert_same_run,
    jax_cache,
    run,
    trainer,
)
from tests.frameworks import load

SIZE = 16


@pytest.fixture(scope="module")
def data():
    """The trainers' data."""
    return trees.reader()


@pytest.fixture(scope="module")
def augment(data):
    """The module under test."""
    return load("examples.data.augment")


@pytest.fixture(scope="module")
def digits(data):
    return data.load("digits", image_size=SIZE)


def rows(augment, split, order, batch_size=8, workers=2, **about):
    """Images in their order, changed in batches."""
    chosen = augment.Augmentation(
        **{"kind": "standard", "seed": 0, "epoch": 0} | about, workers=workers
    )
    times = augment.times_before(order)
    batches = split.batches(order, batch_size)
    found = list(chosen.batches(batches, np.asarray(order), times, batch_size))
    images, labels = zip(*found, strict=True)
    assert all(len(b) == batch_size for b in images[:-1])
    np.testing.assert_array_equal(np.concatenate(labels), split.labels[order])
    return np.concatenate(images)


# --- what decides the pixels


@pytest.mark.parametrize("kind", ["flip", "standard"])
def test_pixels_are_the_same_whatever_the_batches_the_order_and_the_threads(augment, digits, kind):
    train, order = digits.train, np.arange(60)
    expected = rows(augment, train, order, kind=kind)
    assert expected.dtype == np.uint8 and expected.shape == (60, SIZE, SIZE, 3)
    shuffled = np.random.default_rng(0).permutation(60)
    for batch_size, workers in ((1, 1), (7, 3), (60, 2), (99, 5)):
        found = rows(augment, train, shuffled, batch_size, workers, kind=kind)
        np.testing.assert_array_equal(found, expected[shuffled])


def test_files_are_changed_as_arrays_are(augment, data, tmp_path, monkeypatch):
    trees.classes(tmp_path)
    order = np.arange(20)
    expected = rows(augment, data.load(tmp_path, 8).train, order)
    monkeypatch.setattr(data, "MEMORY_BUDGET", 0)
    train = data.load(tmp_path, 8).train
    assert not hasattr(train.images, "pixels")
    np.testing.assert_array_equal(rows(augment, train, order), expected)


def test_another_epoch_seed_image_or_time_draws_anew(augment, digits):
    train, order = digits.train, np.arange(40)
    first = rows(augment, train, order)
    for about in ({"epoch": 1}, {"seed": 1}):
        same = (rows(augment, train, order, **about) == first).all((1, 2, 3))
        assert same.mean() < 0.1
    again = rows(augment, train, np.repeat(order, 3)).reshape(40, 3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(again[:, 0], first)
    assert (again[:, 1] == first).all((1, 2, 3)).mean() < 0.1
    one = augment.Augmentation("standard", 0, 0, 1)
    image = train.images.pixels[0]
    changed = {one.one(image, index, 0).tobytes() for index in range(40)}
    assert len(changed) == 40


def test_times_before_are_counted(augment):
    order = np.random.default_rng(0).integers(0, 9, 200)
    expected = [(order[:i] == index).sum() for i, index in enumerate(order)]
    np.testing.assert_array_equal(augment.times_before(order), expected)


# --- what is done to them


def test_flip_mirrors_half_of_the_images_and_does_nothing_else(augment, digits):
    before = digits.train.images.pixels
    order = np.arange(len(before))
    after = rows(augment, digits.train, order, kind="flip")
    mirrored = (after == before[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (after == before).all((1, 2, 3))).all()
    np.testing.assert_allclose(mirrored.mean(), 0.5, atol=0.1)


def test_standard_shows_each_of_the_eight_symmetries_alike(augment, monkeypatch):
    for limit in ("SHIFT", "SCALE", "BRIGHTNESS", "CONTRAST"):
        monkeypatch.setattr(augment, limit, 0.0)
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    one = augment.Augmentation("standard", 0, 0, 1)
    found = [one.one(image, index, 0).tobytes() for index in range(800)]
    turned = [np.rot90(x, k) for k in range(4) for x in (image, image[:, ::-1])]
    counts = [found.count(x.tobytes()) for x in turned]
    assert sum(counts) == 800
    np.testing.assert_allclose(counts, 100, atol=35)


def test_shifts_and_scales_are_of_the_side_and_mirror_the_border(augment):
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None] * 10, (20, 20, 3))
    right = augment.shifted(ramp, np.array([0.1, 0.0]), 1.0)
    np.testing.assert_array_equal(right[:, 2:], ramp[:, :-2])
    np.testing.assert_array_equal(right[0, :3, 0], [20, 10, 0])
    down = augment.shifted(ramp.transpose(1, 0, 2), np.array([0.0, -0.1]), 1.0)
    np.testing.assert_array_equal(down[:-2], ramp.transpose(1, 0, 2)[2:])
    for scale in (0.9, 1.1):
        slope = np.diff(augment.shifted(ramp, np.zeros(2), scale)[10, 5:15, 0].astype(float))
        np.testing.assert_allclose(slope.mean(), 10 / scale, rtol=0.05)
    for shift in (-0.1, 0.1):  # the farthest corners
        for scale in (0.9, 1.1):
            assert augment.shifted(ramp, np.full(2, shift), scale).shape == ramp.shape


def test_brightness_and_contrast_stay_within_their_limits(augment):
    grey, halves = (np.full((SIZE, SIZE, 3), 128, np.uint8) for _ in range(2))
    halves[:, : SIZE // 2] = 28
    one = augment.Augmentation("standard", 0, 0, 1)
    means = np.array([one.one(grey, index, 0).mean() for index in range(300)])
    assert 102 <= means.min() < 106 and 150 < means.max() <= 154
    spread = np.array([np.ptp(one.one(halves, index, 0)) for index in range(300)])
    assert 89 <= spread.min() < 92 and 108 < spread.max() <= 111


# --- in a run


def begun(out, digits, *flags, group=None):
    """A run of three epochs on digits, before its first step."""
    run = load("examples.training.run")
    words = f"--epochs 3 --batch-size 32 --augment standard --out {out}".split()
    return run.Run(parse("torch", [*words, *flags], ""), digits, group or run.ALONE)


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_a_run_goes_on_with_the_pixels_that_it_would_have_had(tmp_path, digits, sampler):
    whole = begun(tmp_path, digits, "--sampler", sampler)
    expected = [images for images, _ in whole.train_batches()]
    order = epoch_order(digits.train.labels, 256, sampler=sampler, seed=0, epoch=0)
    by_image = rows(load("examples.data.augment"), digits.train, order, 32)
    np.testing.assert_array_equal(np.concatenate(expected), by_image)
    resumed = begun(tmp_path, digits, "--sampler", sampler, "--workers", "3")
    resumed.step = 3
    np.testing.assert_array_equal([x for x, _ in resumed.train_batches()], expected[3:])
    shares = []
    for rank in range(2):
        group = load("examples.training.run").Processes(rank, 2)
        one = begun(tmp_path, digits, "--sampler", sampler, group=group)
        shares.append([images for images, _ in one.train_batches()])
    both = np.stack(shares, 2).reshape(np.shape(expected))
    np.testing.assert_array_equal(both, expected)
    whole.epoch = 1
    assert not np.array_equal([x for x, _ in whole.train_batches()], expected)


def test_without_the_flag_images_are_as_they_are(tmp_path, digits):
    found = np.concatenate(
        [x for x, _ in begun(tmp_path, digits, "--augment", "none").train_batches()]
    )
    originals = {x.tobytes() for x in digits.train.images.pixels}
    assert {x.tobytes() for x in found} <= originals


def test_a_stopped_run_ends_as_one_that_was_not(trainer, tmp_path):  # noqa: F811
    arguments = [*COMMON, "--epochs", "2", "--augment", "standard", "--image-size", "16"]
    done = run(trainer, *arguments, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    other = [*arguments, "--out", tmp_path / "run"]
    stopped = run(trainer, trainer, "epoch 2 step 3", "SIGINT", *other, code=INTERRUPTED)
    assert stopped.returncode == 130, stopped.stderr
    assert re.search(r"Stopped and saved after epoch 1 of 2, step \d of 8", stopped.stdout)
    done = run(trainer, *other, "--resume", "--workers", "3")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["augment"] == "standard"


def test_augmentation_decides_the_numbers_of_a_run():
    alike = [parse("torch", ["--augment", kind], "").trained_alike() for kind in ("flip", "none")]
    assert [found["augment"] for found in alike] == ["flip", None]
    assert parse("torch", [], "").trained_alike() == alike[1]


def test_validation_and_test_images_stay_as_they_are(tmp_path, digits):
    """The kept logits are those that the model gives of the stored pixels."""
    torch, models = load("torch"), load("examples.models.torch")
    out = tmp_path / "run"
    words = f"--epochs 1 --image-size {SIZE} --augment standard --out {out}".split()
    assert load("examples.train_torch").main(words) == 0
    weights = out / "checkpoints" / "00001-0000000" / "checkpoint.pt"
    model = models.build("small", 10, weights=weights).eval()
    kept = np.load(out / "predictions.npz")
    for split, name in ((digits.val, "val_logits"), (digits.test, "logits")):
        (images, _), *_ = split.batches(np.arange(len(split)), len(split))
        with torch.no_grad():
            logits = model(models.normalize(torch.from_numpy(images)))
        np.testing.assert_allclose(kept[name], logits, rtol=1e-4, atol=1e-4)
