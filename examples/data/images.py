"""Images as square uint8 RGB: decoded in threads, in order, a bounded number of them ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

T = TypeVar("T")
R = TypeVar("R")

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
BATCHES_AHEAD = 4  # decoded while the consumer works on one


class UnreadableImage(ValueError):
    """A file that holds no whole image."""


def decode(path: Path, size: int) -> np.ndarray:
    """A file's image as uint8 (size, size, 3), RGB; the whole image, squeezed to a square.

    Raises:
        UnreadableImage: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            # libjpeg halves while it decodes, to twice the size at least; no other format does
            image.draft(None, (2 * size, 2 * size))
            return resize(rgb(image), size)
    except Exception as error:  # malformed bytes make Pillow's decoders raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else error
        raise UnreadableImage(
            f"truncated or unreadable image {path} ({reason}); "
            "--skip-unreadable leaves such files out"
        ) from error


def rgb(image: Image.Image) -> Image.Image:
    """The same picture in 8-bit RGB; transparent pixels get the colour that is stored for them."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        image = Image.fromarray(high_byte(np.asarray(image)))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def high_byte(pixels: np.ndarray) -> np.ndarray:
    """Scale 16 bits to 8 as Pillow scales 16-bit colour: uint8 of the same shape."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels have more than 16 bits")
    return (pixels >> 8).astype(np.uint8)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Bilinear, antialiased where it shrinks: uint8 (size, size, 3), or (size, size) if grey."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Iterator[R]:
    """`map` in threads, in order, of at most `ahead` items before their results are asked for.

    Closing the iterator drops what has not begun, and joins the threads.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ImageArray:
    """Images in memory: uint8 (N, S, S, 3)."""

    pixels: np.ndarray

    def batches(self, pieces: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """For each array of b indices, uint8 (b, S, S, 3)."""
        for piece in pieces:
            yield self.pixels[piece]


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, decoded each time they are asked for, by `workers` threads."""

    paths: Sequence[Path]
    size: int
    workers: int

    def batches(self, pieces: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """For each array of b indices, uint8 (b, S, S, 3), decoded `BATCHES_AHEAD`."""
        paths = (self.paths[i] for piece in pieces for i in piece)
        ahead = BATCHES_AHEAD * max(map(len, pieces), default=0)
        decoded = ordered_map(
            partial(decode, size=self.size), paths, workers=self.workers, ahead=ahead
        )
        with closing(decoded):
            for piece in pieces:
                yield np.stack(list(islice(decoded, len(piece))))


def read_all(
    paths: Sequence[Path],
    size: int,
    *,
    workers: int,
    keep: bool,
    skip_unreadable: bool,
    on_progress: Callable[[int, int], object],
) -> tuple[ImageArray | ImageFiles, np.ndarray]:
    """Decode every file once: the images, kept in memory or not, and which are readable.

    Returns:
        The images, in the order of `paths`, and bool (N,), all true unless `skip_unreadable`.

    Raises:
        UnreadableImage: for the first such file, unless `skip_unreadable`.
    """
    pixels = np.empty((len(paths) if keep else 0, size, size, 3), np.uint8)
    readable = np.ones(len(paths), bool)
    check = partial(_decode_or_error, size=size)
    with closing(ordered_map(check, paths, workers=workers, ahead=16 * workers)) as results:
        for i, result in enumerate(results):
            if isinstance(result, UnreadableImage):
                if not skip_unreadable:
                    raise result
                readable[i] = False
            elif keep:
                pixels[i] = result
            on_progress(i + 1, len(paths))
    return ImageArray(pixels) if keep else ImageFiles(paths, size, workers), readable


def _decode_or_error(path: Path, size: int) -> np.ndarray | UnreadableImage:
    try:
        return decode(path, size)
    except UnreadableImage as error:
        return error
