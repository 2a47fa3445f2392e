"""Several findings an image: what each cell of a table says, and what the counts of them are.

Labels are int64 (N, L), of L findings: 1 where the image has one, 0 where it has not, and `UNKNOWN`
where nobody has looked for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

UNKNOWN = -1
CELLS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": UNKNOWN, "-1": UNKNOWN, "-1.0": UNKNOWN}
SEPARATOR = "|"
Rows = Mapping[str, Mapping[str, str]]


def of_columns(rows: Rows, names: Sequence[str], file: Path) -> dict[str, tuple[int, ...]]:
    """The findings of each row of a table that has a column for each.

    Raises:
        ValueError: a column is missing, or a cell says neither yes, no nor nothing.
    """
    found = {}
    for key, row in rows.items():
        for name in names:
            if name not in row:
                raise ValueError(
                    f"{file} must have a column {name}, got {', '.join(filter(None, row))}"
                )
            if row[name].strip() not in CELLS:
                raise ValueError(
                    f"{name} must be 1, 0, or blank or -1 where nobody has looked for it, "
                    f"got {row[name]} for {key} in {file}"
                )
        found[key] = tuple(CELLS[row[name].strip()] for name in names)
    return found


def of_names(
    rows: Rows, column: str, names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """All findings in a column of names joined by ``|``, and those of each row.

    Args:
        rows: of a table that has the column; an empty cell has none of them.
        column: its name.
        names: the findings to look for; without any all that are named, sorted.
    """
    of_row = {
        key: {name.strip() for name in row[column].split(SEPARATOR)} for key, row in rows.items()
    }
    names = tuple(names or sorted(set().union(*of_row.values()) - {""}))
    found = {key: tuple(int(name in has) for name in names) for key, has in of_row.items()}
    return names, found


def counts(labels: np.ndarray) -> np.ndarray:
    """Images without and with each finding: int64 (L, 2)."""
    return np.stack([(labels == 0).sum(0), (labels == 1).sum(0)], axis=1)


def check(names: Sequence[str], train_counts: np.ndarray) -> None:
    """Raise ValueError for a finding that all training images have, or none: counts int (L, 2)."""
    for name, (without, having) in zip(names, train_counts.tolist(), strict=True):
        if not (without and having):
            raise ValueError(
                f"finding {name!r} must be there in some images of train and absent from others, "
                f"got it in {having} and absent from {without}; leave it out of --findings, or "
                "split otherwise, by --split-seed or a column"
            )


def strata(labels: np.ndarray) -> np.ndarray:
    """What images are dealt out by, int64 (N,): the rarest finding of each, or L for none."""
    having = labels == 1
    rarest_first = np.argsort(having.sum(0), kind="stable")
    place = having[:, rarest_first].argmax(1)
    return np.where(having.any(1), rarest_first[place], labels.shape[1])


def in_words(name: str, count: np.ndarray) -> str:
    """How many images have a finding, of those in which somebody has looked for it: int (2,)."""
    return f"{name} {count[1]} of {count.sum()}"
