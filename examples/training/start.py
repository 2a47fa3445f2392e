"""What comes before a run: what can be refused is, in one sentence, and the data are read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from examples.data import datasets
from examples.data.datasets import Dataset
from examples.training.screen import bar
from examples.training.settings import Settings

STOPPED = 130  # the exit status of a program that Ctrl-C ended


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the program with the sentence of an error that its user can mend, without a traceback.

    Ctrl-C, when nothing is trained yet, ends it too.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def claim(settings: Settings) -> bool:
    """Whether there is something to train, before anything is loaded.

    Raises:
        FileExistsError: the folder holds a run, which is not written over.
        NotADirectoryError: it is a file.
    """
    out = settings.out
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out must be a folder, got the file {out}; choose another")
    result = out / "result.json"
    if not settings.resume:
        if result.exists() or (out / "checkpoints").exists():
            raise FileExistsError(
                f"{out} holds a run already; --resume goes on with it, another --out keeps it"
            )
        return True
    if result.exists() and json.loads(result.read_text())["epochs"] >= settings.epochs:
        print(f"{result} is there already: the run is finished.")
        return False
    return True


def load_data(settings: Settings, visible: bool = True) -> Dataset:
    """The data that the settings name, under a bar while image files are decoded for the check."""
    with bar("reading images", visible) as move:
        return datasets.load(
            settings.data,
            settings.image_size,
            imbalance=settings.imbalance,
            split_seed=settings.split_seed,
            skip_unreadable=settings.skip_unreadable,
            columns=settings.columns,
            workers=settings.workers,
            on_progress=move,
        )


def check_shares(batch_size: int, number: int, sharers: str, parts: int = 1) -> None:
    """Raise ValueError for a batch, or its parts, that so many devices cannot share evenly."""
    if batch_size % (number * parts):
        each = f" times {parts} of --accumulate" if parts > 1 else ""
        raise ValueError(
            f"batch_size must be a multiple of the {number} {sharers}{each}, got {batch_size}"
        )


def refuse_other_settings(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on as it began.

    Raises:
        ValueError: a setting, or the data, is another than when the run began.
    """
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume needs the {name} that the run began with, {before.get(name)!r}, "
                f"got {now.get(name)!r}; choose another --out to begin anew"
            )
