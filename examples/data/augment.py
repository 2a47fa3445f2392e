"""Training images changed at random, on the host: every framework gets the same pixels.

What is drawn depends on the seed, the epoch and the image alone, not on its batch, on the process
or the thread that changes it, or on how often a run was stopped. An image that an epoch has several
times, as a balanced sampler draws rare classes, is changed anew each time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from examples.data.images import BATCHES_AHEAD, ordered_map

SHIFT, SCALE = 0.1, 0.1  # at most, of the image's side, and from 1
BRIGHTNESS, CONTRAST = 0.1, 0.1  # at most, of white, and from 1
STREAM = 2  # sets these draws apart from others of the same seed and epoch
Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right exchanged, or not: uint8 (S, S, 3)."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def standard(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flipped and turned by quarters, shifted, scaled, brighter or darker, of other contrast."""
    turned = Image.fromarray(image)
    if way := rng.integers(1 + len(Image.Transpose)):  # each of a square's eight symmetries
        turned = turned.transpose(tuple(Image.Transpose)[way - 1])
    shift, scale = rng.uniform(-SHIFT, SHIFT, 2), rng.uniform(1 - SCALE, 1 + SCALE)
    image = shifted(np.asarray(turned), shift, scale)
    brightness, contrast = rng.uniform(-1, 1, 2) * (BRIGHTNESS, CONTRAST)
    mean = image.mean(dtype=np.float64)  # of whole numbers, so the same in any order
    tones = (np.arange(256) - mean) * (1 + contrast) + mean + 255 * brightness
    return np.clip(np.rint(tones), 0, 255).astype(np.uint8).take(image)


def shifted(image: np.ndarray, shift: np.ndarray, scale: float) -> np.ndarray:
    """The image scaled about its centre and shifted; its border is mirrored.

    Args:
        image: uint8 (S, S, 3).
        shift: to the right and down, of the side, at most `SHIFT`.
        scale: of what is shown, 1 at least less `SCALE`.
    """
    size = len(image)
    side = size / scale
    margin = 1 + int(size * (SHIFT + (1 / (1 - SCALE) - 1) / 2))  # what the largest ones reach
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    left, top = margin + (size - side) / 2 - size * shift
    box = (left, top, left + side, top + side)
    shown = Image.fromarray(padded).resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(shown)


AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "flip": flip,
    "standard": standard,
}


@dataclass(frozen=True)
class Augmentation:
    """What changes the images of an epoch: one of `AUGMENTATIONS`, in so many threads."""

    kind: str
    seed: int
    epoch: int
    workers: int

    def one(self, image: np.ndarray, index: int, time: int) -> np.ndarray:
        """An image uint8 (S, S, 3) of the training split, changed.

        Args:
            image: its pixels.
            index: of the image in its split.
            time: how often the epoch has had it before.
        """
        rng = np.random.default_rng([self.seed, self.epoch, index, time, STREAM])
        return AUGMENTATIONS[self.kind](image, rng)

    def batches(self, batches: Batches, order: np.ndarray, times: np.ndarray, size: int) -> Batches:
        """The same batches, `size` images each, with their images changed.

        Args:
            batches: images uint8 (b, S, S, 3) with labels, closed with this iterator.
            order: int (M,), which images they are of.
            times: int (M,), how often the epoch has had each before.
            size: the largest b.
        """
        labels: list[np.ndarray] = []

        def items() -> Iterator[tuple[np.ndarray, int, int]]:
            keys = zip(order.tolist(), times.tolist(), strict=True)
            for images, of_these in batches:
                labels.append(of_these)
                yield from ((image, *key) for image, key in zip(images, keys, strict=False))

        changed = ordered_map(
            lambda item: self.one(*item), items(), workers=self.workers, ahead=BATCHES_AHEAD * size
        )
        with closing(batches), closing(changed):
            while images := list(islice(changed, size)):
                yield np.stack(images), labels.pop(0)


def times_before(order: Sequence[int] | np.ndarray) -> np.ndarray:
    """How often each index was there before: int64 (M,).

    >>> times_before([3, 5, 3, 3, 5])
    array([0, 0, 1, 2, 1])
    """
    order = np.asarray(order)
    by_index = np.argsort(order, kind="stable")
    _, first, counts = np.unique(order[by_index], return_index=True, return_counts=True)
    times = np.empty(len(order), np.int64)
    times[by_index] = np.arange(len(order)) - np.repeat(first, counts)
    return times
