"""Features of a frozen network, which heads are trained on: computed once, or read from a file.

A file is a NumPy ``.npz`` archive of ``X`` float (N, D), ``y`` integer (N,) and ``split`` str (N,)
of train, val and test; ``ids`` and ``class_names``, str (N,) and (C,), may be there too.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.data.datasets import Dataset, Split
from examples.data.images import ImageArray
from examples.data.listings import SPLITS
from examples.data.medmnist import MALFORMED
from examples.training.checkpoints import write_atomically

KEYS = ("X", "y", "split")
SHARD = 128  # examples whose features are written together, so at most so many are lost


@dataclass(frozen=True, eq=False)
class Features:
    """Of a dataset: float32 (N, D), with int64 (N,) labels, str (N,) splits and identifiers."""

    name: str
    class_names: tuple[str, ...]  # in label order
    X: np.ndarray
    y: np.ndarray
    split: np.ndarray
    ids: np.ndarray

    @property
    def class_counts(self) -> np.ndarray:
        """Training examples of each class: int64 (C,)."""
        return np.bincount(self.labels("train"), minlength=len(self.class_names))

    def labels(self, split: str) -> np.ndarray:
        """Int64 (n,) of one split."""
        return self.y[self.split == split]

    def standardized(self) -> dict[str, np.ndarray]:
        """Float32 (n, D) by split, in training each feature of mean 0, all of them of deviation 1.

        A deviation each would blow up those of a network that are nearly always off.
        """
        train = self.X[self.split == "train"].astype(np.float64)
        mean = train.mean(0)
        X = ((self.X - mean) / ((train - mean).std() or 1.0)).astype(np.float32)
        return {name: X[self.split == name] for name in SPLITS}


def is_features(source: str | Path) -> bool:
    """Whether ``--data`` names a file of features; another .npz file has MedMNIST's keys."""
    path = Path(source)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return not any(key.startswith("train_") for key in archive)
    except MALFORMED:
        return False  # whose reader says so


def read(file: Path, name: str | None = None) -> Features:
    """The features that a file holds; they are called by its name unless another is given.

    Raises:
        ValueError: the file is no such archive, a key is missing, or shapes or values are wrong.
        TypeError: features or labels have wrong dtypes.
    """
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = dict(archive)
    except MALFORMED as error:
        raise ValueError(f"{file} must be a NumPy .npz archive of arrays, got {error}") from error
    for key in KEYS:
        if key not in arrays:
            raise ValueError(f"{file} must have the key {key}, got {', '.join(arrays) or 'none'}")
    X, y, split = (arrays[key] for key in KEYS)
    if X.dtype.kind != "f":
        raise TypeError(f"X must be float, got {X.dtype}")
    if y.dtype.kind not in "iu":
        raise TypeError(f"y must be integers, got {y.dtype}")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must have shape (N, D), got {X.shape}")
    ids = arrays.get("ids", np.array([f"row-{i}" for i in range(len(X))]))
    for key, values in {"y": y, "split": split, "ids": ids}.items():
        if values.shape != X.shape[:1]:
            raise ValueError(f"{key} must have shape {X.shape[:1]}, as X, got {values.shape}")
    if not np.isfinite(X).all():
        row = np.flatnonzero(~np.isfinite(X).all(1))[0]
        raise ValueError(f"X must be finite, got {X[row][~np.isfinite(X[row])][0]} in row {row}")
    split = split.astype(str)
    if unknown := sorted(set(split) - set(SPLITS)):
        raise ValueError(f"split must be of {', '.join(SPLITS)}, got '{unknown[0]}'")
    for each in SPLITS:
        if each not in split:
            raise ValueError(f"split must have {each}, got {', '.join(sorted(set(split)))} alone")
    names = arrays.get("class_names", np.arange(max(2, y.max() + 1))).astype(str)
    if y.min() < 0 or y.max() >= len(names):
        raise ValueError(
            f"y must be at least 0 and below the {len(names)} classes, got {y.min()} to {y.max()}"
        )
    y = y.astype(np.int64)
    found = Features(name or file.stem, tuple(names.tolist()), X.astype(np.float32), y, split, ids)
    for label, count in zip(names, found.class_counts, strict=True):
        if count == 0:
            raise ValueError(f"class {str(label)!r} must have an example in train, got none")
    return found


def of_images(
    dataset: Dataset,
    network: Callable[[np.ndarray], np.ndarray],
    about: str,
    cache: Path,
    *,
    batch_size: int,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Features:
    """Features of every image, each computed once: what the cache holds is not computed again.

    Args:
        dataset: images and labels.
        network: pixels uint8 (n, S, S, 3) to features float32 (n, D).
        about: tells this network from others, in words that are fit for a folder's name.
        cache: the folder of all caches; of each dataset and network it gets one.
        batch_size: images at once.
        on_progress: called with the numbers of images that are done, and that there are.

    Raises:
        ValueError: a file of the cache is damaged.
    """
    folder = cache / f"{dataset.name}-{about}-{fingerprint(dataset)}"
    file, total = folder / "features.npz", sum(len(getattr(dataset, name)) for name in SPLITS)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done, parts = 0, []
        for name in SPLITS:
            split = getattr(dataset, name)
            for start in range(0, len(split), SHARD):
                rows = np.arange(start, min(start + SHARD, len(split)))
                parts.append(
                    shard(folder / f"{name}-{start:07d}.npz", split, rows, network, batch_size)
                )
                done += len(rows)
                on_progress(done, total)
        splits = [getattr(dataset, name) for name in SPLITS]
        write(
            file,
            X=np.concatenate(parts),
            y=np.concatenate([split.labels for split in splits]),
            split=np.repeat(SPLITS, list(map(len, splits))),
            ids=np.concatenate([split.ids for split in splits]),
            class_names=np.array(dataset.class_names),
        )
        for each in folder.glob("*-*.npz"):
            each.unlink()
    try:
        return read(file, dataset.name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}); delete it") from error


def shard(
    file: Path,
    split: Split,
    rows: np.ndarray,
    network: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> np.ndarray:
    """Features float32 (n, D) of some rows (n,) of a split, from their file if it is there."""
    if not file.exists():
        batches = split.batches(rows, batch_size)
        write(file, X=np.concatenate([network(images) for images, _ in batches]))
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            X = archive["X"]
    except (*MALFORMED, KeyError) as error:
        raise ValueError(f"the cache's {file} is damaged ({error}); delete it") from error
    if len(X) != len(rows):
        raise ValueError(f"the cache's {file} must hold {len(rows)} rows, got {len(X)}; delete it")
    return X


def write(file: Path, **arrays: np.ndarray) -> None:
    """An .npz file, whole or not at all; its checksums tell later damage."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_atomically(file, stream.getvalue())


def fingerprint(dataset: Dataset) -> str:
    """Twelve hexadecimal digits of the examples: their pixels, or sizes of files on disk."""
    digest = hashlib.sha256(repr((dataset.class_names, dataset.image_size)).encode())
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        digest.update(repr((name, split.ids.tolist(), split.labels.tolist())).encode())
        if isinstance(split.images, ImageArray):
            for row in split.rows:
                digest.update(np.ascontiguousarray(split.images.pixels[row]))
        else:
            sizes = [split.images.paths[row].stat().st_size for row in split.rows]
            digest.update(repr(sizes).encode())
    return digest.hexdigest()[:12]
