"""Cross-entropy and LMF on long-tailed handwritten digits, in PyTorch, Flax and Keras.

    python -m examples.demo            three seeds, under three minutes on two cores
    python -m examples.demo --quick    one seed, few epochs

A small CNN learns scikit-learn's digits, the commonest of which has 50 times the training images of
the rarest; the test images are balanced. Images, architecture, optimiser (Adam), epochs and batch
size are the same everywhere; weights start as each framework likes to start them.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.metrics import f1_score

from examples.data import digits
from examples.study.report import LOSSES, Run, comparison, table
from examples.training.flags import at_least
from examples.training.quiet import stderr_kept_back

EPOCHS, SEEDS = 100, 3  # more epochs move neither loss's scores
BATCH_SIZE = 56  # five equal batches of the 280 training images
LEARNING_RATE = 5e-3
KERAS_BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
# in examples.training.demo_NAME: what the table calls it, what has to be installed. PyTorch comes
# before TensorFlow: loaded after it, PyTorch's compiler brings a second LLVM, which aborts.
FRAMEWORKS = {
    "torch": ("PyTorch", ("torch",)),
    "flax": ("Flax NNX", ("jax", "flax", "optax")),
    "keras": ("Keras", ("keras", KERAS_BACKEND)),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `--quick` only changes the defaults."""
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=at_least(1), help=f"passes over the training images ({EPOCHS})")
    add("--seeds", type=at_least(1), help=f"trainings from scratch to average over ({SEEDS})")
    add("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    add("--imbalance", type=float, default=50, help="images of digit 0 to images of digit 9 (50)")
    add("--quick", action="store_true", help="10 epochs and 1 seed where not given")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (10 if args.quick else EPOCHS)
    args.seeds = args.seeds or (1 if args.quick else SEEDS)
    try:
        args.counts = digits.long_tail(10, digits.HEAD, args.imbalance)
    except ValueError as error:
        parser.error(str(error))
    return args


def missing(framework: str) -> str:
    """Which of a framework's packages are absent, in words; empty when none is."""
    return " and ".join(name for name in FRAMEWORKS[framework][1] if find_spec(name) is None)


def import_train(framework: str) -> Callable[..., np.ndarray]:
    """The framework's `train` function; the first call imports the framework."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or it complains of a missing GPU
    with stderr_kept_back():
        return importlib.import_module(f"examples.training.demo_{framework}").train


def run(
    framework: str,
    loss: str,
    *,
    epochs: int,
    seed: int,
    imbalance: float,
    on_epoch: Callable[[float], object] = lambda value: None,
) -> Run:
    """Train once and score; importing comes before the clock starts."""
    name = FRAMEWORKS[framework][0]
    train = import_train(framework)
    images = digits.load(imbalance, seed)
    epoch_losses: list[float] = []

    def record(value: float) -> None:
        epoch_losses.append(value)
        if not np.isfinite(value):
            where = f"{name}, {loss}, seed {seed}, epoch {len(epoch_losses)}"
            raise FloatingPointError(f"{where}: the loss is {value}")
        on_epoch(value)

    start = time.perf_counter()
    recipe = digits.Recipe(epochs, BATCH_SIZE, LEARNING_RATE, seed)
    predicted = train(images, loss, recipe, record)
    seconds = time.perf_counter() - start
    f1 = f1_score(images.test_labels, predicted, average=None, labels=range(10), zero_division=0)
    return Run(name, loss, seed, f1.mean(), f1[-1], seconds, tuple(epoch_losses))


def run_all(args: argparse.Namespace, frameworks: Sequence[str], console: Console) -> list[Run]:
    """Every framework, loss and seed, under a progress bar, or line by line outside a terminal."""
    todo = [(f, loss, seed) for f in frameworks for loss in LOSSES for seed in range(args.seeds)]
    runs = []
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}% "),
        TimeElapsedColumn(),
    )
    live = console.is_terminal
    with Progress(*columns, console=console, disable=not live, transient=True) as progress:
        bar = progress.add_task("", total=len(todo) * args.epochs)
        for framework, loss, seed in todo:
            name = f"{FRAMEWORKS[framework][0]}, {loss}"

            def show(value: float, name: str = name) -> None:
                progress.update(bar, advance=1, description=f"{name}: loss {value:.3f}")

            progress.update(bar, description=f"{name}: starting")
            done = run(
                framework,
                loss,
                epochs=args.epochs,
                seed=seed,
                imbalance=args.imbalance,
                on_epoch=show,
            )
            runs.append(done)
            if not live:
                print(
                    f"{name}, seed {seed}: loss {done.epoch_losses[0]:.3f} to "
                    f"{done.epoch_losses[-1]:.3f}, macro-F1 {done.macro_f1:.3f}, "
                    f"rarest-class F1 {done.rarest_f1:.3f}, {done.seconds:.1f} s",
                    flush=True,
                )
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table and what it says; 1 if a framework asked for is not installed."""
    args = parse(argv)
    console = Console(highlight=False, markup=False)
    for framework in args.frameworks:
        if absent := missing(framework):
            console.print(
                f"{FRAMEWORKS[framework][0]} is left out because {absent} is not installed; "
                "run: pip install 'lmf-multi[all]'"
            )
    present = [f for f in FRAMEWORKS if f in args.frameworks and not missing(f)]
    if not present:
        return 1

    console.print(
        f"Digits 0 to 9 with {', '.join(map(str, args.counts))} training images; "
        f"{args.epochs} epochs, {args.seeds} seed{'s' * (args.seeds > 1)}; "
        f"Keras runs on {KERAS_BACKEND}."
    )
    runs = run_all(args, present, console)

    console.print(table(runs))
    rarest = f"digit {args.counts.argmin()}, {args.counts.min()} training images"
    console.print(f"Rarest class ({rarest}): {comparison(runs, 'rarest_f1')}.")
    console.print(f"Macro-F1: {comparison(runs, 'macro_f1')}.")
    return 0 if set(present) == set(args.frameworks) else 1


if __name__ == "__main__":
    sys.exit(main())
