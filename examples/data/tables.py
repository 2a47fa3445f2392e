"""A table of images: a CSV file with a row for each, that names its file and its class."""

import argparse
import ntpath
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.data.layouts import Example, Listing, listing, table


class Columns(NamedTuple):
    """What a table's columns are called.

    Without a name of its own a split is read from ``split``, and a group from ``group``, where the
    table has them.
    """

    path: str = "path"
    label: str = "label"
    split: str | None = None
    group: str | None = None


USUAL = Columns()


def add_flags(add: Callable[..., Any]) -> None:
    """The flags of the columns' names, to a parser or a group of it."""
    about = {
        "path": "of the images' files, from the table's folder (path)",
        "label": "of their classes (label)",
        "split": "of train, val and test (split, if it is there)",
        "group": "of patients, lesions …, each in one split (group, if it is there)",
    }
    for name, text in about.items():
        add(f"--{name}-column", metavar="NAME", help=text)


def columns(chosen: Any) -> Columns:
    """The names that flags or settings choose, of attributes such as ``path_column``."""
    named = {name: getattr(chosen, f"{name}_column") for name in Columns._fields}
    return Columns(**{name: value for name, value in named.items() if value is not None})


def is_table(source: str | Path) -> bool:
    """Whether ``--data`` names one."""
    return Path(source).suffix.lower() == ".csv"


def refuse_names_of_no_table(args: argparse.Namespace) -> None:
    """Raise ValueError where flags name columns, and there is no table."""
    for name in Columns._fields:
        if getattr(args, f"{name}_column") is not None and not is_table(args.data):
            raise ValueError(f"--{name}-column belongs to a table, got --data {args.data}")


def read(file: Path, named: Columns) -> Listing:
    """List the images of a table; an image's id is its path in the table.

    Images without a group are taken to be of different ones.

    Raises:
        ValueError: a column or a cell is missing, a path is there twice or leads out of the
            table's folder, or the file is no table.
    """
    rows = table(file, named.path, (named.label,))
    present = next(iter(rows.values()))
    for column in (named.split, named.group):
        if column is not None and column not in present:
            raise ValueError(f"{file} must have a column {column}, got {', '.join(present)}")
    split, group = named.split or "split", named.group or "group"
    examples: dict[str, Example] = {}
    for cell, row in rows.items():
        path = inside(cell, file)
        if path in examples:
            raise ValueError(f"{named.path} must be unique, got {path} twice in {file}")
        about = row[named.label].strip(), row.get(group, "") or path, row.get(split, "").strip()
        examples[path] = Example(path, file.parent / path, *about)
    names = sorted({example.class_name for example in examples.values()}, key=by_number)
    ungrouped = sum(not row.get(group, "") for row in rows.values())
    notes = ()
    if group in present and ungrouped:
        notes = (f"Of {ungrouped} images no {group} is known: each is taken to be its own.",)
    unit = group if group in present else "image"
    return listing(file.stem, names, examples.values(), unit, notes)


def inside(cell: str, file: Path) -> str:
    """A path from the table's folder, in its shortest form.

    Raises:
        ValueError: it is absolute, or leads out of that folder.
    """
    path = posixpath.normpath(cell)
    if path.startswith("/") or path.split("/")[0] == ".." or ntpath.splitdrive(cell)[0]:
        raise ValueError(
            f"paths must lead from the folder of {file} to files below it, neither absolute nor "
            f"out of it by .., got {cell}; put the table above its images"
        )
    return path


def by_number(name: str) -> tuple[int, str]:
    """Sorts 2 before 10, and numbers before names."""
    return (int(name), "") if name.isdecimal() else (10**9, name)
