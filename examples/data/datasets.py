"""Images and labels for every trainer, from `--data`, as NumPy arrays that are read in batches."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from examples.data import digits, findings, layouts, medmnist, tables
from examples.data.images import ImageArray, ImageFiles, read_all, resize
from examples.data.listings import SPLITS
from examples.data.splits import assign, deal

MEMORY_BUDGET = 2 * 2**30  # bytes of decoded images, all splits together, that are kept in memory
DIGITS_SIZE, FILES_SIZE = 28, 224  # pixels, unless others are asked for
SOURCES = "digits, a .npz file with MedMNIST's keys, a .csv table or a folder of images"


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, with str (N,) identifiers and int64 (N,) labels; of findings (N, L)."""

    ids: np.ndarray
    labels: np.ndarray
    images: ImageArray | ImageFiles  # of all splits
    rows: np.ndarray  # int64 (N,), which of them are of this one

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def whole_batches(self, batch_size: int) -> np.ndarray:
        """All indices, int64, the last one again until it fills up the last batch.

        So nothing is compiled a second time, for a smaller batch.
        """
        return np.pad(np.arange(len(self)), (0, -len(self) % batch_size), mode="edge")

    def batches(
        self, order: Sequence[int] | np.ndarray, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Consecutive pieces of `order`: uint8 (b, S, S, 3), RGB, and int64 (b,) or (b, L).

        Image files are decoded in threads a few batches ahead; closing the iterator ends them. The
        last batch may be smaller than the others.

        Args:
            order: int (M,), indices into the split, in any order.
            batch_size: at least 1.
        """
        check_at_least(1, batch_size=batch_size)
        order = np.asarray(order, np.int64)
        pieces = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        with closing(self.images.batches([self.rows[piece] for piece in pieces])) as batches:
            for images, piece in zip(batches, pieces, strict=True):
                yield images, self.labels[piece]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one dataset."""

    name: str
    class_names: tuple[str, ...]  # in label order, or the findings'
    image_size: int  # pixels, height and width of every batch
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()  # sentences on how the data were split and what was left out

    def __post_init__(self) -> None:
        """Raise ValueError if there is nothing to tell apart, or a split or a class is empty."""
        if len(self.class_names) < 2 and not self.has_findings:
            raise ValueError(f"data must have at least 2 classes, got {self.class_names}")
        for split in SPLITS:
            if len(getattr(self, split)) == 0:
                raise ValueError(f"{split} must have at least one readable image, got none")
        if self.has_findings:
            findings.check(self.class_names, self.class_counts)
            if not (self.val.labels == 1).any():
                raise ValueError("val must have an image with a finding to choose by, got none")
            return
        for name, count in zip(self.class_names, self.class_counts, strict=True):
            if count == 0:
                raise ValueError(f"class {name!r} must have a readable image in train, got none")

    @property
    def has_findings(self) -> bool:
        """Whether an image may have several, or none, instead of one class."""
        return self.train.labels.ndim == 2

    @property
    def class_counts(self) -> np.ndarray:
        """Training images of each class: int64 (C,); without and with each finding: (L, 2)."""
        if self.has_findings:
            return findings.counts(self.train.labels)
        return np.bincount(self.train.labels, minlength=len(self.class_names))


def load(
    source: str | Path,
    image_size: int | None = None,
    *,
    imbalance: float = 50.0,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    columns: tables.Columns = tables.USUAL,
    workers: int = 2,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Dataset:
    """Read a dataset, and decode each image file once, before anything is computed with it.

    Args:
        source: "digits", a .npz file with MedMNIST's keys, a .csv table as in `tables`, or a folder
            as in `layouts`.
        image_size: pixels, at least 8; by default 28 for digits, a .npz file's own, else 224.
        imbalance: training images of digit 0 to those of digit 9, from 1 to 100.
        split_seed: alone decides on the splits that do not come with the data.
        skip_unreadable: leave out files that are missing or cannot be decoded, and note how many.
        columns: what those of a table are called, and whether an image has findings.
        workers: threads that decode.
        on_progress: called with the numbers of files that are decoded, and that there are.

    Raises:
        FileNotFoundError: the source, or an image that it lists, is not there.
        ValueError: the source has no known layout, or an image cannot be read.
        TypeError: arrays have wrong dtypes.
    """
    check_at_least(8, image_size=FILES_SIZE if image_size is None else image_size)
    check_at_least(1, workers=workers)
    check_at_least(0, split_seed=split_seed)
    if columns.findings and not (Path(source).is_dir() or tables.is_table(source)):
        raise ValueError(f"--findings belongs to a table or to ODIR-5K, got {source}")
    if source == "digits":
        return _digits(image_size or DIGITS_SIZE, imbalance, split_seed)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data must be {SOURCES}, got {path}, which does not exist")
    if path.is_dir() or tables.is_table(path):
        return _files(
            layouts.read(path, columns.findings) if path.is_dir() else tables.read(path, columns),
            image_size or FILES_SIZE,
            split_seed=split_seed,
            skip_unreadable=skip_unreadable,
            workers=workers,
            on_progress=on_progress,
        )
    if path.suffix.lower() != ".npz":
        raise ValueError(f"data must be {SOURCES}, got the file {path}")
    return _npz(path, image_size)


def check_at_least(least: int, **values: int) -> None:
    """Raise TypeError for what is no whole number, ValueError for what is less than `least`."""
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be a whole number, got {value!r}") from None
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _digits(image_size: int, imbalance: float, split_seed: int) -> Dataset:
    found = digits.load(imbalance, split_seed)
    rest = found.test_labels
    tested = deal(rest, np.arange(len(rest)), (0.5, 0.5), split_seed) == 1
    pixels = {
        "train": found.train_images,
        "val": found.test_images[~tested],
        "test": found.test_images[tested],
    }
    images = {split: np.rint(255 * x[..., 0]).astype(np.uint8) for split, x in pixels.items()}
    labels = {"train": found.train_labels, "val": rest[~tested], "test": rest[tested]}
    note = f"Digit 0 has {imbalance:g} times the training images of digit 9; val and test do not."
    return _arrays("digits", images, labels, image_size, (note,))


def _npz(file: Path, image_size: int | None) -> Dataset:
    images, labels = medmnist.read(file)
    height, width = images["train"].shape[1:3]
    if image_size is None and height != width:
        raise ValueError(
            f"images of {file} must be square, got {height}×{width}; --image-size squeezes them"
        )
    if image_size is None:
        check_at_least(8, image_size=height)
    return _arrays(file.stem, images, labels, image_size or height)


def _arrays(
    name: str,
    images: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    image_size: int,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Of images uint8 (N, H, W) or (N, H, W, 3) in each split; classes are called by number."""
    made = {}
    for split in SPLITS:
        rows = np.arange(len(labels[split]))
        ids = np.array([f"{split}-{row}" for row in rows])
        pixels = ImageArray(_square_rgb(images[split], image_size))
        made[split] = Split(ids, labels[split], pixels, rows)
    class_names = tuple(str(label) for label in range(labels["train"].max() + 1))
    return Dataset(name, class_names, image_size, **made, notes=notes)


def _square_rgb(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, size, size, 3)."""
    if images.shape[1:3] != (size, size):
        images = np.stack([resize(Image.fromarray(image), size) for image in images])
    return images if images.ndim == 4 else np.stack([images] * 3, axis=-1)


def _files(
    listing: layouts.Listing,
    image_size: int,
    *,
    split_seed: int,
    skip_unreadable: bool,
    workers: int,
    on_progress: Callable[[int, int], object],
) -> Dataset:
    split, how = assign(listing, split_seed)
    paths = [example.path for example in listing.examples]
    missing = [path for path in paths if not path.exists()]
    if missing and not skip_unreadable:
        raise FileNotFoundError(
            f"each listed image must be on disk, got {len(missing)} of {len(paths)} missing, the "
            f"first {missing[0].name}; --skip-unreadable leaves such files out"
        )
    images, readable = read_all(
        paths,
        image_size,
        workers=workers,
        keep=len(paths) * image_size**2 * 3 <= MEMORY_BUDGET,
        skip_unreadable=skip_unreadable,
        on_progress=on_progress,
    )
    notes = (*listing.notes, how)
    if left_out := np.sum(~readable):
        notes += (
            f"Left out: {left_out} images that cannot be read, {len(missing)} of them missing.",
        )
    ids, labels = np.array([example.id for example in listing.examples]), listing.labels
    made = {}
    for name in SPLITS:  # an image that is left out moves no other to another split
        rows = np.flatnonzero((split == name) & readable)
        made[name] = Split(ids[rows], labels[rows], images, rows)
    return Dataset(listing.name, listing.class_names, image_size, **made, notes=notes)
