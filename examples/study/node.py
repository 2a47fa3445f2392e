"""What a node of a cluster does for a training: start its trainer, and wait for the end."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from examples.study.trainer import POLL, Ended, environment, launch


class Interrupted(Exception):
    """A trainer was ended, by nobody's wish; Ray tries it again."""


@dataclass(frozen=True)
class Order:
    """A training as a node gets it.

    words: what Python is started with; out: the training's folder, perhaps within cwd.
    threads, gpus: its share of the node; passed_on: the user's environment.
    from_outside: exit statuses of a trainer that others ended.
    patience: seconds to wait for a process that trains it already.
    """

    words: tuple[str, ...]
    out: str
    cwd: str
    threads: int
    gpus: float
    passed_on: dict[str, str]
    from_outside: frozenset[int]
    patience: float


def train(order: Order) -> Ended:
    """Start a trainer on this node and wait for its end, in a task of Ray.

    Raises:
        FileNotFoundError: the node does not see the folders.
        Interrupted: the trainer was ended from outside.
    """
    for folder in (order.cwd, os.path.join(order.cwd, order.out)):
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder} must be on a file system that every node sees, and is not there on "
                f"{socket.gethostname()}"
            )
    started = time.monotonic()
    env = environment(order.threads, 0 < order.gpus < 1) | order.passed_on
    if not order.gpus:  # Ray hides none from it then
        env["CUDA_VISIBLE_DEVICES"] = ""
    with stops() as asked:
        # the process of a worker that has just died may hold the lock yet
        while (popen := launch(order.words, Path(order.out), env, order.cwd)) is None:
            if asked:
                raise KeyboardInterrupt
            if time.monotonic() - started > order.patience:
                return Ended(None, 0.0)
            time.sleep(POLL)
        passed_on = 0
        while (status := popen.poll()) is None:
            for _ in asked[passed_on:]:
                popen.terminate()
                passed_on += 1
            with suppress(subprocess.TimeoutExpired):
                popen.wait(POLL)
    if status in order.from_outside and not passed_on:
        raise Interrupted(f"the trainer was ended from outside, with status {status}")
    return Ended(status, time.monotonic() - started)


@contextmanager
def stops() -> Iterator[list[int]]:
    """A list that grows by the signal each time that the study asks to stop.

    As an exception a stop may come while the trainer is started, and would lose it.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
