"""Datasets as they are distributed: what is read, how it is split, and what is wrong with it."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.examples import trees
from tests.examples.trees import SPLITS, split_of, whole
from tests.frameworks import load


@pytest.fixture(scope="module")
def data():
    """The module under test."""
    return trees.reader()


def groups(dataset, pattern=r"^(.*?)_"):
    """The groups in each split, which the trees' ids start with."""
    return [
        {re.match(pattern, i)[1] for i in getattr(dataset, name).ids.tolist()} for name in SPLITS
    ]


@pytest.mark.parametrize(
    ("layout", "class_names", "count"),
    [
        ("ham10000", ("bkl", "mel", "nv"), 120),
        ("isic2019", ("MEL", "NV"), 80),
        ("odir5k", ("N", "G"), 80),
        ("covid19-radiography", ("COVID", "Normal", "Viral Pneumonia"), 60),
        ("folders", ("benign", "malignant"), 64),
        ("classes", ("benign", "malignant", "normal"), 60),
    ],
)
def test_each_layout_is_recognised(data, tmp_path, layout, class_names, count):
    """Every image is read once, with its own class: its colour tells."""
    dataset = data.load(trees.LAYOUTS[layout](tmp_path / layout), 8)
    assert dataset.name == layout
    assert dataset.class_names == class_names
    assert len(split_of(dataset)) == sum(len(getattr(dataset, name)) for name in SPLITS) == count
    for name in SPLITS:
        images, labels = whole(getattr(dataset, name))
        assert set(labels) == set(range(len(class_names)))
        expected = np.broadcast_to(20 * labels[:, None, None, None], images.shape)
        np.testing.assert_allclose(images, expected, atol=1)


def test_the_layouts_that_come_whole_are_split_70_15_15(data, tmp_path):
    for layout in ("ham10000", "isic2019", "odir5k", "covid19-radiography", "classes"):
        dataset = data.load(trees.LAYOUTS[layout](tmp_path / layout), 8)
        sizes = np.array([len(getattr(dataset, name)) for name in SPLITS])
        np.testing.assert_array_equal(sizes, sizes.sum() * np.array([70, 15, 15]) // 100)
        assert any(note.startswith("Split 70/15/15 by ") for note in dataset.notes)


def test_no_lesion_and_no_patient_is_in_two_splits(data, tmp_path):
    datasets = [
        data.load(trees.ham10000(tmp_path / "ham"), 8),
        data.load(trees.ham10000(tmp_path / "given", ("train", "train", "val")), 8),
        data.load(trees.odir5k(tmp_path / "odir"), 8),
    ]
    found = [groups(dataset) for dataset in datasets]
    known = r"^(.*[13579])_|^(?=.*[02468]_)"  # the lesions that ISIC-2019's metadata name
    isic = data.load(trees.isic2019(tmp_path / "isic"), 8)
    found.append([g - {None} for g in groups(isic, known)])
    for train, val, test in found:
        assert train and val and test
        assert train.isdisjoint(val) and train.isdisjoint(test) and val.isdisjoint(test)


def test_given_splits_are_honoured(data, tmp_path):
    dataset = data.load(trees.ham10000(tmp_path, ("train", "val", "test", "train")), 8)
    for row in trees.read(tmp_path / trees.HAM_TABLE):
        assert split_of(dataset)[row["image_id"]] == row["split"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("train", "val"), "No test split comes with the data: val is scored as test, and a tenth"),
        (("train", "test"), "No val split comes with the data: a tenth of train, by image and"),
    ],
)
def test_a_tenth_of_train_stands_in_for_a_split_that_is_missing(data, tmp_path, given, sentence):
    dataset = data.load(trees.folders(tmp_path, given), 8)
    assert any(note.startswith(sentence) for note in dataset.notes)
    assert {i.partition("/")[0] for i in dataset.test.ids} == {given[1]}
    assert {i.partition("/")[0] for i in [*dataset.train.ids, *dataset.val.ids]} == {"train"}
    np.testing.assert_array_equal(dataset.class_counts, [18, 18])
    np.testing.assert_array_equal(np.bincount(dataset.val.labels), [2, 2])


def test_classes_without_images_are_left_out_and_noted(data, tmp_path):
    notes = data.load(trees.isic2019(tmp_path), 8).notes
    assert "Left out for want of images: BCC, AK, BKL, DF, VASC, SCC, UNK." in notes
    (tmp_path / "ISIC_2019_Training_Metadata.csv").unlink()
    notes = data.load(tmp_path, 8).notes
    assert "Without ISIC_2019_Training_Metadata.csv lesions are not known." in notes


def test_of_copies_in_several_folders_the_first_is_read(data, tmp_path):
    """As in Kaggle's HAM10000, which has its two folders twice; here the copies are not equal."""
    trees.ham10000(tmp_path)
    trees.image(tmp_path / "ham10000_images_part_1/nv0_0.jpg", 9)
    dataset = data.load(tmp_path, 8)
    assert len(split_of(dataset)) == 120
    images, labels = whole(getattr(dataset, split_of(dataset)["nv0_0"]))
    np.testing.assert_allclose(images[labels == 2].astype(int), 40, atol=1)


def test_masks_and_images_outside_class_folders_are_left_out_and_noted(data, tmp_path):
    """As in BUSI, which has one or several outlines of a lesion beside its image."""
    trees.classes(tmp_path)
    for name in ("benign/0_mask", "benign/0_mask_1", "benign/unmasked_mask", "overview"):
        trees.image(tmp_path / f"{name}.png", 9)
    dataset = data.load(tmp_path, 8)
    found = split_of(dataset)
    assert len(found) == 61 and "benign/unmasked_mask" in found
    assert "Left out: 2 masks, named _mask beside their images." in dataset.notes
    assert "Left out: 1 images in no class folder, such as overview.png." in dataset.notes


def test_class_folders_alone_train_without_further_flags(tmp_path):
    load("tensorboard")
    trainer = load("examples.train_torch")
    folder, out = trees.classes(tmp_path / "mine"), tmp_path / "run"
    flags = ["--data", str(folder), "--image-size", "16", "--batch-size", "8", "--epochs", "1"]
    assert trainer.main([*flags, "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())["data"]
    assert found["class_names"] == ["benign", "malignant", "normal"]
    assert found["class_counts"] == [14, 14, 14]


def test_tables_may_start_with_a_byte_order_mark(data, tmp_path):
    table = trees.isic2019(tmp_path) / trees.ISIC_TABLE
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert len(split_of(data.load(tmp_path, 8))) == 80


def test_splits_depend_on_their_seed_and_the_ids_alone(data, tmp_path):
    first = data.load(trees.ham10000(tmp_path), 8)
    rows = trees.read(tmp_path / trees.HAM_TABLE)
    trees.write(
        tmp_path / trees.HAM_TABLE,
        [rows[i] for i in np.random.default_rng(0).permutation(len(rows))],
    )
    again, other = data.load(tmp_path, 8, workers=3), data.load(tmp_path, 8, split_seed=1)
    for name in SPLITS:
        one, two = getattr(first, name), getattr(again, name)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(whole(one)[0], whole(two)[0])
    assert split_of(first) != split_of(other)


def test_deal_keeps_shares_groups_and_rare_classes(data):
    """Lesions of one to five images; the rarest class has three of them."""
    deal = load("examples.data.splits").deal
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 6, 203)
        group = np.repeat(np.arange(203), sizes)
        labels = np.repeat(np.r_[np.zeros(150, int), np.ones(50, int), [2, 2, 2]], sizes)
        shuffle = rng.permutation(len(group))
        part = deal(labels[shuffle], group[shuffle], (0.7, 0.15, 0.15), seed)
        assert len(set(zip(part.tolist(), group[shuffle].tolist(), strict=True))) == 203
        counts = np.array([np.bincount(part[labels[shuffle] == c], minlength=3) for c in range(3)])
        assert counts.min() >= 1
        for row in counts[:2]:
            np.testing.assert_allclose(row, row.sum() * np.array([0.7, 0.15, 0.15]), atol=5)


# --- images that are missing or broken


def test_what_cannot_be_read_stops_or_is_counted(data, tmp_path):
    complete = split_of(data.load(trees.ham10000(tmp_path), 8))
    part = tmp_path / "HAM10000_images_part_1"
    (part / "nv3_0.jpg").unlink()
    sentence = (
        "must be on disk, got 1 of 120 missing, the first nv3_0.jpg; --skip-unreadable leaves"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        data.load(tmp_path, 8)
    (part / "nv4_0.jpg").write_bytes((part / "nv4_0.jpg").read_bytes()[:200])
    (part / "mel5_0.jpg").write_text("a text")
    dataset = data.load(tmp_path, 8, skip_unreadable=True)
    assert "Left out: 3 images that cannot be read, 1 of them missing." in dataset.notes
    left = {i: s for i, s in complete.items() if i not in ("nv3_0", "nv4_0", "mel5_0")}
    assert split_of(dataset) == left  # no other image changed its split
    shutil.copy(part / "nv2_0.jpg", part / "nv3_0.jpg")
    with pytest.raises(ValueError, match=r"truncated or unreadable image .*mel5_0\.jpg \("):
        data.load(tmp_path, 8)


def test_a_class_of_unreadable_images_is_one_sentence(data, tmp_path):
    for file in trees.folders(tmp_path).glob("train/malignant/*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'malignant' must have a readable image in train"):
        data.load(tmp_path, 8, skip_unreadable=True)
    shutil.rmtree(tmp_path)
    for file in trees.folders(tmp_path).glob("val/*/*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="val must have at least one readable image, got none"):
        data.load(tmp_path, 8, skip_unreadable=True)


# --- bad input


def emptied(root):
    """A class folder without images."""
    trees.folders(root)
    for file in (root / "train/malignant").glob("*.[Pp][Nn][Gg]"):
        file.unlink()
    (root / "train/malignant/train0.JPEG").unlink()
    return root


def with_class(root, split, name):
    """A folder of another class in a split."""
    trees.image(trees.folders(root) / split / name / "a.png", 0)
    return root


def renamed(root, name):
    """Class folders alone, one of which has another name."""
    (trees.classes(root) / "normal").rename(root / name)
    return root


def alone(root):
    """A single class folder."""
    trees.classes(root)
    shutil.rmtree(root / "malignant")
    shutil.rmtree(root / "normal")
    return root


def changed(root, layout, file, **cells):
    """A dataset whose table's second row has other cells; None leaves its columns out."""
    trees.LAYOUTS[layout](root)
    rows = trees.read(root / file)
    rows[1] |= cells
    gone = [column for column, value in cells.items() if value is None]
    trees.write(root / file, [{k: v for k, v in r.items() if k not in gone} for r in rows])
    return root


def written(root, file, content):
    """A folder with one file."""
    (root / file).write_bytes(content)
    return root


BAD = [
    (
        lambda r: r / "no",
        FileNotFoundError,
        "data must be digits, .*, got .*/no, which does not exi",
    ),
    (lambda r: r, ValueError, "must hold one of HAM10000_metadata.csv, .* got none of these"),
    (
        lambda r: written(r, "a.txt", b"") / "a.txt",
        ValueError,
        "data must be .* got the file .*txt",
    ),
    (
        lambda r: written(r, "a.xlsx", b""),
        FileNotFoundError,
        "ODIR-5K is read from Kaggle's full_df",
    ),
    (
        lambda r: written(r, "full_df.csv", b"ID,filename,labels\n"),
        ValueError,
        "a row for each imag",
    ),
    (
        lambda r: written(r, "full_df.csv", b"ID\n\xff"),
        ValueError,
        "must be a CSV table in UTF-8, g",
    ),
    (emptied, FileNotFoundError, "class 'malignant' must have at least one image, got none in "),
    (
        lambda r: with_class(r, "valid", "benign"),
        ValueError,
        "must be called train, val or test, got 'valid' in ",
    ),
    (
        lambda r: with_class(r, "val", "other"),
        ValueError,
        "must be among those of train, got 'other'",
    ),
    (
        lambda r: trees.folders(r, ["train"]),
        ValueError,
        "train with val, test or both, got 'train'",
    ),
    *(
        (
            lambda r, name=name: renamed(r, name),
            ValueError,
            f"splits of class folders must be train with val, test or both, got '{name}' in ",
        )
        for name in ("val", "Training Images", "valid", "TEST_1")
    ),
    (alone, ValueError, "must have a folder for each class, got benign alone"),
    (
        lambda r: (trees.classes(r) / "empty").mkdir() or r,
        FileNotFoundError,
        "class 'empty' must have at least one image, got none in .*/empty; remove the folder",
    ),
    (lambda r: trees.ham10000(r, ["train", ""]), ValueError, "test or both, got '', 'train'"),
    (
        lambda r: trees.ham10000(r, groups=2),
        ValueError,
        "'bkl' must have at least 3 lesions .* got 2",
    ),
]
TABLES = [
    (
        "ham10000",
        trees.HAM_TABLE,
        {"image_id": "bkl0_0"},
        "image_id must be unique, got bkl0_0 twice",
    ),
    ("ham10000", trees.HAM_TABLE, {"dx": ""}, "dx must not be empty, got nothing in row 2 of "),
    ("ham10000", trees.HAM_TABLE, {"dx": None}, "must have a column dx, got lesion_id, image_id"),
    (
        "isic2019",
        trees.ISIC_TABLE,
        {"NV": "1.0"},
        r"must mark one class an image, got \['MEL', 'NV'\]",
    ),
    (
        "isic2019",
        trees.ISIC_TABLE,
        {"MEL": "0.0"},
        r"must mark one class an image, got \[\] for MEL0",
    ),
    (
        "odir5k",
        "full_df.csv",
        {"labels": "['N','D']"},
        r"must be one of .*, got \['N','D'\] for 0_rig",
    ),
]
BAD += [
    (
        lambda r, layout=layout, file=file, cells=cells: changed(r, layout, file, **cells),
        ValueError,
        s,
    )
    for layout, file, cells, s in TABLES
]


@pytest.mark.parametrize(("build", "kind", "sentence"), BAD)
def test_bad_input_is_one_sentence(data, tmp_path, build, kind, sentence):
    with pytest.raises(kind, match=sentence):
        data.load(build(tmp_path), 8)


def test_two_files_of_one_name_are_one_sentence(data, tmp_path):
    trees.image(trees.folders(tmp_path) / "train/benign/train3.jpg", 0)
    with pytest.raises(
        ValueError, match=r"names must differ without .*train3\.PNG and .*train3\.jpg"
    ):
        data.load(tmp_path, 8)
