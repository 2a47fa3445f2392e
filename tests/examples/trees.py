"""Small datasets on disk in every layout that the trainers read.

Every image has its class's colour, 20 times its label, and an id of which the first part is its
group. Each group has two images, each class twenty groups, unless it is said otherwise.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from tests.frameworks import load

SPLITS = ("train", "val", "test")

ISIC_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
HAM_TABLE, ISIC_TABLE = "HAM10000_metadata.csv", "ISIC_2019_Training_GroundTruth.csv"
ODIR_COLUMNS = ("ID", "Patient Age", "Left-Fundus", "filepath", "labels", "target", "filename")


def image(path: Path, label: int) -> None:
    """A grey image of a label's colour."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 12), 20 * label).save(path)


def write(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(file: Path) -> list[dict[str, str]]:
    """What `write` wrote."""
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def pairs(class_names: Sequence[str], groups: int = 20) -> list[tuple[str, str, int]]:
    """Id, group and label of two images in each of some groups of each class."""
    return [
        (f"{name}{group}_{number}", f"{name}{group}", label)
        for label, name in enumerate(class_names)
        for group in range(groups)
        for number in range(2)
    ]


def ham10000(root: Path, splits: Sequence[str] = (), groups: int = 20) -> Path:
    """Images in two folders; with `splits`, one for each group in turn."""
    rows = []
    for i, (name, lesion, label) in enumerate(pairs(("bkl", "mel", "nv"), groups)):
        image(root / f"HAM10000_images_part_{1 + i % 2}" / f"{name}.jpg", label)
        row = {
            "lesion_id": lesion,
            "image_id": name,
            "dx": name.partition("_")[0].rstrip("0123456789"),
        }
        rows.append(row | ({"split": splits[i // 2 % len(splits)]} if splits else {}))
    write(root / HAM_TABLE, rows)
    return root


def isic2019(root: Path) -> Path:
    """Two classes; of each second group the lesion is not known."""
    rows, metadata = [], []
    for name, lesion, label in pairs(("MEL", "NV")):
        image(root / "ISIC_2019_Training_Input" / f"{name}.jpg", label)
        rows.append({"image": name, **{c: float(c == ISIC_CLASSES[label]) for c in ISIC_CLASSES}})
        known = lesion if int(lesion[-1]) % 2 else ""
        metadata.append({"image": name, "age_approx": "55.0", "lesion_id": known, "sex": "male"})
    write(root / ISIC_TABLE, rows)
    write(root / "ISIC_2019_Training_Metadata.csv", metadata)
    return root


def odir5k(root: Path) -> Path:
    """Two eyes of each patient; both of a disease, or the right one healthy."""
    rows = []
    for patient in range(40):
        for side in ("left", "right"):
            name = f"{patient}_{side}.jpg"
            label = "N" if patient % 2 or (side == "right" and patient % 4) else "G"
            image(root / "preprocessed_images" / name, "NG".index(label))
            values = (
                patient,
                60,
                f"{patient}_left.jpg",
                f"../input/{name}",
                f"['{label}']",
                "",
                name,
            )
            of_patient = {"N": int(patient % 4 > 0), "G": int(patient % 2 == 0)}
            rows.append(dict(zip(ODIR_COLUMNS, values, strict=True)) | of_patient)
    write(root / "full_df.csv", rows)
    return root


def covid19_radiography(root: Path) -> Path:
    """With masks, which are no images of a class, and the tables that lie beside."""
    for label, name in enumerate(("COVID", "Normal", "Viral Pneumonia")):
        for i in range(20):
            image(root / name / "images" / f"{name}-{i}.png", label)
            image(root / name / "masks" / f"{name}-{i}.png", 12)
        (root / f"{name}.metadata.xlsx").write_bytes(b"")
    return root


def folders(root: Path, splits: Sequence[str] = ("train", "val", "test")) -> Path:
    """As torchvision's ImageFolder, with files that are none of the images."""
    for split in splits:
        for label, name in enumerate(("benign", "malignant")):
            for i in range(20 if split == "train" else 6):
                image(root / split / name / f"{split}{i}.{'PNG' if i else 'JPEG'}", label)
            for junk in (".DS_Store", "._train0.jpg", "Thumbs.db", "notes.txt", ".cache/x.png"):
                file = root / split / name / junk
                file.parent.mkdir(exist_ok=True)
                file.write_text("no image")
    return root


def classes(root: Path) -> Path:
    """Class folders alone, with images at any depth and files that are none of them."""
    for label, name in enumerate(("benign", "malignant", "normal")):
        for i in range(20):
            image(root / name / ("deeper" if i % 2 else "") / f"{i}.png", label)
        (root / name / "Thumbs.db").write_text("no image")
    (root / "notes.txt").write_text("no image")
    return root


def table(root: Path, splits: Sequence[str] = (), grouped: bool = True) -> Path:
    """A table of three classes below its images; with `splits`, one for each group in turn."""
    rows = []
    for i, (name, patient, label) in enumerate(pairs(("2", "10", "x"))):
        path = f"images/{patient}/{name}.png"
        image(root / path, label)
        row = {"path": path, "label": ("2", "10", "x")[label]}
        row |= {"group": patient} if grouped else {}
        rows.append(row | ({"split": splits[i // 2 % len(splits)]} if splits else {}))
    write(root / "labels.csv", rows)
    return root / "labels.csv"


FINDINGS = ("Mass", "Nodule", "Fluid")


def findings(root: Path, splits: Sequence[str] = (), images: int = 120) -> Path:
    """A table of three findings, a column each, and one of their names joined by `|`.

    A finding makes its colour brighter. Of each fifth image nobody knows the last one. Two images
    are a group.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = []
    for i in range(images):
        has = [bool(x) for x in rng.random(3) < (0.5, 0.3, 0.2)]
        pixels = np.clip(rng.normal(90, 30, (16, 16, 3)) + 60 * np.array(has), 0, 255)
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{i:03d}.png")
        row: dict[str, object] = {"path": f"images/{i:03d}.png", "group": i // 2}
        row |= {name: str(int(x)) for name, x in zip(FINDINGS, has, strict=True)}
        row |= {"all": "|".join(n for n, x in zip(FINDINGS, has, strict=True) if x)}
        if i % 5 == 0:
            row["Fluid"] = "-1" if i % 2 else ""
        rows.append(row | ({"split": splits[i // 2 % len(splits)]} if splits else {}))
    write(root / "findings.csv", rows)
    return root / "findings.csv"


LAYOUTS = {
    "ham10000": ham10000,
    "isic2019": isic2019,
    "odir5k": odir5k,
    "covid19-radiography": covid19_radiography,
    "folders": folders,
    "classes": classes,
}


def medmnist(file: Path, shape: tuple[int, ...] = (28, 28), **changes: object) -> Path:
    """Thirty images of three classes in each split; `changes` replace arrays, None leaves out."""
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (30, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(30) % 3)[:, None].astype(np.uint8)
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez_compressed(file, **arrays)
    return file


# --- and read back


def reader() -> ModuleType:
    """`examples.data.datasets`, where its packages are installed."""
    load("PIL")
    load("sklearn")
    return load("examples.data.datasets")


def whole(split: object) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, and its labels, through its batches."""
    images, labels = zip(*split.batches(np.arange(len(split)), 7), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def split_of(dataset: object) -> dict[str, str]:
    """The split of every id."""
    return {i: name for name in SPLITS for i in getattr(dataset, name).ids.tolist()}
