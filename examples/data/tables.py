"""A table of images: a CSV file with a row for each, of its file and its class or findings."""

import argparse
import ntpath
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.data import findings
from examples.data.listings import Example, Listing, listing, table


class Columns(NamedTuple):
    """What a table's columns are called.

    Without a name of its own a split is read from ``split``, and a group from ``group``, where the
    table has them. Where there are names of findings, or a column of them, labels are not read.
    """

    path: str = "path"
    label: str = "label"
    split: str | None = None
    group: str | None = None
    findings: tuple[str, ...] = ()  # of a column each; or those in the next that count
    names: str | None = None  # of the column with names joined by `|`

    @property
    def several(self) -> bool:
        """Whether an image has findings instead of a label."""
        return bool(self.findings or self.names)


USUAL = Columns()
NAMED = Columns._fields[:4]  # by flags of one column each


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
    add(
        "--findings",
        type=names,
        metavar="NAME,NAME,…",
        help="several an image, instead of a label: columns of 1, 0, and blank or -1 where nobody "
        "has looked; ODIR-5K's are N,D,G,C,A,H,M,O",
    )
    add(
        "--findings-column",
        metavar="NAME",
        help="likewise, of names joined by |, all or those of --findings",
    )


def names(text: str) -> tuple[str, ...]:
    """An argparse type: names with commas between them.

    >>> names("Mass, Nodule")
    ('Mass', 'Nodule')
    """
    found = tuple(name.strip() for name in text.split(","))
    if "" in found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be names that differ, got {text!r}")
    return found


def columns(chosen: Any) -> Columns:
    """The names that flags or settings choose, of attributes such as ``path_column``."""
    named = {name: getattr(chosen, f"{name}_column") for name in NAMED}
    named |= {"findings": chosen.findings, "names": chosen.findings_column}
    return Columns(**{name: value for name, value in named.items() if value is not None})


def is_table(source: str | Path) -> bool:
    """Whether ``--data`` names one."""
    return Path(source).suffix.lower() == ".csv"


def refuse_names_of_no_table(args: argparse.Namespace) -> None:
    """Raise ValueError where flags name columns, and there is no table."""
    for name in (*NAMED, "findings"):
        if getattr(args, f"{name}_column") is not None and not is_table(args.data):
            raise ValueError(f"--{name}-column belongs to a table, got --data {args.data}")
    several = args.findings or args.findings_column
    if several and args.label_column is not None:
        raise ValueError("--label-column is one label an image; leave it or the findings out")


def read(file: Path, named: Columns) -> Listing:
    """List the images of a table; an image's id is its path in the table.

    Images without a group are taken to be of different ones.

    Raises:
        ValueError: a column or a cell is missing, a path is there twice or leads out of the
            table's folder, or the file is no table.
    """
    rows = table(file, named.path, () if named.several else (named.label,))
    present = next(iter(rows.values()))
    for column in (named.split, named.group, named.names):
        if column is not None and column not in present:
            raise ValueError(f"{file} must have a column {column}, got {', '.join(present)}")
    split, group = named.split or "split", named.group or "group"
    class_names, found = labels(rows, named, file)
    examples: dict[str, Example] = {}
    for cell, row in rows.items():
        path = inside(cell, file)
        if path in examples:
            raise ValueError(f"{named.path} must be unique, got {path} twice in {file}")
        label, findings_of = found[cell]
        group_of, split_of = (row.get(column, "").strip() for column in (group, split))
        about = label, group_of or path, split_of, findings_of
        examples[path] = Example(path, file.parent / path, *about)
    ungrouped = sum(example.group == example.id for example in examples.values())
    notes: tuple[str, ...] = ()
    if group in present and ungrouped:
        notes = (f"Of {ungrouped} images no {group} is known: each is taken to be its own.",)
    unit = group if group in present else "image"
    return listing(file.stem, class_names, examples.values(), unit, notes)


def labels(
    rows: findings.Rows, named: Columns, file: Path
) -> tuple[tuple[str, ...], dict[str, tuple[str, tuple[int, ...]]]]:
    """Classes or findings of a table in label order, and the class and the findings of each row."""
    if not named.several:
        classes = {key: row[named.label].strip() for key, row in rows.items()}
        names = tuple(sorted(set(classes.values()), key=by_number))
        return names, {key: (name, ()) for key, name in classes.items()}
    if named.names is None:
        names, found = named.findings, findings.of_columns(rows, named.findings, file)
    else:
        names, found = findings.of_names(rows, named.names, named.findings)
    return names, {key: ("", of_row) for key, of_row in found.items()}


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
