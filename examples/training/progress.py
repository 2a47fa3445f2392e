"""What a training shows: a bar in a terminal, a line an epoch elsewhere, TensorBoard's curves."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.summary import Writer

# TensorBoard's switch for writing without TensorFlow, which it would import where it is installed
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


class Display:
    """Shows a run as it goes; silent on all processes but one.

    Args:
        folder: of TensorBoard's events.
        epochs, steps: of the whole run; steps of one epoch.
        done: steps done before, by a run that is resumed.
        visible: whether this process is the one that shows.
    """

    def __init__(self, folder: Path, epochs: int, steps: int, done: int, visible: bool) -> None:
        self.epochs, self.steps, self.visible = epochs, steps, visible
        self.console = Console(highlight=False, markup=False, quiet=not visible, soft_wrap=True)
        self.bar = Progress(  # fits in 80 columns
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("loss {task.fields[loss]}{task.fields[f1]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=not (visible and self.console.is_terminal),
            transient=True,
        )
        self.task = self.bar.add_task(
            self._title(done // steps), total=epochs * steps, completed=done, loss="–", f1=""
        )
        self.writer = Writer(str(folder)) if visible else None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def say(self, sentence: str) -> None:
        """Print above the bar."""
        self.console.print(sentence)

    def step(self, steps: int, loss: float, train_f1: float | None = None) -> None:
        """Move on by some steps, the last of which had this loss."""
        f1 = "" if train_f1 is None else f", F1 {train_f1:.3f}"
        self.bar.update(self.task, advance=steps, loss=f"{loss:.3f}{f1}")

    def epoch(self, row: dict[str, Any], best_f1: float, best_epoch: int) -> None:
        """Show the scores of an epoch: a row of the history; in a terminal only of the best."""
        epoch, f1 = row["epoch"], row["val_macro_f1"]
        self.bar.update(
            self.task, description=self._title(epoch), f1=f", val F1 {f1:.3f}, best {best_f1:.3f}"
        )
        if epoch == best_epoch or not self.console.is_terminal:
            self.say(
                f"epoch {epoch}/{self.epochs}: loss {row['train_loss']:.4f}, "
                f"val loss {row['val_loss']:.4f}, val macro-F1 {f1:.4f}, "
                f"best {best_f1:.4f} (epoch {best_epoch}), {row['images_per_second']:.0f} images/s"
            )
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, epoch)
            self.writer.flush()

    def _title(self, epochs_done: int) -> str:
        return f"epoch {min(epochs_done + 1, self.epochs)}/{self.epochs}"
