"""Time of heads in one compiled program: by losses, by seeds, and beside PyTorch, one by one.

    python -m examples.bench.heads
    python -m examples.bench.heads --losses 1,10 --seeds 1,10 --epochs 1

Linear heads on random features of HAM10000's size (6,308 to train, 702 to validate, 1,280 numbers
each, 7 classes), 12 settings a loss. Times are of an epoch when all is compiled, the program's the
median of three. PyTorch trains ``--peers`` of the same heads in one thread, each by itself. The
ratio is of the cores' seconds, so that what else a machine does counts for neither, and PyTorch
would use all cores as well.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.training.heads import Arrays, Recipe, build_loss, orders, stack, train
from examples.training.machine import hardware
from examples.training.results import macro_f1
from examples.training.search import draw
from examples.training.settings import LOSSES
from lmf_multi.torch import LMFLoss

COUNTS = (230, 361, 770, 79, 779, 3991, 98)  # training images of each class, about as HAM10000's
FEATURES, VALIDATION, BATCH, SETTINGS, ROUNDS = 1280, 702, 128, 12, 3


class TorchRun(NamedTuple):
    """A head of PyTorch: the mean loss (E,) and validation macro-F1 (E,) of its epochs."""

    losses: list[float]
    val_f1: list[float]


def train_in_torch(
    head: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    arrays: Sequence[np.ndarray],
    batches: np.ndarray,
    setting: dict[str, float],
    decay: Sequence[float],
) -> TorchRun:
    """Train a head by itself, as a trainer would.

    Args:
        head: features (B, D) to logits (B, C).
        criterion: the loss of logits (B, C) and labels (B,).
        arrays: features and labels to train on, and to validate with, as ``Arrays`` has them.
        batches: int (E, T, B), which examples.
        setting: Adam's ``learning_rate`` and ``weight_decay``.
        decay: (E,), what the rate is multiplied by.
    """
    X, y, val_X, val_y = map(torch.from_numpy, arrays)
    rate, penalty = setting["learning_rate"], setting["weight_decay"]
    optimizer = torch.optim.Adam(head.parameters(), lr=rate, weight_decay=penalty)
    run = TorchRun([], [])
    for epoch, factor in zip(torch.from_numpy(batches), decay, strict=True):
        optimizer.param_groups[0]["lr"] = rate * factor
        losses = []
        for rows in epoch:
            loss = criterion(head(X[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        run.losses.append(float(torch.stack(losses).mean()))
        with torch.no_grad():
            run.val_f1.append(macro_f1(val_y.numpy(), head(val_X).numpy()))
    return run


def made_up() -> list[np.ndarray]:
    """Features and labels to train on, and to validate with."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(COUNTS)), COUNTS)
    sizes = {"train": rng.permutation(labels), "val": rng.choice(labels, VALIDATION)}
    arrays: list[np.ndarray] = []
    for y in sizes.values():
        arrays += [rng.normal(size=(len(y), FEATURES)).astype(np.float32), y]
    return arrays


class Times(NamedTuple):
    """Seconds of an epoch, on the clock and of all cores together."""

    clock: float
    cores: float


def timed(call: Callable[[], object], rounds: int, epochs: int) -> Times:
    """The medians of so many calls, of so many epochs each."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        call()
        took.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return Times(*(statistics.median(each) / epochs for each in zip(*took, strict=True)))


def of_program(
    arrays: Sequence[np.ndarray], losses: int, seeds: int, epochs: int
) -> tuple[Times, float]:
    """An epoch of all heads, and seconds of compiling."""
    names = ([*LOSSES] * losses)[:losses]
    tried = [(name, setting) for name in names for setting in draw(name, (), SETTINGS)]
    built = []
    for name, setting in tried:
        options = {k: v for k, v in setting.items() if k in LOSSES[name]}
        built.append(build_loss(name, LOSSES[name] | options, np.array(COUNTS)))
    heads = stack(built, [setting for _, setting in tried])
    order = orders(arrays[1], seeds, sampler="shuffle", epochs=epochs, batch_size=BATCH)
    given = (Arrays(*map(jnp.asarray, arrays)), [(heads, order)])
    start = time.perf_counter()
    program = train.lower(*given, recipe=Recipe("linear", len(COUNTS), (1.0,) * epochs)).compile()
    compiling = time.perf_counter() - start
    return timed(lambda: jax.block_until_ready(program(*given)), ROUNDS, epochs), compiling


def of_torch(arrays: Sequence[np.ndarray], peers: int, epochs: int) -> Times:
    """An epoch of one head with LMF, in one thread."""
    settings = iter(draw("lmf", (), peers))
    order = orders(arrays[1], 1, sampler="shuffle", epochs=epochs, batch_size=BATCH)
    batches, threads = np.asarray(order.rows[0], np.int64), torch.get_num_threads()

    def one() -> None:
        setting = next(settings)
        options = {k: v for k, v in setting.items() if k in LOSSES["lmf"]}
        criterion = LMFLoss(COUNTS, **LOSSES["lmf"] | options)
        head = nn.Linear(FEATURES, len(COUNTS))
        train_in_torch(head, criterion, arrays, batches, setting, (1.0,) * epochs)

    torch.set_num_threads(1)
    try:
        return timed(one, peers, epochs)
    finally:
        torch.set_num_threads(threads)


def numbers(text: str) -> list[int]:
    """An argparse type.

    >>> numbers("1,10")
    [1, 10]
    """
    return [int(each) for each in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        "python -m examples.bench.heads", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--losses", type=numbers, default=[1, 5, 10], metavar="N,N,…", help="(1,5,10)")
    add("--seeds", type=numbers, default=[1, 5, 10], metavar="N,N,…", help="(1,5,10)")
    add("--epochs", type=int, default=2, help="that are timed (2)")
    add("--peers", type=int, default=5, help="heads of PyTorch (5)")
    args = parser.parse_args(argv)
    arrays = made_up()
    peer = of_torch(arrays, args.peers, args.epochs)
    table = Table()
    columns = ("losses", "seeds", "heads", "compile s", "epoch s", "core s", "PyTorch's core s ÷")
    for heading in columns:
        table.add_column(heading, justify="right")
    for losses in args.losses:
        for seeds in args.seeds:
            took, compiling = of_program(arrays, losses, seeds, args.epochs)
            heads = losses * seeds * SETTINGS
            ratio = peer.cores * heads / took.cores
            seconds = (f"{compiling:.1f}", f"{took.clock:.2f}", f"{took.cores:.2f}")
            table.add_row(str(losses), str(seeds), str(heads), *seconds, f"{ratio:.1f}")
    console = Console()
    console.print(table)
    about = ", ".join(f"{k} {v}" for k, v in hardware(jax.default_backend()).items())
    console.print(f"PyTorch, one by one: {1e3 * peer.cores:.0f} ms an epoch of a head. {about}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
