"""Compare losses on imbalanced data: losses × architectures × frameworks × seeds, in one command.

    python -m examples.compare --losses ce,la,crt,lmf:scale=1,ce:sampler=balanced --seeds 5
    python -m examples.compare --data HAM10000 --image-size 64 --archs small,resnet50 \
        --frameworks torch,flax,keras --sweep alpha=0.5,1,1.5,2 --jobs 2 --out runs/ham

    python -m examples.compare --engine ray --gpus-per-training 0.5 --cpus-per-training 4

Flags beyond those of -h go to every trainer. The same command goes on where a study was stopped.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples import html_report
from examples.study.execution import (
    DONE,
    ELSEWHERE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    Engine,
    Execution,
    running_for,
)
from examples.study.planning import FRAMEWORKS, Kind, Study, Training, plan, remember
from examples.study.processes import LocalEngine
from examples.training import config
from examples.training.flags import at_least, not_negative, positive
from examples.training.settings import LOSSES, TORCH_ARCHS
from examples.training.start import STOPPED as STOPPED_STATUS
from examples.training.start import one_sentence
from lmf_multi._extras import require


def main(argv: Sequence[str] | None = None) -> int:
    """Train what has no result yet; 1 if a training failed, 130 if the user stopped the study."""
    args, flags = parse(argv)
    args.losses += [loss for sweep in args.sweep for loss in sweep]
    with one_sentence():
        trainings = plan(args.data, args.archs, args.frameworks, args.losses, args.seeds, flags)
        with closing(chosen_engine(args)) as engine:
            study = remember(args.out, repeatable(args, flags), trainings)
            show = Show(study, trainings, engine)
            show.run()
            status = show.conclude()
    if status != STOPPED_STATUS and study.results():
        html_report.tell(study)
    return status


def chosen_engine(args: argparse.Namespace) -> Engine:
    """What runs the trainings.

    Raises:
        ValueError: a flag belongs to the other one.
        ConnectionError, ModuleNotFoundError: there is no cluster, or no Ray.
    """
    own = {"local": ("jobs",), "ray": ("address", "cpus_per_training", "gpus_per_training")}
    for engine, flags in own.items():
        for flag in flags:
            if engine != args.engine and getattr(args, flag) is not None:
                raise ValueError(
                    f"--{flag.replace('_', '-')} belongs to --engine {engine}, got --engine "
                    f"{args.engine}; leave one of them out"
                )
    if args.engine == "local":
        return LocalEngine(args.jobs or 1)
    require("ray", "--engine ray", "'lmf-multi[cluster]'")
    from examples.study.cluster import RayEngine

    return RayEngine(args.address or "auto", args.cpus_per_training or 1, args.gpus_per_training)


class Show:
    """What is done, running, failed and left: a live table in a terminal, plain lines elsewhere."""

    def __init__(self, study: Study, trainings: Sequence[Training], engine: Engine) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.execution = Execution(study, trainings, engine, self._changed, self.console.print)

    def run(self) -> None:
        """Show a study from here to its end."""
        counts = self.execution.count()
        self.console.print(
            f"Trainings: {counts.total()}, done already: {counts[DONE]}, "
            f"at once: {self.execution.engine.room()}."
        )
        if not self.console.is_terminal:
            self.execution.run()
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2):
            self.execution.run()

    def table(self) -> Table:
        """A row for each kind of training, and what runs."""
        execution = self.execution
        running = (f"{a.training.name} ({duration(running_for(a))})" for a in execution.running)
        caption = "\n".join((self._left(), *running))
        table = Table(caption=caption, caption_justify="left")
        for heading in ("data", "architecture", "framework"):
            table.add_column(heading)
        columns = {"done": DONE, "running": RUNNING, "failed": FAILED, "left": WAITING}
        for heading in columns:
            table.add_column(heading, justify="right")
        kinds: dict[Kind, list[str]] = {}
        for t, state in tuple(execution.states.items()):
            kinds.setdefault(t.kind, []).append(state)
        for kind, states in kinds.items():
            table.add_row(*kind, *(str(states.count(state)) for state in columns.values()))
        return table

    def conclude(self) -> int:
        """Say what failed and how to go on; the exit status."""
        counts, say = self.execution.count(), self.console.print
        for training, state in self.execution.states.items():
            if state == FAILED:
                say(f"failed: {training.name}, see {self.execution.log(training)}")
            if state == ELSEWHERE:
                say(f"left alone: {training.name} is run by another process")
        say(f"{counts[DONE]} of {counts.total()} trainings are done.")
        if self.execution.stopped:
            say("Stopped; the same command goes on from there.")
            return STOPPED_STATUS
        return 1 if counts[FAILED] else 0

    def _changed(self, training: Training, state: str) -> None:
        if state == FAILED:
            self.console.print(f"failed: {training.name}, the end of its log:")
            for line in self.execution.last_lines(training):
                self.console.print(f"    {line}")
        elif state in (DONE, STOPPED) or not self.console.is_terminal:
            counts = self.execution.count()
            done = f"{counts[DONE]} of {counts.total()} done"
            self.console.print(f"{state}: {training.name} ({done}; {self._left()})")

    def _left(self) -> str:
        seconds = self.execution.seconds_left()
        if seconds is None:
            return "time left is known when a training has ended"
        return f"about {duration(seconds)} left"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The study's own flags, and those that go to the trainers."""
    parser = argparse.ArgumentParser(
        "python -m examples.compare",
        "python -m examples.compare [flags] [flags of the trainers]; -h explains them",
        description=__doc__.split("\n")[0],
        epilog="Further flags go to every trainer: python -m examples.train_torch -h",
        allow_abbrev=False,  # --seed is a trainer's
    )
    add = parser.add_argument
    add("--data", nargs="+", default=["digits"], help="one or several, as the trainers' (digits)")
    add(
        "--losses",
        type=names("loss", LOSSES, options=True),
        default=list(LOSSES),
        metavar="L,L:FLAG=VALUE,…",
        help=f"of {','.join(LOSSES)} (all), perhaps with options: lmf:scale=5:head=cosine",
    )
    add(
        "--archs",
        type=names("arch", TORCH_ARCHS),
        default=["small"],
        metavar="A,A,…",
        help="(small)",
    )
    add(
        "--frameworks",
        type=names("framework", FRAMEWORKS),
        default=["torch"],
        metavar="F,F,…",
        help=f"of {','.join(FRAMEWORKS)} (torch)",
    )
    add("--seeds", type=at_least(1), default=5, metavar="N", help="of each, from 0 to N-1 (5)")
    add(
        "--sweep",
        type=sweep,
        action="append",
        default=[],
        metavar="FLAG=V,V,…",
        help="LMF with each of these values as well",
    )
    add("--out", type=Path, default=Path("runs/study"), metavar="DIR", help="(runs/study)")
    add("--engine", choices=("local", "ray"), default="local", help="one machine, or many (local)")
    add("--jobs", type=at_least(1), metavar="N", help="local: trainings at once (1)")
    add("--address", metavar="HOST:PORT", help="ray: of the cluster's head (auto)")
    add("--cpus-per-training", type=positive, metavar="X", help="ray: of a node's CPUs (1)")
    add(
        "--gpus-per-training",
        type=part_or_number,
        metavar="X",
        help="ray: a part of one, or a number of them (1 where there are any)",
    )
    args, flags = parser.parse_known_args(argv)
    config.refuse(parser, flags)
    return args, flags


def repeatable(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """The command of the study, whatever runs it."""
    words = ["python", "-m", "examples.compare", "--data", *args.data]
    for flag in ("losses", "archs", "frameworks"):
        words += [f"--{flag}", ",".join(getattr(args, flag))]
    return shlex.join([*words, "--seeds", str(args.seeds), *flags, "--out", str(args.out)])


def names(what: str, known: Iterable[str], options: bool = False) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between them, perhaps each with options."""

    def listed(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        for name in found:
            if (name.partition(":")[0] if options else name) not in known:
                raise argparse.ArgumentTypeError(
                    f"each {what} must be one of {', '.join(known)}, got {name!r}"
                )
        return found

    return listed


def sweep(text: str) -> list[str]:
    """An argparse type.

    >>> sweep("alpha=0.5,1")
    ['lmf:alpha=0.5', 'lmf:alpha=1']
    """
    flag, _, values = text.partition("=")
    if not (flag and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"must be like alpha=0.5,1,1.5, got {text!r}")
    return [f"lmf:{flag}={value}" for value in values.split(",")]


def part_or_number(text: str) -> float:
    """An argparse type.

    >>> part_or_number("0.5"), part_or_number("2")
    (0.5, 2.0)
    """
    value = not_negative(text)
    if value > 1 and not value.is_integer():
        raise argparse.ArgumentTypeError(f"must be at most 1 or a whole number, got {value}")
    return value


def duration(seconds: float) -> str:
    """In the two largest units.

    >>> duration(3725)
    '1 h 2 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
