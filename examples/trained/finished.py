"""A finished run, as its folder tells it: what was trained, and the checkpoint that is used."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.training.checkpoints import Checkpoints, damage

FRAMEWORKS = ("torch", "flax", "keras")
SETTINGS = ("framework", "arch", "head", "batch_size", "bf16")  # as the trainers call them


@dataclass(frozen=True)
class Finished:
    """The best epoch's checkpoint, with which the run was tested, and what builds its network."""

    folder: Path
    checkpoint: Path
    framework: str  # one of `FRAMEWORKS`
    arch: str
    head: str
    class_names: tuple[str, ...]  # in label order
    image_size: int  # pixels, height and width
    batch_size: int
    bf16: bool
    result: dict[str, Any]  # all of result.json

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)


def read(folder: Path) -> Finished:
    """The run that a folder holds.

    Raises:
        FileNotFoundError: there is no such folder, no result, or no checkpoint of the best epoch.
        ValueError: the result or the checkpoint is not as a trainer writes it.
    """
    result = read_result(folder)
    if "settings_tried" in result:
        raise ValueError(f"RUN must be a trainer's, got {folder} of examples.heads: no network")
    try:
        epoch, data = result["best_validation"]["epoch"], result["data"]
        found = Finished(
            folder=folder,
            checkpoint=Checkpoints(folder / "checkpoints", print).of_epoch(epoch),
            class_names=tuple(data["class_names"]),
            image_size=data["image_size"],
            result=result,
            **{name: result[name] for name in SETTINGS},
        )
    except KeyError as error:
        raise ValueError(
            f"{folder / 'result.json'} must be as a trainer of this version writes it, "
            f"but has no {error}"
        ) from error
    if found.framework not in FRAMEWORKS:
        raise ValueError(
            f"framework must be one of {', '.join(FRAMEWORKS)}, got {found.framework!r} in "
            f"{folder / 'result.json'}"
        )
    check_checkpoint(found.checkpoint)
    return found


def read_result(folder: Path) -> dict[str, Any]:
    """The content of ``result.json``, which a trainer writes last."""
    file = folder / "result.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"RUN must be a trainer's --out folder, got {folder}, no folder")
    if not file.exists() and (folder / "checkpoints").exists():
        raise FileNotFoundError(
            f"the run in {folder} must be finished, but has no result.json yet; "
            "its trainer's --resume goes on with it"
        )
    if not file.exists():
        raise FileNotFoundError(
            f"RUN must be a trainer's --out folder, got {folder}, which has no result.json"
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must be JSON, but is damaged: {error}") from error


def check_checkpoint(folder: Path) -> None:
    """Refuse one that is not there, or not as it was written."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the best epoch's checkpoint must be kept, but {folder} is not there; "
            "training anew with the settings of result.json makes it again"
        )
    if reason := damage(folder):
        raise ValueError(
            f"the checkpoint {folder} is damaged ({reason}); restore it from a copy, or train anew"
        )
