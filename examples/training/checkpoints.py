"""Checkpoints that survive a kill at any moment and notice when a file was damaged.

A checkpoint is a folder, written under another name and renamed when it is complete. Each file's
SHA-256 stands beside the files, so that one that was cut short or changed is not taken for whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGESTS, STATE = "sha256.json", "state.json"
KEPT = 2  # the newest, and one to fall back to
PROBE = 2**20  # bytes


class NotSaved(OSError):
    """A checkpoint could not be written; those before are whole."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete folder: what the framework wrote, and the state of the run."""

    folder: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, named by their epochs and steps, in one folder.

    Args:
        folder: where they are; made when the first one is written.
        warn: takes a sentence about a damaged checkpoint.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn

    def save(self, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write a checkpoint, whole or not at all, and drop those that are needed no more.

        Args:
            state: JSON; ``epoch`` (epochs done), ``step`` (of the next one) and ``best_epoch``.
            write: puts the framework's files into the folder that it is given.

        Raises:
            NotSaved: the disk is full, or ``write`` fails otherwise.
        """
        final = self.folder / name(state["epoch"], state["step"])
        unfinished = final.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            write(unfinished)
            (unfinished / STATE).write_text(json.dumps(state))
            (unfinished / DIGESTS).write_text(json.dumps(digests(unfinished)))
            for file in files(unfinished):
                sync(unfinished / file)
        except Exception as error:
            reason = refusal(unfinished) or error
            shutil.rmtree(unfinished, ignore_errors=True)  # the room it took may be the last
            raise NotSaved(
                f"checkpoint {final} could not be written, what was there before is whole: {reason}"
            ) from error
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of this name
        unfinished.rename(final)
        sync(self.folder)
        self._drop_old()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; says which ones it had to pass over."""
        for folder in reversed(self._complete()):
            reason = self._damage(folder)
            if reason is None:
                return Checkpoint(folder, read_state(folder))
            self.warn(f"checkpoint {folder.name} is damaged ({reason}); trying the one before")
        return None

    def of_epoch(self, epoch: int) -> Path:
        """The folder of the checkpoint that an epoch ended with."""
        return self.folder / name(epoch, 0)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*-*") if p.is_dir() and not p.suffix)

    def _damage(self, folder: Path) -> str | None:
        """Why a checkpoint cannot be gone on from: its own files, or those of its best epoch."""
        reason = damage(folder)
        if reason is None and (best := read_state(folder)["best_epoch"]):
            reason = damage(self.of_epoch(best))
        return reason

    def _drop_old(self) -> None:
        kept = set(self._complete()[-KEPT:])
        for folder in tuple(kept):
            with contextlib.suppress(OSError, ValueError):  # damaged, so nothing to fall back to
                kept.add(self.of_epoch(read_state(folder)["best_epoch"]))
        for folder in set(self.folder.iterdir()) - kept:
            shutil.rmtree(folder)


def name(epoch: int, step: int) -> str:
    """Sorts as the run goes: epochs done, steps of the next one done."""
    return f"{epoch:05d}-{step:07d}"


def files(folder: Path) -> list[str]:
    """All files below a folder but the one with their digests, by relative path."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(file for file in found if file != DIGESTS)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for file in files(folder):
        with (folder / file).open("rb") as stream:
            found[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return f"{folder.name}/{DIGESTS}: {error}"
    found = digests(folder)
    for file in sorted(set(expected) | set(found)):
        if expected.get(file) != found.get(file):
            return f"{folder.name}/{file} is not as it was written"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What ``save`` was given."""
    return json.loads((folder / STATE).read_text())


def refusal(folder: Path) -> OSError | None:
    """Why a file system takes no more, in its own words: frameworks turn them into others."""
    try:
        write_atomically(folder / "probe", bytes(PROBE))
    except OSError as error:
        return error
    return None


def sync(path: Path) -> None:
    """Have a file or folder on the disk before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    sync(unfinished)
    unfinished.replace(path)
