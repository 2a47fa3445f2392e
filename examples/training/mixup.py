"""Mixup: training on weighted means of two images and of their labels."""

from collections.abc import Sequence

import numpy as np

WORD = 1710_09412  # sets these draws apart from others of the same step


def mix(
    images: np.ndarray, labels: np.ndarray, num_classes: int, alpha: float, words: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Each image of a batch with another one of it, all in one proportion.

    Args:
        images: uint8 (b, S, S, 3).
        labels: integer (b,).
        num_classes: C.
        alpha: of the symmetric beta distribution that the proportion is drawn from; positive.
        words: what the draws follow from, such as seed, epoch and step.

    Returns:
        Images uint8 of that shape, rounded, and distributions float32 (b, C).

    Source: Zhang et al., arXiv 1710.09412; as in the authors' code one proportion a batch.
    """
    rng = np.random.default_rng([*words, WORD])
    share, other = np.float32(rng.beta(alpha, alpha)), rng.permutation(len(labels))
    one_hot = np.eye(num_classes, dtype=np.float32)[labels]
    # a difference of at most half a grey value, for a quarter of the bytes to the device
    pixels = np.rint(share * images + (1 - share) * images[other]).astype(np.uint8)
    return pixels, share * one_hot + (1 - share) * one_hot[other]
