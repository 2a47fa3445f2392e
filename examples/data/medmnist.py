"""Arrays in a `.npz` file with MedMNIST's keys: `train_images`, `train_labels`, `val_images`, …"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.data.images import high_byte
from examples.data.listings import SPLITS

# what NumPy raises for archives that are damaged, or none: TypeError for a single array
MALFORMED = (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images and labels of each split; the file is read whole, as NumPy reads compressed arrays.

    Returns:
        Images, uint8 (N, H, W) or (N, H, W, 3), and labels, int64 (N,), by split.

    Raises:
        ValueError: the file is no such archive, a key is missing, or shapes or labels are wrong.
        TypeError: images are not uint8 or uint16, or labels not integers.
    """
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in expected_keys() if key in archive}
    except MALFORMED as error:
        raise ValueError(f"{file} must be a NumPy .npz archive of arrays, got {error}") from error
    for key in expected_keys():
        if key not in arrays:
            raise ValueError(f"{file} must have the key {key}, got {', '.join(arrays) or 'none'}")
    images = {split: checked_images(f"{split}_images", arrays) for split in SPLITS}
    labels = {split: checked_labels(f"{split}_labels", arrays) for split in SPLITS}
    for split in SPLITS:
        check_agreement(split, images, labels)
    return images, labels


def expected_keys() -> list[str]:
    """In the order of the sentences that miss them."""
    return [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]


def checked_images(key: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3)."""
    images = arrays[key]
    if images.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"{key} must be uint8 or uint16, got {images.dtype}")
    if images.ndim != 3 and images.shape[3:] != (3,):
        raise ValueError(f"{key} must have shape (N, H, W) or (N, H, W, 3), got {images.shape}")
    if images.size == 0:
        raise ValueError(f"{key} must not be empty, got shape {images.shape}")
    return images if images.dtype == np.uint8 else high_byte(images)


def checked_labels(key: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64 (N,)."""
    labels = arrays[key]
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(
            f"{key} must have one label an image, got shape {labels.shape}; "
            "multi-label data are not read from .npz, but from a .csv table"
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{key} must be integers, got {labels.dtype}")
    if labels.ndim not in (1, 2):
        raise ValueError(f"{key} must have shape (N,) or (N, 1), got {labels.shape}")
    return labels.reshape(-1).astype(np.int64)


def check_agreement(
    split: str, images: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> None:
    """Raise ValueError unless a split has a label an image, and classes that train has too."""
    if len(images[split]) != len(labels[split]):
        raise ValueError(
            f"{split}_images and {split}_labels must have the same length, "
            f"got {len(images[split])} and {len(labels[split])}"
        )
    classes = np.unique(labels["train"])
    if not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(f"train_labels must be 0, 1, 2 … without a gap, got {classes.tolist()}")
    if (unknown := np.setdiff1d(labels[split], classes)).size:
        raise ValueError(
            f"the classes of {split}_labels must be among those of train_labels, "
            f"0 to {classes[-1]}, got {unknown[0]}"
        )
    if images[split].shape[1:] != images["train"].shape[1:]:
        raise ValueError(
            f"{split}_images must have images of shape {images['train'].shape[1:]}, as in train, "
            f"got {images[split].shape[1:]}"
        )
