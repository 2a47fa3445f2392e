"""Handwritten digits with a long tail, as NumPy arrays that every framework's demo shares."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

HEAD = 100  # training images of the most common digit; what is left of each class is the test split


@dataclass(frozen=True)
class Digits:
    """Images float32 (N, 8, 8, 1) in [0, 1], labels int64 (N,) in [0, 10)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """How every framework's demo trains on them, and the seed of its weights and batches."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def long_tail(num_classes: int, head: int, imbalance: float) -> np.ndarray:
    """Class counts that fall exponentially from `head` to `head / imbalance`: int64 (num_classes,).

    >>> long_tail(10, 100, 50)
    array([100,  65,  42,  27,  18,  11,   7,   5,   3,   2])
    """
    if not 1 <= imbalance <= head:
        raise ValueError(f"imbalance must be between 1 and {head}, got {imbalance}")
    share = np.arange(num_classes) / (num_classes - 1)
    return np.rint(head * imbalance**-share).astype(np.int64)


def load(imbalance: float = 50, seed: int = 0) -> Digits:
    """Scikit-learn's 1,797 real digits, of which zeros become common and nines rare in training.

    From each class `HEAD` images are drawn for training, then thinned to the long tail. The others
    are the test split, which keeps the balance of the data set: about 80 images a class.
    """
    bunch = load_digits()
    images = (bunch.images[..., np.newaxis] / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit, count in enumerate(long_tail(10, HEAD, imbalance)):
        members = rng.permutation(np.flatnonzero(bunch.target == digit))
        train.append(members[:count])
        test.append(members[HEAD:])
    train, test = np.concatenate(train), np.concatenate(test)
    return Digits(images[train], bunch.target[train], images[test], bunch.target[test])
