"""What heads on frozen features leave behind: the files of a study of trainings."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from examples.data.features import Features
from examples.study import planning
from examples.study.planning import Study, Training
from examples.training import results
from examples.training.checkpoints import write_atomically
from examples.training.heads import Trained, build_loss, logits_of
from examples.training.machine import cpu, peak_host_memory
from examples.training.settings import Settings

CHOSEN_BY = "val_macro_f1_tuned"  # the score of an epoch that chooses it, and the setting
Setting = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A loss, called as ``--losses`` has it, ``lmf:scale=1``, and the settings tried of it."""

    name: str
    arguments: tuple[str, ...]  # of the trainers, but for loss and seed
    settings: Settings
    arch: str
    head: str
    tried: tuple[Setting, ...]

    @property
    def sampler(self) -> str:
        """How batches are drawn: crt trains the head alone, so here from the first epoch on."""
        return "balanced" if self.settings.loss == "crt" else self.settings.sampler

    def losses(self, class_counts: np.ndarray) -> list[Any]:
        """One for each setting."""
        name, given = self.settings.loss, self.settings.loss_options
        own = ({k: v for k, v in each.items() if k in given} for each in self.tried)
        return [build_loss(name, given | each, class_counts) for each in own]

    def training(self, setting: Setting, seed: int) -> Training:
        """As a study plans one; its arguments are a trainer's, of its kind of head if it has it."""
        data, framework = Path(self.settings.data).stem, f"{self.head}-head"
        name = re.sub(r"[^\w=.+-]", "_", f"{data}-{self.arch}-{self.head}-{self.name}-{seed}")
        chosen = [f"--{key.replace('_', '-')}={value}" for key, value in setting.items()]
        chosen += ["--head=cosine"] if self.head == "cosine" else []
        arguments = (*self.arguments, f"--loss={self.settings.loss}", f"--seed={seed}", *chosen)
        return Training(name, data, self.arch, framework, self.name, seed, arguments)


def write(
    folder: Path,
    command: str,
    found: Features,
    X: dict[str, Array],
    heads: Sequence[tuple[Row, Trained]],
    seconds: float,
) -> Study:
    """Choose each loss's setting by validation, and write what the test split says of it.

    Args:
        folder, command: of the study, which may hold others already.
        found, X: what was trained on, and its standardised features by split.
        heads: each loss with all its settings and seeds.
        seconds: that the training of all of them took.
    """
    trainings, tried = [], []
    for row, on_device in heads:
        trained = jax.tree.map(np.asarray, on_device)  # JAX would compile for each index
        scores = trained.history[CHOSEN_BY].max(2)  # (S, R)
        best = int(scores.mean(0).argmax())
        for place, setting in enumerate(row.tried):
            about = {"loss": row.name, "chosen": place == best, **setting}
            about |= {CHOSEN_BY: scores[:, place].mean(), "seeds": len(scores)}
            tried.append(about)
        for seed in range(len(scores)):
            one = jax.tree.map(lambda leaf, at=(seed, best): leaf[at], trained)
            training = row.training(row.tried[best], seed)
            share = seconds / (len(heads) * len(scores))
            write_one(folder / "runs" / training.name, training, found, X, (row, one), share)
            trainings.append(training)
    study = planning.remember(folder, command, sorted(trainings, key=lambda each: each.seed))
    remember_settings(folder / f"settings-{trainings[0].data}-{heads[0][0].head}.csv", tried)
    return study


def remember_settings(file: Path, tried: Sequence[dict[str, Any]]) -> None:
    """A row a setting, after those of other losses that the file holds already."""
    before: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as stream:
            before = list(csv.DictReader(stream))
    rows = [*before, *tried]
    names = dict.fromkeys(name for row in rows for name in row)
    results.write_history(file, [dict.fromkeys(names, "") | row for row in rows])


def write_one(
    out: Path,
    training: Training,
    found: Features,
    X: dict[str, Array],
    head: tuple[Row, Trained],
    seconds: float,
) -> None:
    """The files of one training, as the trainers leave them."""
    row, trained = head
    out.mkdir(parents=True, exist_ok=True)
    logits = {
        split: np.asarray(logits_of(row.head, trained.parameters, X[split])).T
        for split in ("val", "test")
    }
    labels = found.labels("test")
    kept = {"val_labels": found.labels("val"), "val_logits": logits["val"]}
    ids = found.ids[found.split == "test"]
    results.write_predictions(out / "predictions.npz", ids, labels, logits["test"], **kept)
    counts, epoch = found.class_counts, int(trained.best_epoch)
    history = epochs(training.settings(), trained.history)
    speed = len(row.tried) * len(history) * counts.sum() / seconds
    results.write_json(
        out / "result.json",
        about(training, row, found)
        | {
            "best_validation": {
                "macro_f1": history[epoch - 1]["val_macro_f1"],
                "macro_f1_tuned": history[epoch - 1][CHOSEN_BY],
                "epoch": epoch,
            },
            "test": results.scores(labels, logits["test"]),
            "tuned": results.tuned(labels, logits["test"], class_counts=counts, **kept),
            "measured": {
                "images_per_second": speed,  # of all settings together
                "peak_memory_bytes": peak_host_memory(),
                "peak_memory_of": "host",
            },
            "device": cpu() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
            "versions": results.versions("flax") | {"optuna": version("optuna")},
        },
    )
    results.write_history(out / "history.csv", history)
    write_atomically(out / "seconds.json", json.dumps(seconds).encode())


def about(training: Training, row: Row, found: Features) -> dict[str, Any]:
    """What was trained on what, in the words of the trainers' result files."""
    settings = training.settings()
    words = settings.trained_alike() | {"arch": row.arch, "head": row.head, "sampler": row.sampler}
    loss = {"name": words.pop("loss"), **words.pop("loss_options"), "drw": words.pop("drw")}
    words["head_epochs"] = 0  # after the others: all of them are the head's
    words["pretrained"] = row.arch != "features" and settings.weights is None
    size = {split: len(found.labels(split)) for split in ("train", "val", "test")}
    data = {
        "name": found.name,
        "image_size": settings.image_size,
        "features": found.X.shape[1],
        "class_names": list(found.class_names),
        "class_counts": found.class_counts.tolist(),
        **size,
    }
    tried = {"settings_tried": len(row.tried)}
    return {"data": data, "loss": loss, "epochs": settings.epochs, **words, **tried}


def epochs(settings: Settings, history: dict[str, Array]) -> list[dict[str, Any]]:
    """The rows of a history file, one an epoch."""
    columns = {  # float32's digits, which float64 would write twice as long
        name: np.asarray(values, np.float64).round(7).tolist() for name, values in history.items()
    }
    return [
        {"epoch": epoch + 1, "learning_rate": settings.learning_rate_at(epoch)}
        | {name: values[epoch] for name, values in columns.items()}
        for epoch in range(settings.epochs)
    ]
