"""What `examples.predict` writes: refused before anything is computed where it would write over."""

import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.training.checkpoints import write_atomically
from examples.training.results import write_json


def check_new_file(flag: str, file: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced."""
    if file.is_dir():
        raise IsADirectoryError(f"{flag} must name a file, got the folder {file}")
    if file.exists() and not overwrite:
        raise FileExistsError(
            f"{flag} must name a new file, got {file}, which exists; "
            "choose another, or give --overwrite"
        )
    check_parents(flag, file)


def check_new_folder(flag: str, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless what has the same name may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{flag} must name a folder, got the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{flag} must name a new or empty folder, got {folder}, which holds files; "
            "choose another"
        )
    check_parents(flag, folder)


def check_parents(flag: str, path: Path) -> None:
    """Refuse what lies below a file."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{flag} must lie in a folder, got {path}, below a file")


def write_table(
    file: Path,
    paths: Sequence[Path],
    answers: Sequence[str],
    probabilities: np.ndarray,
    columns: Sequence[str],
) -> None:
    """A CSV file, a row an image: its file, the answer, and probabilities (N, C) of C columns."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", "predicted", *columns])
    for path, answer, row in zip(paths, answers, probabilities, strict=True):
        writer.writerow([path, answer, *(f"{p:.6g}" for p in row)])
    file.parent.mkdir(parents=True, exist_ok=True)
    # a name that is no UTF-8 stays what it is
    write_atomically(file, stream.getvalue().encode("utf-8", "surrogateescape"))


def beside(file: Path) -> Path:
    """Where an exported network is described."""
    return file.with_name(f"{file.name}.json")


def write_export(file: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """A network's file or folder, whole or not at all, and beside it how to use it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.unfinished-") as folder:
        write(Path(folder) / "network")
        (Path(folder) / "network").replace(file)
    write_json(beside(file), about)
