"""Trainings as processes: a few at once, each with its share of the cores, its log and its lock.

The lock is on the log, which the process itself holds open: a training that goes on after its
study was killed, or runs on another machine that shares the folder, is not started again.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from examples.study.planning import Study, Training
from examples.training.checkpoints import write_atomically
from examples.training.machine import cores

LOG = "log.txt"
LOG_LINES = 5  # of a failed training, that are shown
POLL = 0.1  # seconds
WAITING, RUNNING, DONE, FAILED, STOPPED, ELSEWHERE = (
    "waiting",
    "running",
    "done",
    "failed",
    "stopped",
    "running elsewhere",
)


@dataclass
class Process:
    """A training under way."""

    training: Training
    popen: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    asked: int = 0  # times that it was asked to stop

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started


class Execution:
    """Runs the trainings of a study that have no result yet.

    Args:
        study: where the trainings keep their files.
        trainings: those of it that are this process's to run.
        jobs: how many run at once.
        say: called with a training and its new state, after each change.
    """

    def __init__(
        self,
        study: Study,
        trainings: Sequence[Training],
        jobs: int,
        say: Callable[[Training, str], object],
    ) -> None:
        self.study, self.jobs, self._say = study, jobs, say
        self.states = {t: DONE if study.result(t) else WAITING for t in trainings}
        self.running: list[Process] = []
        # seconds that each which is done took, in all its attempts, where known
        self._took = {t: study.seconds(t) for t, state in self.states.items() if state == DONE}
        self._asked = 0  # times that the user asked to stop

    def count(self) -> Counter[str]:
        """Trainings in each state."""
        return Counter(self.states.values())

    def run(self) -> None:
        """Return when nothing runs any more; Ctrl-C lets the trainings save and end."""
        waiting = deque(t for t, state in self.states.items() if state == WAITING)
        with self._signals(), self._no_orphans():
            while self.running or (waiting and not self._asked):
                while waiting and len(self.running) < self.jobs and not self._asked:
                    self._start(waiting.popleft())
                for process in tuple(self.running):
                    if process.popen.poll() is not None:
                        self._end(process)
                    elif process.asked < self._asked:
                        process.popen.terminate()
                        process.asked += 1
                time.sleep(POLL)

    @property
    def stopped(self) -> bool:
        """Whether the user asked to stop."""
        return self._asked > 0

    def seconds_left(self) -> float | None:
        """An estimate from the trainings of the same kind that have ended; None before any has."""
        known = {t: seconds for t, seconds in self._took.items() if seconds is not None}
        if not known:
            return None

        def expected(training: Training) -> float:
            alike = [s for t, s in known.items() if t.kind == training.kind]
            values = alike or list(known.values())
            return sum(values) / len(values)

        left = sum(expected(t) for t, state in self.states.items() if state == WAITING)
        left += sum(max(expected(p.training) - p.seconds, 0) for p in self.running)
        return left / self.jobs

    def log(self, training: Training) -> Path:
        """What a training printed, in all its attempts."""
        return self.study.out(training) / LOG

    def last_lines(self, training: Training) -> list[str]:
        """The end of its log."""
        return self.log(training).read_text(errors="replace").splitlines()[-LOG_LINES:]

    # --- inside

    def _start(self, training: Training) -> None:
        out = self.study.out(training)
        out.mkdir(parents=True, exist_ok=True)
        with self.log(training).open("a") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._set(training, ELSEWHERE)
                return
            popen = subprocess.Popen(
                [*command(training, self._threads()), "--out", str(out), "--resume"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._threads(), self.jobs),
                start_new_session=True,  # a terminal's Ctrl-C comes through this process, once
            )
        self.running.append(Process(training, popen))
        self._set(training, RUNNING)

    def _end(self, process: Process) -> None:
        training, took = process.training, process.seconds
        self.running.remove(process)
        seconds = took + (self.study.seconds(training) or 0)
        file = self.study.out(training) / "seconds.json"
        write_atomically(file, json.dumps(round(seconds, 1)).encode())
        if process.popen.returncode == 0 and self.study.result(training):
            self._took[training] = seconds
            self._set(training, DONE)
        else:
            self._set(training, STOPPED if process.asked else FAILED)

    def _set(self, training: Training, state: str) -> None:
        self.states[training] = state
        self._say(training, state)

    def _threads(self) -> int:
        return max(1, cores() // self.jobs)

    @contextmanager
    def _no_orphans(self) -> Iterator[None]:
        try:
            yield
        finally:  # none is left but after an error
            for process in self.running:
                process.popen.terminate()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, frame: object) -> None:
            self._asked += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def command(training: Training, threads: int) -> list[str]:
    """A trainer's; it decodes in as many threads as it computes in, unless told otherwise."""
    module = f"examples.train_{training.framework}"
    return [sys.executable, "-m", module, "--workers", str(threads), *training.arguments]


def environment(threads: int, jobs: int) -> dict[str, str]:
    """That of a training: its share of the cores and of a GPU; what the user has set stays."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    names += ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    names += ("NPROC",)  # XLA's on CPUs
    share = dict.fromkeys(names, str(threads))
    if jobs > 1:  # JAX and TensorFlow would each take the whole memory of a GPU
        share |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    return share | {"PYTHONUNBUFFERED": "1"} | os.environ
