"""The trainers' data: digits, arrays, the real HAM10000, and batches of them."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.examples import trees
from tests.examples.trees import SPLITS, whole
from tests.frameworks import load

HAM10000 = Path(__file__).parents[3] / "shared/data/ham10000"


@pytest.fixture(scope="module")
def data():
    """The module under test."""
    return trees.reader()


# --- digits and arrays


def test_digits_are_long_tailed_in_training_only(data):
    digits = data.load("digits", imbalance=50)
    assert (digits.name, digits.image_size, len(digits.class_names)) == ("digits", 28, 10)
    np.testing.assert_array_equal(digits.class_counts, [100, 65, 42, 27, 18, 11, 7, 5, 3, 2])
    val, test = (np.bincount(split.labels) for split in (digits.val, digits.test))
    assert val.sum() + test.sum() == 1797 - 1000
    assert np.abs(val - test).max() <= 1


def test_digits_have_their_pixels_and_are_in_one_split_each(data):
    digits = data.load("digits", image_size=8)
    bunch = load("sklearn.datasets").load_digits()
    originals = {
        (np.rint(x * 255 / 16).astype(np.uint8).tobytes(), y)
        for x, y in zip(bunch.images, bunch.target, strict=True)
    }
    found = []
    for name in SPLITS:
        images, labels = whole(getattr(digits, name))
        np.testing.assert_array_equal(images, np.repeat(images[..., :1], 3, axis=-1))
        found += [(x[..., 0].tobytes(), y) for x, y in zip(images, labels, strict=True)]
    assert len(found) == len(set(found)) == 1797 - 1000 + 280
    assert originals.issuperset(found)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_medmnist_arrays_arrive_as_they_are(data, tmp_path, shape):
    file = trees.medmnist(tmp_path / "bloodmnist.npz", shape)
    dataset = data.load(file)
    assert (dataset.name, dataset.image_size) == ("bloodmnist", 28)
    assert dataset.class_names == ("0", "1", "2")
    stored = np.load(file)
    for name in SPLITS:
        images, labels = whole(getattr(dataset, name))
        expected = stored[f"{name}_images"].reshape(30, 28, 28, -1)
        np.testing.assert_array_equal(images, np.broadcast_to(expected, (30, 28, 28, 3)))
        np.testing.assert_array_equal(labels, np.arange(30) % 3)
        assert labels.dtype == np.int64
        assert getattr(dataset, name).ids[17] == f"{name}-17"


def test_medmnist_arrays_are_resized_and_scaled_to_8_bits(data, tmp_path):
    constant = np.full((30, 64, 48), 0x4DFF, np.uint16)
    changes = {f"{name}_images": constant for name in SPLITS}
    images, _ = whole(data.load(trees.medmnist(tmp_path / "x.npz", **changes), 32).train)
    np.testing.assert_array_equal(images, np.full((30, 32, 32, 3), 0x4D))


LABELS = np.arange(30) % 3


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"val_labels": None}, ValueError, "must have the key val_labels, got train_images, "),
        ({"test_images": np.zeros((30, 28, 28))}, TypeError, "uint8 or uint16, got float64"),
        (
            {"train_images": np.zeros((30, 28, 28, 28), np.uint8)},
            ValueError,
            r"got \(30, 28, 28, 28",
        ),
        ({"val_images": np.zeros((0, 28, 28), np.uint8)}, ValueError, "must not be empty"),
        ({"val_images": np.zeros((30, 9, 9), np.uint8)}, ValueError, r"got \(9, 9\)"),
        ({"train_labels": LABELS[1:]}, ValueError, "same length, got 30 and 29"),
        ({"train_labels": LABELS + 1}, ValueError, r"without a gap, got \[1, 2, 3\]"),
        ({"train_labels": LABELS * 0.5}, TypeError, "must be integers, got float64"),
        ({"val_labels": LABELS + 1}, ValueError, "val_labels .* 0 to 2, got 3"),
        ({"val_labels": np.zeros((30, 14), np.uint8)}, ValueError, "multi-label data are not"),
        ({"val_labels": LABELS.astype(object)}, ValueError, "archive of arrays, got Object arrays"),
        ({f"{name}_labels": LABELS * 0 for name in SPLITS}, ValueError, "at least 2 classes, got"),
    ],
)
def test_arrays_that_are_amiss_are_one_sentence(data, tmp_path, changes, kind, sentence):
    with pytest.raises(kind, match=sentence):
        data.load(trees.medmnist(tmp_path / "x.npz", **changes))


def test_archives_that_are_none_are_one_sentence(data, tmp_path):
    file = trees.medmnist(tmp_path / "x.npz")
    whole_file = file.read_bytes()
    for content in (b"", b"no archive", whole_file[:2000], whole_file[:300] + whole_file[400:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz must be a NumPy \.npz archive of arrays"):
            data.load(file)
    with open(file, "wb") as one_array:
        np.save(one_array, LABELS)
    with pytest.raises(ValueError, match=r"x\.npz must be a NumPy \.npz archive of arrays"):
        data.load(file)
    file = trees.medmnist(tmp_path / "flat.npz", (28, 14))
    with pytest.raises(ValueError, match="must be square, got 28×14; --image-size squeezes them"):
        data.load(file)
    with pytest.raises(ValueError, match="image_size must be at least 8, got 6"):
        data.load(trees.medmnist(tmp_path / "tiny.npz", (6, 6)))


# --- settings


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({"image_size": 4}, ValueError, "image_size must be at least 8, got 4"),
        ({"image_size": 0}, ValueError, "image_size must be at least 8, got 0"),
        ({"image_size": 28.0}, TypeError, "image_size must be a whole number, got 28.0"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"split_seed": -1}, ValueError, "split_seed must be at least 0, got -1"),
        ({"imbalance": 0.5}, ValueError, "imbalance must be between 1 and 100, got 0.5"),
    ],
)
def test_bad_settings_are_one_sentence(data, settings, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        data.load("digits", **settings)


# --- batches


@pytest.mark.parametrize("budget", [0, 2**31])
def test_batches_follow_the_order_whatever_the_memory(data, tmp_path, monkeypatch, budget):
    monkeypatch.setattr(data, "MEMORY_BUDGET", budget)
    train = data.load(trees.folders(tmp_path), 8).train
    assert hasattr(train.images, "pixels") == bool(budget)
    order = np.random.default_rng(0).integers(0, len(train), 33)
    batches = list(train.batches(order, 8))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 1]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), train.labels[order])
    for images, labels in batches:
        assert images.shape == (len(labels), 8, 8, 3) and images.dtype == np.uint8
        np.testing.assert_array_equal(images[:, 0, 0, 0], 20 * labels)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(train.batches(order, 0))


# --- the real thing


@pytest.mark.skipif(not HAM10000.exists(), reason="HAM10000 is not there")
def test_ham10000_itself(data):
    """Counts from its README; the README's val is test here, and a tenth of its train is val."""
    dataset = data.load(HAM10000, 16)
    assert dataset.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    train, val, test = (np.bincount(getattr(dataset, name).labels) for name in SPLITS)
    np.testing.assert_array_equal(train + val, [229, 360, 770, 80, 779, 4693, 99])
    np.testing.assert_array_equal(test, [33, 51, 109, 11, 111, 671, 14])
    np.testing.assert_allclose(val, (train + val) / 10, atol=1)
    lesion = {r["image_id"]: r["lesion_id"] for r in trees.read(HAM10000 / trees.HAM_TABLE)}
    lesions = [{lesion[i] for i in getattr(dataset, name).ids} for name in SPLITS]
    assert lesions[0].isdisjoint(lesions[1]) and lesions[2].isdisjoint(lesions[0] | lesions[1])
