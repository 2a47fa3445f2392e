"""Image datasets as they are distributed: which files, of which class, split how.

HAM10000 and class folders may come with splits; the readers of the others leave them empty.
"""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from examples.data import findings
from examples.data.images import EXTENSIONS

SPLITS = ("train", "val", "test")
ISIC_2019_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ODIR_TABLE = "full_df.csv"
ODIR_CLASSES = ("N", "D", "G", "C", "A", "H", "M", "O")
# folders that hold class folders, though not under the names that are read
LIKE_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([^a-z].*)?", re.I)
MASK = re.compile(r"(.+)_mask(_\d+)?")  # what outlines are called beside their images, as in BUSI


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


def read(folder: Path, several: Sequence[str] = ()) -> Listing:
    """List the images of a folder in any of the known layouts.

    Args:
        folder: what is read.
        several: names of findings, which ODIR-5K alone has, instead of one class an image.

    Raises:
        ValueError: the layout is unknown or has no findings, or something in it is amiss.
        FileNotFoundError: an annotation file or a class's images are missing.
    """
    if several:
        if not (folder / ODIR_TABLE).exists():
            raise ValueError(
                f"--findings belongs to a table or to ODIR-5K, whose {ODIR_TABLE} is not in "
                f"{folder}"
            )
        return odir5k(folder, several)
    for marker, layout in LAYOUTS.items():
        if (folder / marker).exists():
            return layout(folder)
    if any((child / "images").is_dir() for child in folders(folder)):
        return covid19_radiography(folder)
    if next(folder.rglob("*.xlsx"), None):
        raise FileNotFoundError(
            f"{folder} has annotations in .xlsx only; ODIR-5K is read from Kaggle's full_df.csv, "
            "to be put there"
        )
    if any(images_below(child) for child in folders(folder)):
        return class_folders_alone(folder)
    raise ValueError(
        f"{folder} must hold one of {', '.join(LAYOUTS)} (a folder of class folders), or class "
        "folders, perhaps with images/ in them (COVID-19 Radiography), got none of these"
    )


def ham10000(folder: Path) -> Listing:
    """Skin lesions; a column `split`, which is no part of the publication, is honoured."""
    rows = table(folder / "HAM10000_metadata.csv", "image_id", ("lesion_id", "dx"))
    files = images_by_stem(folder)
    examples = [
        Example(
            name,
            files.get(name, folder / f"{name}.jpg"),
            row["dx"],
            row["lesion_id"],
            row.get("split", ""),
        )
        for name, row in rows.items()
    ]
    return listing("ham10000", sorted({e.class_name for e in examples}), examples, "lesion")


def isic2019(folder: Path) -> Listing:
    """Skin lesions; images of unknown lesion are taken to be of different ones."""
    truth = folder / "ISIC_2019_Training_GroundTruth.csv"
    rows = table(truth, "image", ISIC_2019_CLASSES)
    metadata = folder / "ISIC_2019_Training_Metadata.csv"
    lesions = table(metadata, "image") if metadata.exists() else {}
    files = images_by_stem(folder)
    examples = []
    for name, row in rows.items():
        marked = [c for c in ISIC_2019_CLASSES if row[c] in ("1", "1.0")]
        if len(marked) != 1:
            raise ValueError(f"{truth} must mark one class an image, got {marked} for {name}")
        group = lesions.get(name, {}).get("lesion_id") or name
        path = files.get(name, folder / f"{name}.jpg")
        examples.append(Example(name, path, marked[0], group))
    without = () if lesions else (f"Without {metadata.name} lesions are not known.",)
    return listing("isic2019", ISIC_2019_CLASSES, examples, "lesion", without)


def odir5k(folder: Path, several: Sequence[str] = ()) -> Listing:
    """Eyes; both eyes of a patient stay together.

    Each has its one label of the column ``labels``, or several findings, of columns of their names,
    which are the patient's: both eyes have what either has.
    """
    truth = folder / ODIR_TABLE
    files = images_by_stem(folder)
    label_of = {f"['{name}']": name for name in ODIR_CLASSES}
    rows = table(truth, "filename", ("ID",) if several else ("ID", "labels"))
    found = findings.of_columns(rows, several, truth)
    examples = []
    for filename, row in rows.items():
        if not several and row["labels"] not in label_of:
            raise ValueError(
                f"labels in {truth} must be one of {', '.join(label_of)}, "
                f"got {row['labels']} for {filename}; --findings reads several"
            )
        eye = Path(filename).stem
        path = files.get(eye, folder / filename)
        name = "" if several else label_of[row["labels"]]
        examples.append(Example(eye, path, name, row["ID"], findings=found[filename]))
    return listing("odir5k", several or ODIR_CLASSES, examples, "patient")


def covid19_radiography(folder: Path) -> Listing:
    """Chest X-rays in class folders, each with images/ and masks/; patients are not known."""
    classes = folders(folder)
    examples = [
        example for c in classes for example in class_examples(c / "images", c.name, folder, "")
    ]
    return listing("covid19-radiography", [c.name for c in classes], examples)


def class_folders(folder: Path) -> Listing:
    """`train/CLASS/…`, `val/CLASS/…` and `test/CLASS/…`, as torchvision's ImageFolder has them."""
    class_names = [c.name for c in folders(folder / "train")]
    if not class_names:
        raise FileNotFoundError(f"{folder / 'train'} must have a folder for each class, got none")
    for other in folders(folder):
        if other.name not in SPLITS and {c.name for c in folders(other)} & set(class_names):
            raise ValueError(
                f"a folder of class folders must be called {', '.join(SPLITS[:-1])} or "
                f"{SPLITS[-1]}, got {other.name!r} in {folder}; rename it, or move it elsewhere"
            )
    examples = []
    for split in SPLITS:
        for c in folders(folder / split) if (folder / split).is_dir() else []:
            if c.name not in class_names:
                raise ValueError(
                    f"the classes of {split} must be among those of train, got {c.name!r} in {c}"
                )
            examples += class_examples(c, c.name, folder, split)
    return listing(folder.resolve().name, class_names, examples)


def class_folders_alone(folder: Path) -> Listing:
    """`CLASS/…`, which are split here; outlines beside their images are no images of a class."""
    classes = folders(folder)
    for c in classes:
        if LIKE_SPLITS.fullmatch(c.name):
            raise ValueError(
                f"splits of class folders must be train with val, test or both, got {c.name!r} in "
                f"{folder}; rename it, or if it is a class put it beside others below train"
            )
    if len(classes) < 2:
        raise ValueError(f"{folder} must have a folder for each class, got {classes[0].name} alone")
    listed = [example for c in classes for example in class_examples(c, c.name, folder, "")]
    names = {example.id for example in listed}
    masks = {i for i in names if (found := MASK.fullmatch(i)) and found[1] in names}
    notes = (f"Left out: {len(masks)} masks, named _mask beside their images.",) if masks else ()
    if beside := [name for name in visible(os.listdir(folder)) if is_image(Path(name))]:
        notes += (f"Left out: {len(beside)} images in no class folder, such as {beside[0]}.",)
    examples = (example for example in listed if example.id not in masks)
    return listing(folder.resolve().name, [c.name for c in classes], examples, notes=notes)


# what a folder holds, and who reads it
LAYOUTS = {
    "HAM10000_metadata.csv": ham10000,
    "ISIC_2019_Training_GroundTruth.csv": isic2019,
    ODIR_TABLE: odir5k,
    "train": class_folders,
}


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
