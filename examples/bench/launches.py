"""How many trainings a second an engine starts: on this machine, and on a Ray cluster on it.

    RAY_worker_niceness=0 ray start --head --num-cpus 2
    python -m examples.bench.launches --jobs 2

A trainer that only writes its result stands for each training, so that all the time is the engine's
and the start of Python; without that niceness Ray's would yield to whatever else the machine does.
The engines take turns; the median of --rounds counts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import ray

from examples.study.cluster import RayEngine
from examples.study.execution import DONE, Engine, Execution
from examples.study.planning import Training, plan, remember
from examples.study.processes import LocalEngine
from examples.training.flags import at_least
from examples.training.machine import cores, cpu

TRAINER = """
import sys
with open(sys.argv[sys.argv.index("--out") + 1] + "/result.json", "w") as file:
    file.write('{"epochs": 1}')
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print each engine's trainings a second."""
    parser = argparse.ArgumentParser("python -m examples.bench.launches", description=__doc__)
    parser.add_argument("--trainings", type=at_least(1), default=1000, metavar="N")
    parser.add_argument("--jobs", type=at_least(1), default=cores(), metavar="N", help="at once")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N")
    args = parser.parse_args(argv)
    engines: dict[str, Callable[[], Engine]] = {
        "local": partial(LocalEngine, args.jobs, words),
        "ray": partial(RayEngine, "auto", 1, 0, words),
    }
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            rates[name].append(rate(engine, args.trainings))
    print(f"{cpu()}; {args.trainings} trainings, {args.jobs} at once, Ray {ray.__version__}")
    for name, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name}: {statistics.median(values):.1f} trainings a second ({spread})")
    return 0


def rate(begin: Callable[[], Engine], number: int) -> float:
    """Trainings a second, from the first start to the last end."""
    trainings = plan(["digits"], ["small"], ["torch"], ["ce"], number, ["--epochs", "1"])
    with tempfile.TemporaryDirectory() as folder, closing(begin()) as engine:
        study = remember(Path(folder), "", trainings)
        execution = Execution(study, trainings, engine, lambda *change: None, print)
        started = time.perf_counter()
        execution.run()
        seconds = time.perf_counter() - started
    assert execution.count()[DONE] == number
    return number / seconds


def words(training: Training, threads: int) -> list[str]:
    """What Python is started with."""
    return ["-S", "-c", TRAINER]


if __name__ == "__main__":
    sys.exit(main())
