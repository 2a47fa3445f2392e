"""Trainings on this machine: a few at once, each with its share of the cores and of the GPUs."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from examples.study.planning import Study, Training
from examples.study.trainer import POLL, Ended, environment, launch
from examples.training.machine import cores

Command = Callable[[Training, int], Sequence[str]]


@dataclass
class Process:
    """A training under way; ``popen`` is None where another process trains it already."""

    training: Training
    popen: subprocess.Popen[bytes] | None
    devices: str | None
    release: Callable[[str | None], object]  # takes the devices back
    started: float = field(default_factory=time.monotonic)

    def ended(self) -> Ended | None:
        """None while it runs."""
        if self.popen is not None and self.popen.poll() is None:
            return None
        self.release(self.devices)
        status = None if self.popen is None else self.popen.returncode
        return Ended(status, time.monotonic() - self.started)

    def stop(self) -> None:
        """Ask it to save and end; asked again, it ends at once."""
        if self.popen is not None:
            self.popen.terminate()


class LocalEngine:
    """So many trainings at once on this machine.

    Args:
        jobs: how many.
        words: what Python is started with for a training, as ``command`` has it.
    """

    def __init__(self, jobs: int, words: Command | None = None) -> None:
        self.jobs, self._words = jobs, words or command
        self.threads = max(1, cores() // jobs)
        devices = gpus() if jobs > 1 else []  # one training may have them all
        self._free = shares(devices, jobs)
        self._shared = jobs > max(1, len(devices))

    def room(self) -> int:
        """How many trainings it can have under way at once."""
        return self.jobs

    def start(self, study: Study, training: Training) -> Process:
        """Have one begin, or go on."""
        devices = self._free.pop(0)
        env = environment(self.threads, self._shared)
        if devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = devices
        popen = launch(self._words(training, self.threads), study.out(training), env)
        return Process(training, popen, devices, self._free.append)

    def wait(self) -> Sequence[str]:
        """A moment."""
        time.sleep(POLL)
        return ()

    def close(self) -> None:
        """Nothing is held."""


def command(training: Training, threads: int) -> list[str]:
    """A trainer's; it decodes in as many threads as it computes in, unless told otherwise."""
    return [
        *("-m", f"examples.train_{training.framework}"),
        *("--workers", str(threads)),
        *training.arguments,
    ]


def gpus() -> list[str]:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, or what is there."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:  # of which CUDA reads as far as it can
        names = (name.strip() for name in chosen.split(","))
        return list(takewhile(lambda name: name not in ("", "-1"), names))
    if shutil.which("nvidia-smi") is None:
        return []
    query = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def shares(devices: Sequence[str], jobs: int) -> list[str | None]:
    """The CUDA_VISIBLE_DEVICES of each job: as many for each, or one that several share in turn.

    >>> shares(["0", "1", "2", "3", "4"], 2)
    ['0,1', '2,3']
    >>> shares(["0", "1"], 3)
    ['0', '1', '0']
    >>> shares([], 2)
    [None, None]
    """
    if not devices:
        return [None] * jobs
    each = len(devices) // jobs
    if each:
        return [",".join(devices[each * i : each * (i + 1)]) for i in range(jobs)]
    return [devices[i % len(devices)] for i in range(jobs)]
