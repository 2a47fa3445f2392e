"""Lists of images, whatever they were read from: tables of CSV files, and folders of images."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from examples.data.images import EXTENSIONS

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One image: what names it, its file, which may be missing, and what is known of it."""

    id: str
    path: Path
    class_name: str
    group: str  # its lesion or patient; the image itself where that is not known
    split: str = ""  # where the data come with splits
    findings: tuple[int, ...] = ()  # where there are several instead of a class


@dataclass(frozen=True)
class Listing:
    """A dataset's images, sorted by id, and its classes, or findings, in label order."""

    name: str
    class_names: tuple[str, ...]
    examples: list[Example]
    unit: str = "image"  # what a group is
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), or of findings (N, L), as in `findings`."""
        if self.examples[0].findings:
            return np.array([example.findings for example in self.examples], np.int64)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return np.array([label_of[example.class_name] for example in self.examples], np.int64)


def listing(
    name: str,
    class_names: Sequence[str],
    examples: Iterable[Example],
    unit: str = "image",
    notes: tuple[str, ...] = (),
) -> Listing:
    """Sort by id, and leave out classes that have no image."""
    examples = sorted(examples, key=lambda example: example.id)
    for one, other in pairwise(examples):
        if one.id == other.id:
            raise ValueError(
                f"names must differ without their extensions, got {one.path} and {other.path}"
            )
    if examples and examples[0].findings:
        return Listing(name, tuple(class_names), examples, unit, notes)
    present = {example.class_name for example in examples}
    absent = [c for c in class_names if c not in present]
    if absent:
        notes += (f"Left out for want of images: {', '.join(absent)}.",)
    return Listing(name, tuple(c for c in class_names if c in present), examples, unit, notes)


def table(file: Path, key: str, needed: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """The rows of a CSV file by their `key`, which may occur once; `needed` cells are not empty."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} must be a CSV table in UTF-8, got {error}") from error
    if not rows:
        raise ValueError(f"{file} must have a row for each image, got none")
    for column in (key, *needed):
        if column not in rows[0]:
            raise ValueError(f"{file} must have a column {column}, got {', '.join(rows[0])}")
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        for column in (key, *needed):
            if not row[column].strip():
                raise ValueError(
                    f"{column} must not be empty, got nothing in row {number} of {file}"
                )
        if row[key] in found:
            raise ValueError(f"{key} must be unique, got {row[key]} twice in {file}")
        found[row[key]] = row
    return found


def folders(parent: Path) -> list[Path]:
    """Folders directly in `parent`, sorted, without hidden ones."""
    return [parent / name for name in visible(os.listdir(parent)) if (parent / name).is_dir()]


def images_below(folder: Path) -> list[Path]:
    """Image files at any depth, sorted, without hidden ones."""
    return sorted(path for path in _walk(folder) if is_image(path))


def is_image(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() in EXTENSIONS


def _walk(folder: Path) -> Iterator[Path]:
    for parent, below, names in os.walk(folder, followlinks=True):
        below[:] = visible(below)  # where it goes next
        yield from (Path(parent, name) for name in visible(names))


def visible(names: Iterable[str]) -> list[str]:
    """Sorted, without the hidden files of editors and systems."""
    return sorted(name for name in names if not name.startswith("."))


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Image files by their names without extension; of copies in several folders, the first."""
    return {path.stem: path for path in reversed(images_below(folder))}


def class_examples(folder: Path, class_name: str, root: Path, split: str) -> list[Example]:
    """The images of a class; there must be some."""
    paths = images_below(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"class {class_name!r} must have at least one image, got none in {folder}; "
            "remove the folder to leave the class out"
        )
    ids = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    return [Example(i, path, class_name, i, split) for i, path in zip(ids, paths, strict=True)]
