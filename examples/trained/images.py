"""New images for a finished run: which files, and their pixels as the trainers read theirs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.data.datasets import MEMORY_BUDGET
from examples.data.images import EXTENSIONS, ImageArray, ImageFiles, read_all
from examples.data.layouts import images_below
from examples.trained.finished import Finished
from examples.training.screen import bar


def listed(images: Sequence[Path]) -> list[Path]:
    """The files, and those of folders at any depth; none twice.

    Raises:
        FileNotFoundError: one is not there, or a folder has no image.
    """
    found: dict[Path, None] = {}
    for path in images:
        if not path.exists():
            raise FileNotFoundError(
                f"IMAGES must be files or folders, got {path}, which is neither"
            )
        below = images_below(path) if path.is_dir() else [path]
        if not below:
            raise FileNotFoundError(
                f"a folder of IMAGES must hold {', '.join(sorted(EXTENSIONS))}, got {path}, "
                "which has none"
            )
        found |= dict.fromkeys(below)
    return list(found)


@dataclass(frozen=True)
class NewImages:
    """N readable images, as the trainers read theirs."""

    paths: list[Path]
    rows: np.ndarray  # int64 (N,), where they are among all that were read
    pixels: ImageArray | ImageFiles
    batch_size: int

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Consecutive pieces of rows (M,): uint8 (b, S, S, 3)."""
        step = self.batch_size
        return self.pixels.batches([rows[i : i + step] for i in range(0, len(rows), step)])


def read(paths: Sequence[Path], run: Finished, skip_unreadable: bool) -> NewImages:
    """Decode every file once, to the size of the run's images.

    Raises:
        UnreadableImage: one is no whole image, unless such are skipped.
        ValueError: all were skipped.
    """
    with bar("reading images") as move:
        pixels, readable = read_all(
            paths,
            run.image_size,
            workers=os.cpu_count() or 1,
            keep=len(paths) * run.image_size**2 * 3 <= MEMORY_BUDGET,
            skip_unreadable=skip_unreadable,
            on_progress=move,
        )
    if not readable.any():
        raise ValueError(f"IMAGES must hold a readable image, got {len(paths)} that are not")
    for path, whole in zip(paths, readable, strict=True):
        if not whole:
            print(f"Left out, as it is no whole image: {path}")
    rows = np.flatnonzero(readable)
    batch_size = min(run.batch_size, len(rows))
    return NewImages([paths[row] for row in rows.tolist()], rows, pixels, batch_size)
