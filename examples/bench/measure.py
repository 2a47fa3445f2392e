"""All losses of a framework at one shape, in turns; and many shapes within a limit of time."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

ROUNDS = 15  # at least
LIGER = "Liger's cross-entropy"  # on CUDA, where the package liger-kernel is installed

Cell = tuple[tuple[int, ...], str]  # shape and dtype of the logits


class Run(NamedTuple):
    """A loss on fixed logits and labels."""

    call: Callable[[], object]  # one forward and backward pass
    memory: Callable[[], int | None]  # bytes at most beyond logits and labels


@dataclass(frozen=True)
class Result:
    """One loss at one shape; ratios are to the cross-entropy that is run in the same way."""

    shape: tuple[int, ...]
    dtype: str
    loss: str
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    copies: float  # time over that of copying the logits once
    memory: float | None  # sizes of the logits
    over: dict[str, float]  # time over that of each loss in the same rounds


def figures(
    framework: ModuleType,
    cells: Sequence[Cell],
    device: str,
    seconds: float,
    limit: float = math.inf,
) -> Iterator[tuple[list[Result], dict[str, str]]]:
    """Results of each cell, and what was not measured and why, which only a limit leaves out.

    No cell takes more than two and a half times its share of the limit, or one that compiles slowly
    would leave nothing for the others.
    """
    end = time.monotonic() + limit
    for i, (shape, dtype) in enumerate(cells):
        left = end - time.monotonic()
        share = left / (len(cells) - i)
        if share < 0.5:
            yield [], {f"{shape} {dtype}": "out of time"}
        else:
            allowed = min(left, 2.5 * share)
            try:
                each = measure(framework, (shape, dtype), device, min(seconds, share / 6), allowed)
            except Exception as error:
                if limit == math.inf:
                    raise
                each = [], {f"{shape} {dtype}": in_a_line(error)}
            yield each


def measure(
    framework: ModuleType, cell: Cell, device: str, seconds: float, limit: float = math.inf
) -> tuple[list[Result], dict[str, str]]:
    """All losses at one shape, in turns, and what failed or took too long within a limit."""
    shape, dtype = cell
    runs: dict[str, Run] = framework.contenders(shape, dtype, device)
    missing = {}
    for name, why in compile_all(framework, runs, device, limit - seconds).items():
        missing[f"{shape} {dtype} {name}"] = why
        del runs[name]
    for name in [name for name in runs if name != "copy" and peer(name) not in runs]:
        missing[f"{shape} {dtype} {name}"] = f"there is no {peer(name)} to compare with"
        del runs[name]
    if "copy" not in runs:
        return [], missing
    times = take_turns(framework, runs, device, seconds)
    results = []
    for name in runs:
        if name == "copy":
            continue
        low, ratio, high = np.percentile(times[name] / times[peer(name)], [25, 50, 75])
        medians = {other: float(np.median(times[name] / times[other])) for other in runs}
        copies, milliseconds = medians.pop("copy"), 1e3 * float(np.median(times[name]))
        held = runs[name].memory()
        memory = None if held is None else held / logits_size(shape, dtype)
        figures = (milliseconds, float(ratio), float(low), float(high), copies, memory)
        results.append(Result(shape, dtype, name, *figures, medians))
    return results, missing


def peer(name: str) -> str:
    """The cross-entropy in the same mode."""
    _, comma, mode = name.partition(", ")
    return f"cross-entropy{comma}{mode}"


def compile_all(
    framework: ModuleType, runs: dict[str, Run], device: str, limit: float
) -> dict[str, str]:
    """Run each twice; why those do not run that take more than their share of the limit or fail."""
    end, why = time.monotonic() + limit, {}
    for i, (name, run) in enumerate(runs.items()):
        share = max(1.0, (end - time.monotonic()) / (len(runs) - i))
        try:
            with interrupted_after(share):
                framework.clock(run.call, 2, device)
        except Exception as error:
            if limit == math.inf:  # nobody reads what was left out
                raise
            why[name] = in_a_line(error)
    return why


def in_a_line(error: Exception) -> str:
    """What it is and what it says, for the file."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """A TimeoutError once Python gets to speak after so many seconds."""
    if seconds == math.inf:
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def take_turns(
    framework: ModuleType, runs: dict[str, Run], device: str, seconds: float
) -> dict[str, np.ndarray]:
    """Seconds of a call, one for each round; a turn repeats calls that are too short to time.

    A turn's first call is not timed: it takes memory back that the turn before, of another loss,
    has returned to the system, page by page.
    """

    def clock(name: str, calls: int) -> float:
        return framework.clock(runs[name].call, calls, device) / calls

    calls = {name: max(1, round(1e-3 / max(clock(name, 1), 1e-6))) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < ROUNDS:
        for name in runs:
            clock(name, 1)
            times[name].append(clock(name, calls[name]))
    return {name: np.array(values) for name, values in times.items()}


def host_clock(call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of so many calls, each of which waits for its result."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def logits_size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the logits."""
    return int(np.prod(shape)) * {"float32": 4, "bfloat16": 2}[dtype]


def bytes_a_logit(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    """What the Triton kernel moves: reads each logit once a pass, and writes its gradient.

    So it does a label, of 8 bytes, once a pass. Margins, weights and the sums of the programs are
    few, and stay in the cache. A copy moves two sizes of the logits.
    """
    size, label = logits_size((1,), dtype), 8 / shape[1]
    return {"forward": size + label, "backward": 2 * size + label}
