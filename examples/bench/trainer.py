"""Images a second of the PyTorch trainer beside a plain loop, as PyTorch's tutorials have it.

    python -m examples.bench.trainer

The plain loop is torchvision's ``ImageFolder`` and a ``DataLoader`` with a process a core, the same
network, optimiser, batch and cross-entropy. Both train on the same JPEG files, in turns; images a
second are those of an epoch, without the first of each turn. The trainer is measured with images
kept in memory, which it does below 2 GiB, and decoded anew in each epoch.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from csv import DictReader
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from examples import train_torch
from examples.bench.measure import host_clock
from examples.data import datasets
from examples.models import torch as models
from examples.training.flags import at_least
from examples.training.machine import cpu
from examples.training.settings import ARCHS, MEAN, STD, parse
from lmf_multi.torch import LMFLoss

COUNTS = (6, 3, 2, 1)  # of the classes, in proportion
LOSS_CALLS = 2000


@dataclass(frozen=True)
class Job:
    """What both train."""

    data: Path  # with train/, val/ and test/
    arch: str
    image_size: int
    batch_size: int
    epochs: int  # of a turn
    workers: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser("python -m examples.bench.trainer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--images", type=at_least(24), default=960, help="to train on (960)")
    add("--side", type=at_least(8), default=256, help="pixels of the files (256)")
    add("--image-size", type=at_least(8), default=64, help="pixels that are trained on (64)")
    add("--arch", choices=ARCHS, default="small")
    add("--batch-size", type=at_least(1), default=32)
    add("--epochs", type=at_least(2), default=4, help="of each turn (4)")
    add("--rounds", type=at_least(1), default=5, help="turns of each (5)")
    add("--workers", type=at_least(1), default=os.cpu_count(), help="(a core each)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images, args.side)
        size = (args.image_size, args.batch_size, args.epochs, args.workers)
        speeds = measure(Job(Path(folder), args.arch, *size), args.rounds)
    show(speeds, args)
    return 0


def write_images(folder: Path, number: int, side: int) -> None:
    """JPEG files of smooth noise in class folders of each split."""
    rng = np.random.default_rng(0)
    for split, images in (("train", number), ("val", 24), ("test", 24)):
        for label, count in enumerate(COUNTS):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for i in range(images * count // sum(COUNTS)):
                coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                coarse.resize((side, side), Image.Resampling.BICUBIC).save(place / f"{i}.jpg")


def measure(job: Job, rounds: int) -> dict[str, np.ndarray]:
    """Images a second (rounds,) of each contender, which take turns."""
    contenders: dict[str, Callable[[], Iterator[float]]] = {
        "plain loop": partial(plain, job),
        "trainer, images in memory": partial(trainer, job, datasets.MEMORY_BUDGET),
        "trainer, decoding each epoch": partial(trainer, job, 0),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            _, *epochs = contender()  # the first warms up
            found[name].append(float(np.median(epochs)))
    return {name: np.array(speeds) for name, speeds in found.items()}


def plain(job: Job) -> Iterator[float]:
    """Images a second of each epoch."""
    size = (job.image_size, job.image_size)
    prepare = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = ImageFolder(str(job.data / "train"), transforms.Compose(prepare))
    loader = DataLoader(
        images,
        job.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        persistent_workers=True,
    )
    model = models.build(job.arch, len(COUNTS)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=5e-4)
    for _ in range(job.epochs):
        start, total = time.perf_counter(), 0.0
        for pixels, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(pixels), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield len(loader) * job.batch_size / (time.perf_counter() - start)


def trainer(job: Job, budget: int) -> Iterator[float]:
    """Images a second of each epoch, as its history has them."""
    size = [f"--image-size={job.image_size}", f"--batch-size={job.batch_size}"]
    flags = [f"--data={job.data}", f"--arch={job.arch}", f"--workers={job.workers}", *size]
    before, datasets.MEMORY_BUDGET = datasets.MEMORY_BUDGET, budget
    try:
        with tempfile.TemporaryDirectory() as out, redirect_stdout(StringIO()):
            flags += [f"--epochs={job.epochs}", "--loss=lmf", f"--out={out}/run", "--device=cpu"]
            train_torch.main(flags)
            with Path(out, "run", "history.csv").open(newline="") as stream:
                rows = list(DictReader(stream))
    finally:
        datasets.MEMORY_BUDGET = before
    for row in rows:
        yield float(row["images_per_second"])


def seconds_of_loss(batch_size: int) -> float:
    """Of LMF's forward and backward pass."""
    settings, counts = parse("torch", ["--loss", "lmf"], ""), np.array(COUNTS) * 100
    criterion = LMFLoss(**settings.loss_arguments(counts))
    logits = torch.randn(batch_size, len(COUNTS), requires_grad=True)
    labels = torch.arange(batch_size) % len(COUNTS)

    def call() -> None:
        logits.grad = None
        criterion(logits, labels).backward()

    host_clock(call, LOSS_CALLS // 10, "cpu")
    return host_clock(call, LOSS_CALLS, "cpu") / LOSS_CALLS


def show(speeds: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    """A table, and the loss's share of a step."""
    pixels = f"{args.image_size} × {args.image_size} pixels of {args.side} × {args.side}"
    table = Table(title=f"{args.arch}, {pixels}, batches of {args.batch_size}; {cpu()}")
    table.add_column("")
    table.add_column("images a second", justify="right")
    table.add_column("over the plain loop", justify="right")
    baseline = speeds["plain loop"]
    for name, found in speeds.items():
        low, ratio, high = np.percentile(found / baseline, [25, 50, 75])
        table.add_row(name, f"{np.median(found):.0f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    console = Console()
    console.print(table)
    step = args.batch_size / np.median(speeds["trainer, images in memory"])
    loss = seconds_of_loss(args.batch_size)
    console.print(f"The loss takes {1e6 * loss:.0f} µs, {loss / step:.2%} of a step in memory.")


if __name__ == "__main__":
    sys.exit(main())
