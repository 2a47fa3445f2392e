"""A study under way: what is done, running and left, for how long yet, and what a stop does.

Who runs the trainings is an engine's: ``processes`` has that of one machine, ``cluster`` that of
many.
"""

import json
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from examples.study.planning import Study, Training
from examples.study.trainer import LOG, Ended
from examples.training.checkpoints import write_atomically

LOG_LINES = 5  # of a failed training, that are shown
WAITING, RUNNING, DONE, FAILED, STOPPED, ELSEWHERE = (
    "waiting",
    "running",
    "done",
    "failed",
    "stopped",
    "running elsewhere",
)


class Attempt(Protocol):
    """A training under way."""

    training: Training
    started: float  # time.monotonic()

    def ended(self) -> Ended | None:
        """None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end; asked again, it ends at once."""


class Engine(Protocol):
    """What runs trainings."""

    def room(self) -> int:
        """How many trainings it can have under way at once, as of now."""

    def start(self, study: Study, training: Training) -> Attempt:
        """Have one begin, or go on."""

    def wait(self) -> Sequence[str]:
        """Until something may have changed, at most a moment; sentences that users should read."""

    def close(self) -> None:
        """Let go of what it holds."""


class Execution:
    """Runs the trainings of a study that have no result yet.

    Args:
        study: where the trainings keep their files.
        trainings: those of it that are to be run.
        engine: what runs them.
        say: called with a training and its new state, after each change.
        tell: called with what the engine has to say.
    """

    def __init__(
        self,
        study: Study,
        trainings: Sequence[Training],
        engine: Engine,
        say: Callable[[Training, str], object],
        tell: Callable[[str], object],
    ) -> None:
        self.study, self.engine, self._say, self._tell = study, engine, say, tell
        self.states = {t: DONE if study.result(t) else WAITING for t in trainings}
        self.running: list[Attempt] = []
        # seconds that each which is done took, in all its attempts, where known
        self._took = {t: study.seconds(t) for t, state in self.states.items() if state == DONE}
        self._asked = 0  # times that the user asked to stop
        self._passed_on = 0  # of which the trainings know

    def count(self) -> Counter[str]:
        """Trainings in each state."""
        return Counter(self.states.values())

    def run(self) -> None:
        """Return when nothing runs any more; Ctrl-C lets the trainings save and end."""
        waiting = deque(t for t, state in self.states.items() if state == WAITING)
        with self._signals(), self._no_orphans():
            while self.running or (waiting and not self._asked):
                while waiting and len(self.running) < self.engine.room() and not self._asked:
                    self._start(waiting.popleft())
                for attempt in tuple(self.running):
                    if ended := attempt.ended():
                        self._end(attempt, ended)
                self._pass_on()
                for sentence in self.engine.wait():
                    self._tell(sentence)

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
        left += sum(max(expected(a.training) - running_for(a), 0) for a in self.running)
        return left / max(1, self.engine.room())

    def log(self, training: Training) -> Path:
        """What a training printed, in all its attempts."""
        return self.study.out(training) / LOG

    def last_lines(self, training: Training) -> list[str]:
        """The end of its log."""
        return self.log(training).read_text(errors="replace").splitlines()[-LOG_LINES:]

    # --- inside

    def _start(self, training: Training) -> None:
        self.study.out(training).mkdir(parents=True, exist_ok=True)
        self.running.append(self.engine.start(self.study, training))
        self._set(training, RUNNING)

    def _end(self, attempt: Attempt, ended: Ended) -> None:
        training = attempt.training
        self.running.remove(attempt)
        if ended.status is None:
            self._set(training, ELSEWHERE)
            return
        seconds = ended.seconds + (self.study.seconds(training) or 0)
        file = self.study.out(training) / "seconds.json"
        write_atomically(file, json.dumps(round(seconds, 1)).encode())
        if ended.status == 0 and self.study.result(training):
            self._took[training] = seconds
            self._set(training, DONE)
        else:
            self._set(training, STOPPED if self._passed_on else FAILED)

    def _pass_on(self) -> None:
        while self._passed_on < self._asked:
            for attempt in self.running:
                attempt.stop()
            self._passed_on += 1

    def _set(self, training: Training, state: str) -> None:
        self.states[training] = state
        self._say(training, state)

    @contextmanager
    def _no_orphans(self) -> Iterator[None]:
        try:
            yield
        finally:  # none is left but after an error
            for attempt in self.running:
                attempt.stop()

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


def running_for(attempt: Attempt) -> float:
    """Seconds since it was started."""
    return time.monotonic() - attempt.started
