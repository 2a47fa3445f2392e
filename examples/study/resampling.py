"""How sure a difference is: test images and seeds drawn anew, the same ones for both losses.

Predictions of several seeds for the same images vary with both, so both are drawn with replacement,
apart from each other (Owen, The pigeonhole bootstrap, 2007): the interval is of what other seeds
and other images like these would give, and rather too wide than too narrow.
"""

from functools import cache, lru_cache

import numpy as np

RESAMPLES = 2000


def score(name: str, found: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    """A score of classifications that are counted by class, as ``results.scores`` has it: (…).

    Args:
        name: ``macro_f1``, ``balanced_accuracy`` or ``accuracy``.
        found: (…, C), images of each class that were predicted to be of it.
        said: (…, C), images that were predicted to be of each class.
        there: (…, C), images of each class.
    """
    if name == "macro_f1":
        return (2 * found / np.maximum(said + there, 1)).mean(-1)
    if name == "balanced_accuracy":
        return (found / np.maximum(there, 1)).sum(-1) / (there > 0).sum(-1)
    return found.sum(-1) / there.sum(-1)


def resampled(
    name: str, labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, num_classes: int
) -> np.ndarray:
    """What ``RESAMPLES`` draws make of our score less theirs: (RESAMPLES,).

    Args:
        name: of the score.
        labels: int (N,), of the test images.
        ours, theirs: int (S, N), predicted classes; a row a seed, the same seed in both.
        num_classes: C.
    """
    of_seeds = draws(len(labels), len(ours))[1]
    kept = (as_bytes(labels), num_classes)
    mine, other = (scores_of_draws(name, *kept, as_bytes(each)) for each in (ours, theirs))
    return ((mine - other) * of_seeds).sum(1)


def as_bytes(integers: np.ndarray) -> bytes:
    """What a cache tells arrays by."""
    return integers.astype(np.int64).tobytes()


@lru_cache(maxsize=256)  # each loss is compared by several tables and figures
def scores_of_draws(name: str, labels: bytes, num_classes: int, predicted: bytes) -> np.ndarray:
    """The score of each draw of images and each seed: (RESAMPLES, S)."""
    true = np.frombuffer(labels, np.int64)
    rows = np.frombuffer(predicted, np.int64).reshape(-1, len(true))
    images, _ = draws(len(true), len(rows))
    true, said = one_hot(true, num_classes), one_hot(rows, num_classes)  # (N, C), (S, N, C)
    counts = (np.einsum("rn,snc->rsc", images, x, optimize=True) for x in (said * true, said))
    return score(name, *counts, (images @ true)[:, None])


@cache
def draws(images: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each image is drawn, (RESAMPLES, images), and the share of each seed."""
    rng = np.random.default_rng(0)
    drawn = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in (images, seeds))
    often, shares = (counts.astype(np.float32) for counts in drawn)  # whole up to 2²⁴
    return often, shares / seeds


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Of int (…), float32 (…, C)."""
    return np.eye(num_classes, dtype=np.float32)[classes]
