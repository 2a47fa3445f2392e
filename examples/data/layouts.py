"""Image datasets as they are distributed: which files, of which class, split how.

HAM10000 and class folders may come with splits; the readers of the others leave them empty.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from examples.data import findings
from examples.data.listings import (
    SPLITS,
    Example,
    Listing,
    class_examples,
    folders,
    images_below,
    images_by_stem,
    is_image,
    listing,
    table,
    visible,
)

ISIC_2019_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ODIR_TABLE = "full_df.csv"
ODIR_CLASSES = ("N", "D", "G", "C", "A", "H", "M", "O")
# folders that hold class folders, though not under the names that are read
LIKE_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([^a-z].*)?", re.I)
MASK = re.compile(r"(.+)_mask(_\d+)?")  # what outlines are called beside their images, as in BUSI


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
