"""One training from its first step to its result file: where it is, and what outlives a kill.

The trainers hold what is a framework's: model, optimiser, step. A run holds what is not: which
images come next, what the epochs scored, checkpoints, and when to stop.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from examples.data import findings
from examples.data.augment import times_before
from examples.data.datasets import Dataset
from examples.training import config, results
from examples.training.checkpoints import Checkpoints
from examples.training.machine import cpu, peak_host_memory
from examples.training.mixup import mix
from examples.training.progress import Display
from examples.training.recipe import EARLIER
from examples.training.settings import Settings
from examples.training.start import STOPPED, check_shares, one_sentence, refuse_other_settings


def epoch_order(
    labels: np.ndarray, size: int, *, sampler: str, seed: int, epoch: int
) -> np.ndarray:
    """Which examples an epoch is trained on, in order: int64 (size,), of seed and epoch alone.

    Args:
        labels: int (N,), of all training examples; every class from 0 to the largest has one.
        size: at most N where they are shuffled.
        sampler: ``shuffle``, or ``balanced``: with replacement, each class equally likely.
    """
    rng = np.random.default_rng([seed, epoch])
    if sampler == "shuffle":
        return rng.permutation(len(labels))[:size]
    by_class, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    classes = rng.integers(len(counts), size=size)
    return by_class[(np.cumsum(counts) - counts)[classes] + rng.integers(counts[classes])]


class Processes(NamedTuple):
    """This process among those that train together.

    rank, world: which one it is of how many; process 0 writes and shows.
    agree: brings a flag into accord over all of them (True where any is).
    """

    rank: int = 0
    world: int = 1
    agree: Callable[[bool], bool] = bool


ALONE = Processes()


class Run:
    """The state of a training, shared by the three trainers.

    Args:
        settings, dataset: what is trained, on what.
        group: on which of how many processes.
        sync_every: steps after which the losses are fetched from the device, checked and shown.
    """

    def __init__(
        self, settings: Settings, dataset: Dataset, group: Processes = ALONE, sync_every: int = 1
    ) -> None:
        examples, batch = len(dataset.train), settings.batch_size
        if batch > examples and not settings.aot:  # which trains on none
            raise ValueError(
                f"batch_size must be at most the {examples} training images, got {batch}"
            )
        check_shares(batch, group.world, "processes", settings.accumulate)
        self.settings, self.dataset = settings, dataset
        self.rank, self.world, self.agree = group
        self.sync_every = sync_every
        self.epoch, self.step = 0, 0  # epochs done, and steps of the next one
        # of an epoch; what a shuffle leaves over sits it out
        self.steps = max(1, examples // batch)
        self.loss_sum, self.seconds = 0.0, 0.0  # of the epoch that is under way
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.best_f1 = 0, -math.inf
        self.head_alone = False  # whether the steps train crt's head, and nothing else
        self.head_from: int | None = None  # the epochs done when that began
        self.stopping = False  # for good: set where all processes agree
        self._asked_to_stop = False
        self._pending: list[Any] = []
        self.checkpoints = Checkpoints(settings.out / "checkpoints", self._warn)

    # --- begin and go on

    def resume(self) -> Path | None:
        """Take up the newest whole checkpoint: its folder, for the trainer to read, or None."""
        found = self.checkpoints.newest() if self.settings.resume else None
        if found is None:
            return None
        state = dict(found.state)
        refuse_other_settings(EARLIER | state.pop("decides"), self._decides())
        for name, value in state.items():
            setattr(self, name, value)
        return found.folder

    def __enter__(self) -> Self:
        settings, done = self.settings, self.epoch * self.steps + self.step
        with one_sentence():
            settings.out.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                config.write(settings.out, settings.flags())
        self._display = Display(
            settings.out / "tensorboard", settings.all_epochs, self.steps, done, self.rank == 0
        )
        self._handlers = {
            number: signal.signal(number, self._ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._display.__enter__()
        for line in self._opening(done):
            self._display.say(line)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            self._display.__exit__(kind, error, trace)
        except OSError as closing:  # what it could not write before either
            error = error or closing
        if isinstance(error, OSError):  # a full disk, above all
            raise SystemExit(
                f"error: {error}; --resume goes on from the last checkpoint"
            ) from error

    # --- an epoch

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self._stage_is_done() and (self.head_alone or not self.settings.head_epochs)

    def head_is_next(self) -> bool:
        """Whether all that is left to train is crt's head, which is not begun yet."""
        return self._stage_is_done() and not (self.done or self.head_alone)

    def begin_head(self) -> Path:
        """The checkpoint whose features crt keeps; from here on the best epoch is the head's."""
        folder = self.checkpoints.of_epoch(self.best_epoch)
        self.head_alone, self.best_epoch, self.best_f1 = True, 0, -math.inf
        self.head_from = self.epoch
        return folder

    def train_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This process's share of what is left of the epoch: uint8 (b, S, S, 3), int64 (b,).

        With mixup the labels are distributions, float32 (b, C), but not the head's.
        Ends early when the run is asked to stop.
        """
        batch, size = self.settings.batch_size, self.steps * self.settings.batch_size
        sampler = "balanced" if self.head_alone else self.settings.sampler
        about = {"sampler": sampler, "seed": self.settings.seed, "epoch": self.epoch}
        order = epoch_order(self.dataset.train.labels, size, **about)
        share = np.stack([order, times_before(order)]).reshape(2, self.steps, batch)
        mine, times = share[:, self.step :, self.rank :: self.world].reshape(2, -1)
        self._clock = time.perf_counter()
        batches = self.dataset.train.batches(mine, batch // self.world)
        if (augmentation := self.settings.augmentation(self.epoch)) is not None:
            batches = augmentation.batches(batches, mine, times, batch // self.world)
        for step, (images, labels) in enumerate(batches, self.step):  # which may be read ahead
            yield self._mixed(images, labels, step) if self.mixes() else (images, labels)
            if self.stopping:
                break

    def mixes(self) -> bool:
        """Whether images are mixed, and labels are distributions, as the network is trained now."""
        return self.settings.mixup is not None and not self.head_alone

    def label(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of an image's label, as the network is trained now."""
        if self.mixes():
            return (len(self.dataset.class_names),), "float32"
        return self.dataset.train.labels.shape[1:], "int64"

    def stage_begins(self) -> bool:
        """Whether the network, or the head alone, has made no step yet."""
        return (self.epoch, self.step) == (self._begun(), 0)

    def step_seed(self) -> int:
        """A seed for what is random in the next step, on this process: dropout and the like."""
        words = [self.settings.seed, self.epoch, self.step, self.rank]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)

    def took_step(self, loss: Any, train_f1: float | None = None) -> None:
        """Count a step; its loss may still be on the device.

        Args:
            loss: of this step alone.
            train_f1: macro-F1 of the epoch so far, which is shown where it is known.

        Raises:
            SystemExit: a loss that is not finite; the sentence names the step.
        """
        self.step += 1
        self._pending.append(loss)
        if self.step % self.sync_every and self.step < self.steps:
            return
        values, self._pending = [float(value) for value in self._pending], []
        for step, value in enumerate(values, self.step - len(values) + 1):
            if not math.isfinite(value):
                raise SystemExit(
                    f"the loss is {value} in epoch {self.epoch + 1}, step {step} of {self.steps}, "
                    f"so the run stops; try a lower --learning-rate"
                )
            self.loss_sum += value
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self._display.step(len(values), values[-1], train_f1)
        self.stopping = self.agree(self._asked_to_stop)

    def end_epoch(self, val_logits: np.ndarray, val_loss: float) -> None:
        """Score the epoch: logits float (N, C) of the validation split, in its order."""
        scores = results.of_epoch(self.dataset.val.labels, val_logits)
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": self.settings.learning_rate_at(self.epoch, self.head_from),
            "train_loss": self.loss_sum / self.steps,
            "val_loss": val_loss,
            **scores,
            "images_per_second": self.steps * self.settings.batch_size / self.seconds,
        }
        self.history.append(row)
        self.epoch, self.step, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        if (f1 := scores["val_macro_f1"]) > self.best_f1:
            self.best_epoch, self.best_f1 = self.epoch, f1
        self._display.epoch(row, self.best_f1, self.best_epoch)

    def save(self, write: Callable[[Path], None]) -> None:
        """Write a checkpoint and the history; ``write`` puts the model and the rest in a folder."""
        if self.rank:
            return
        names = ("epoch", "step", "loss_sum", "seconds", "history", "best_epoch", "best_f1")
        names += ("head_alone", "head_from")
        state = {name: getattr(self, name) for name in names}
        self.checkpoints.save(state | {"decides": self._decides()}, write)
        if self.history:
            results.write_history(self.settings.out / "history.csv", self.history)

    # --- the end

    def stop(self) -> int:
        """Say how to go on after Ctrl-C; the exit status."""
        self._display.say(
            f"Stopped and saved after {self._reached()}; --resume goes on from there."
        )
        return STOPPED

    def finish(
        self,
        test_logits: np.ndarray,
        val_logits: np.ndarray,
        device: str,
        peak_device_memory: int | None = None,
    ) -> None:
        """Write ``predictions.npz`` and ``result.json``, of logits of the best epoch's model."""
        if self.rank:
            return
        out, test, val = self.settings.out, self.dataset.test, self.dataset.val
        kept = {"val_labels": val.labels, "val_logits": val_logits}
        file = out / "predictions.npz"
        results.write_predictions(file, test.ids, test.labels, test_logits, **kept)
        found = results.of_test(self.dataset, test_logits, val_logits)
        speeds = [row["images_per_second"] for row in self.history]
        results.write_json(
            out / "result.json",
            self._about()
            | {
                "epochs_run": self.epoch,
                "best_validation": {"macro_f1": self.best_f1, "epoch": self.best_epoch},
                **found,
                "measured": {
                    "images_per_second": float(np.median(speeds)),
                    "peak_memory_bytes": peak_device_memory or peak_host_memory(),
                    "peak_memory_of": "device" if peak_device_memory else "host",
                },
                "device": cpu() if device == "cpu" else device,
                "versions": results.versions(self.settings.framework),
            },
        )
        if self._stopped_early():
            self._display.say(
                f"Stopped early after {self._reached()}: no better validation macro-F1 in "
                f"{self.settings.early_stopping} epochs."
            )
        self._display.say(
            f"{results.in_words(found, self.best_epoch)}; all of it in {out / 'result.json'}"
        )

    # --- inside

    def _mixed(
        self, images: np.ndarray, labels: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        words = (self.settings.seed, self.epoch, step, self.rank)
        classes = len(self.dataset.class_names)
        return mix(images, labels, classes, self.settings.mixup, words)

    def _stage_is_done(self) -> bool:
        """Whether the network, or the head if it is trained alone, has had its epochs."""
        epochs, _ = self.settings.stage(self.head_alone)
        return self.epoch - self._begun() >= epochs or self._stopped_early()

    def _stopped_early(self) -> bool:
        # of what a checkpoint holds, so that a run that is resumed stops where it would have
        waited = self.epoch - max(self.best_epoch, self._begun())
        return waited >= (self.settings.early_stopping or math.inf)

    def _begun(self) -> int:
        """The epochs done when this stage began; a head of an older run began on time."""
        if not self.head_alone:
            return 0
        return self.settings.epochs if self.head_from is None else self.head_from

    def _decides(self) -> dict[str, Any]:
        """What decides the numbers of this run: another value makes it another run."""
        return self.settings.trained_alike() | {"dataset": self._dataset()}

    def _dataset(self) -> dict[str, Any]:
        data = self.dataset
        return {
            "name": data.name,
            "image_size": data.image_size,
            "class_names": list(data.class_names),
            "class_counts": data.class_counts.tolist(),
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
        }

    def _about(self) -> dict[str, Any]:
        settings = self.settings.trained_alike()
        loss = {"name": settings.pop("loss"), **settings.pop("loss_options")}
        loss["drw"] = settings.pop("drw")
        return {"data": self._dataset(), "loss": loss, "epochs": self.settings.epochs, **settings}

    def _opening(self, done: int) -> Iterator[str]:
        data, settings = self.dataset, self.settings
        say = findings.in_words if data.has_findings else "{} {}".format
        counts = ", ".join(map(say, data.class_names, data.class_counts))
        yield f"{data.name}: {len(data.train)} training images ({counts})"
        yield f"{len(data.val)} to choose the epoch, {len(data.test)} to test"
        size = f"{data.image_size} × {data.image_size} pixels"
        yield from data.notes
        options = ", ".join(f"{k} {v}" for k, v in settings.loss_options.items())
        yield f"{settings.arch} at {size} with {settings.loss}{f' ({options})' * bool(options)}"
        if done:
            yield f"Going on after {self._reached()}."
        elif settings.resume:
            yield "Nothing to resume yet: starting at the first epoch."

    def _reached(self) -> str:
        step = f", step {self.step} of {self.steps}" if self.step else ""
        return f"epoch {self.epoch} of {self.settings.all_epochs}{step}"

    def _ask_to_stop(self, number: int, frame: object) -> None:
        # torchrun passes on what the terminal has sent to its processes already
        if self._asked_to_stop and self.world == 1:
            self._display.say("Stopped at once; --resume goes on from the last checkpoint.")
            raise SystemExit(STOPPED)
        self._asked_to_stop = True

    def _warn(self, sentence: str) -> None:
        if self.rank == 0:
            print(sentence, flush=True)
