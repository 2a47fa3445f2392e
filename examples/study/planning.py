"""A study: which trainings it consists of, what each is called, and what they left so far.

``DIR/study.json`` holds the plan, ``DIR/runs/NAME`` what a training leaves behind: each has its own
folder, since several processes and machines write at once. ``DIR/results.jsonl`` gathers the
results, a line a training, and ``DIR/predicted.npz`` the predicted classes: with the plan they are
all that tables are made of.

A loss may carry options, each a trainer's flag: ``lmf:scale=5``, ``lmf:head=cosine:drw=20``.
"""

import argparse
import csv
import fcntl
import io
import json
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from examples.training.checkpoints import write_atomically
from examples.training.settings import Settings, parse
from examples.training.start import one_sentence, refuse_other_settings
from lmf_multi import adjust_logits

FRAMEWORKS = ("torch", "flax", "keras")
GATHERED, PREDICTED = "results.jsonl", "predicted.npz"
ROWS = ("labels", "argmax", "τ tuned")  # of each training in the latter, the last where it is known
Kind = tuple[str, str, str]  # data, architecture, framework


@dataclass(frozen=True)
class Training:
    """One training of a study, as planned.

    ``data`` and ``loss`` are what tables call them, and ``arguments`` those of
    ``examples.train_<framework>`` but for ``--out`` and ``--resume``.
    """

    name: str
    data: str
    arch: str
    framework: str
    loss: str
    seed: int
    arguments: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """What results are compared within."""
        return self.data, self.arch, self.framework

    def settings(self) -> Settings:
        """What the arguments say; bad ones end the program with the trainer's own sentence."""
        return parsed(self.framework, self.arguments)

    def decides(self) -> dict[str, Any]:
        """What decides the numbers, as far as it is known before the data are read."""
        settings = self.settings()
        return settings.trained_alike() | {"image_size": settings.image_size}


@cache  # tables and figures ask often
def parsed(framework: str, arguments: tuple[str, ...]) -> Settings:
    """What a trainer makes of its arguments."""
    return parse(framework, arguments, "")


@dataclass(frozen=True)
class Study:
    """A folder, the commands that it was planned with, and its trainings.

    ``gathered`` are the lines of its ``results.jsonl`` by name; a training's own files, where they
    are there, are newer.
    """

    folder: Path
    commands: tuple[str, ...] = ()
    trainings: tuple[Training, ...] = ()
    gathered: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def training(self, kind: Kind, loss: str, seed: int) -> Training:
        """The one of that kind, loss and seed."""
        wanted = (kind, loss, seed)
        return next(t for t in self.trainings if (t.kind, t.loss, t.seed) == wanted)

    def out(self, training: Training) -> Path:
        """Where a training keeps its files."""
        return self.folder / "runs" / training.name

    def result(self, training: Training) -> dict[str, Any] | None:
        """The result, if there is one that has as many epochs as planned."""
        found = self._left(training, "result")
        return found if found and found["epochs"] >= training.settings().epochs else None

    def results(self) -> dict[Training, dict[str, Any]]:
        """The results that are there, in the plan's order."""
        found = {training: self.result(training) for training in self.trainings}
        return {training: result for training, result in found.items() if result}

    def seconds(self, training: Training) -> float | None:
        """How long a training took, all its attempts together."""
        return self._left(training, "seconds")

    def history(self, training: Training) -> dict[str, list[float]]:
        """What its epochs scored: the columns of its history, a number an epoch."""
        file = self.out(training) / "history.csv"
        if not file.exists():
            return self.gathered.get(training.name, {}).get("history", {})
        with file.open(newline="") as stream:
            names, *rows = csv.reader(stream)
        columns = zip(*(map(number, row) for row in rows), strict=True)
        return dict(zip(names, map(list, columns), strict=True))

    def answers(self, training: Training) -> dict[str, np.ndarray]:
        """Of the test images, int (N,) each: the labels, and the predicted classes by rule."""
        result, file = self.result(training), self.out(training) / "predictions.npz"
        if result and file.exists():
            with np.load(file) as kept:
                labels, logits = kept["labels"], kept["logits"]
            rows = [labels, logits.argmax(1)]
            if "tuned" in result:
                counts, tau = result["data"]["class_counts"], result["tuned"]["tau"]
                rows.append(adjust_logits(logits, counts, tau).argmax(1))
            return dict(zip(ROWS, rows, strict=False))
        return dict(zip(ROWS, self._predicted.get(training.name, ()), strict=False))

    @cached_property  # an archive of a thousand arrays takes its time to open
    def _predicted(self) -> dict[str, np.ndarray]:
        file = self.folder / PREDICTED
        if not file.exists():
            return {}
        with np.load(file) as gathered:
            return {name: rows.astype(np.int64) for name, rows in gathered.items()}

    def _left(self, training: Training, name: str) -> Any:
        file = self.out(training) / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        return self.gathered.get(training.name, {}).get(name)


def plan(
    data: Sequence[str],
    archs: Sequence[str],
    frameworks: Sequence[str],
    losses: Sequence[str],
    seeds: int,
    flags: Sequence[str] = (),
) -> tuple[Training, ...]:
    """Every combination, all of one seed before the next, so that half a study can be compared.

    A loss with options that change nothing, such as ``lmf:alpha=1.5``, is not trained again.

    Args:
        data: sources, as ``--data`` of the trainers takes them.
        archs, frameworks, losses: names; a loss may carry options.
        seeds: how many, from 0.
        flags: further ones, given to every trainer.

    Raises:
        SystemExit: a trainer refuses the flags.
        ValueError: flags choose what the study chooses, or two trainings have one name.
    """
    trainings: dict[str, Training] = {}  # by what decides their numbers
    for seed, source, arch, framework, loss in product(
        range(seeds), data, archs, frameworks, losses
    ):
        training = planned(source, arch, framework, loss, seed, flags)
        decides = training.decides() | {"data": source, "epochs": training.settings().epochs}
        trainings.setdefault(json.dumps(decides), training)
    names = set()
    for training in trainings.values():
        if training.name in names:
            raise ValueError(
                f"each training must have a name of its own, got {training.name} twice; "
                "rename one of the data sources, or spell the losses' options apart"
            )
        names.add(training.name)
    return tuple(trainings.values())


def planned(
    source: str, arch: str, framework: str, loss: str, seed: int, flags: Sequence[str]
) -> Training:
    """One training; its loss's options come last, so that they replace the flags."""
    loss_name, *options = loss.split(":")
    chosen = {"data": source, "arch": arch, "loss": loss_name, "seed": seed}
    arguments = [text for flag, value in chosen.items() for text in (f"--{flag}", str(value))]
    arguments += [*flags, *(f"--{option}" for option in options)]
    data = Path(source).stem
    name = re.sub(r"[^\w=.+-]", "_", f"{data}-{arch}-{framework}-{loss}-{seed}")
    training = Training(name, data, arch, framework, loss, seed, tuple(arguments))
    settings = training.settings()
    if settings.has_findings:
        raise ValueError(
            f"studies compare trainings of one class an image, got several findings of {source}; "
            f"examples.train_{framework} trains on them"
        )
    for flag, value in chosen.items():
        if getattr(settings, flag) != value:
            raise ValueError(
                f"--{flag} is the study's to choose, {value} for {loss}, "
                f"got {getattr(settings, flag)}; leave it out"
            )
    return training


def remember(folder: Path, command: str, trainings: Iterable[Training]) -> Study:
    """Write the plan, added to what the folder holds already; several studies may do so at once.

    Raises:
        NotADirectoryError: the folder is a file.
        ValueError: a training of this name was planned with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out must be a folder, got the file {folder}; choose another")
    with locked(folder):
        before = read(folder) if (folder / "study.json").exists() else Study(folder)
        merged = {training.name: training for training in before.trainings}
        for training in trainings:
            if training.name in merged:
                refuse_other_settings(merged[training.name].decides(), training.decides())
            merged[training.name] = training
        commands = tuple(dict.fromkeys([*before.commands, command]))
        study = replace(before, commands=commands, trainings=tuple(merged.values()))
        write(study)
    return study


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process adds to the plan meanwhile, or each could lose what the other adds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "study.lock").open("a") as file:  # for writing, or NFS would refuse the lock
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(study: Study) -> None:
    """``study.json``, whole or not at all."""
    study.folder.mkdir(parents=True, exist_ok=True)
    trainings = [asdict(t) | {"arguments": shlex.join(t.arguments)} for t in study.trainings]
    content = {"commands": study.commands, "trainings": trainings}
    with tempfile.NamedTemporaryFile("w", dir=study.folder, delete=False) as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
    unfinished = Path(stream.name)  # another machine's has another name
    unfinished.chmod(0o644)
    unfinished.replace(study.folder / "study.json")


def read(folder: Path) -> Study:
    """The study that a folder holds.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: its plan is damaged.
    """
    file = folder / "study.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} must hold the study.json of examples.compare, which is not there"
        )
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} must be JSON, as examples.compare wrote it: {error}; choose another folder"
        ) from error
    trainings = (
        Training(**(entry | {"arguments": tuple(shlex.split(entry["arguments"]))}))
        for entry in content["trainings"]
    )
    table = folder / GATHERED
    lines = table.read_text().splitlines() if table.exists() else ()
    gathered = {line["name"]: line for line in map(json.loads, lines)}
    return Study(folder, tuple(content["commands"]), tuple(trainings), gathered)


def named(argv: Sequence[str] | None, program: str, summary: str) -> Study:
    """The study whose folder a command line names; where there is none the program ends."""
    parser = argparse.ArgumentParser(f"python -m {program}", description=summary)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of examples.compare")
    with one_sentence():
        return read(parser.parse_args(argv).folder)


def number(text: str) -> float:
    """As the history has it: epochs are whole.

    >>> number("3"), number("1.0"), number("nan")
    (3, 1.0, nan)
    """
    return int(text) if text.isdecimal() else float(text)


def gather(study: Study) -> None:
    """``results.jsonl``: result, seconds and history of each training that has a result.

    And ``predicted.npz``, where predictions are kept: an array a training, as ``ROWS`` has it.
    """
    lines = (
        {
            "name": training.name,
            "seconds": study.seconds(training),
            "result": result,
            "history": study.history(training),
        }
        for training, result in study.results().items()
    )
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    write_atomically(study.folder / GATHERED, content.encode())
    answers = {training.name: study.answers(training) for training in study.results()}
    if any(answers.values()):
        stream = io.BytesIO()
        arrays = {name: np.stack(list(rows.values())) for name, rows in answers.items() if rows}
        np.savez_compressed(stream, **{k: v.astype(np.uint16) for k, v in arrays.items()})
        write_atomically(study.folder / PREDICTED, stream.getvalue())
