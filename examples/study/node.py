"""What a node of a cluster does for a training: start its trainer, and wait for the end."""

import math
import os
import socket
import time
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
    # the process of a worker that has just died may hold the lock yet
    while (popen := launch(order.words, Path(order.out), env, order.cwd)) is None:
        if time.monotonic() - started > order.patience:
            return Ended(None, 0.0)
        time.sleep(POLL)
    cancelled = False
    while True:
        try:
            status = popen.wait(math.inf)  # with a timeout it looks again and again
            break
        except KeyboardInterrupt:
            cancelled = True
            popen.terminate()
    if status in order.from_outside and not cancelled:
        raise Interrupted(f"the trainer was ended from outside, with status {status}")
    return Ended(status, time.monotonic() - started)
