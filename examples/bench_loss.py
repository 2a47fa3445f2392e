"""Time and memory of the loss beside the framework's own cross-entropy, forward and backward.

    python -m examples.bench_loss                           PyTorch on the CPU, all shapes
    python -m examples.bench_loss --framework jax           or keras (TensorFlow with XLA)
    python -m examples.bench_loss --operations              without the CPU kernel
    python -m examples.bench_loss --device cuda --json cuda.json
    python -m examples.bench_loss --framework jax --aot v5e:2x2    a TPU's compiler, without a TPU

All losses take turns in one process, so that whatever else the machine does meets them alike; a
ratio is the median over the rounds of the ratio within a round, with its middle half. Memory is the
peak beyond logits and labels, in sizes of the logits; one of them is the gradient.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.training.machine import hardware

FRAMEWORKS = ("torch", "jax", "keras")
SHAPES = [
    (32, 7),
    (4096, 7),
    (4096, 1000),
    (1024, 8142),
    (8, 5, 256, 256),
    (2, 4, 64, 96, 96),
]
CUDA_SHAPES = [*SHAPES, (65536, 1000), (8, 5, 512, 512)]
DTYPES = ("float32", "bfloat16")
SECONDS, ROUNDS = 4.0, 15  # for each shape and dtype; rounds at least


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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and perhaps write it."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, silent in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("KINETO_LOG_LEVEL", "99")):
        os.environ.setdefault(name, silent)
    if args.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.operations:
        os.environ["LMF_MULTI_CPU_KERNEL"] = "0"
    framework = importlib.import_module(f"examples.bench.{args.framework}")
    if args.aot:
        programs = framework.report_aot(args.aot, console)
        if args.json:
            rows = [program._asdict() for program in programs]
            found = {"about": framework.versions() | {"topology": args.aot}, "programs": rows}
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        return
    shapes = SHAPES[:1] if args.quick else CUDA_SHAPES if args.device == "cuda" else SHAPES
    results = []
    for dtype in DTYPES:
        for shape in shapes:
            with console.status(f"{shape} {dtype}"):
                results += measure(framework, shape, dtype, args.device, args.seconds)
    about = hardware(args.device) | framework.versions()
    console.print(table(results, args.framework), about_line(about), soft_wrap=True)
    if args.json:
        rows = [asdict(result) for result in results]
        Path(args.json).write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m examples.bench_loss", description=summary)
    add = parser.add_argument
    add("--framework", choices=FRAMEWORKS, default="torch")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--operations", action="store_true", help="as where the CPU kernel was not compiled")
    add("--quick", action="store_true", help="the smallest shape alone")
    add("--seconds", type=float, default=SECONDS, help="for each shape and dtype")
    add("--aot", metavar="TOPOLOGY", help="compile for this TPU topology instead (jax)")
    args = parser.parse_args(argv)
    if args.aot and args.framework != "jax":
        parser.error(f"--aot needs --framework jax, got {args.framework}")
    return args


def measure(
    framework: object, shape: tuple[int, ...], dtype: str, device: str, seconds: float
) -> list[Result]:
    """All losses at one shape, in turns."""
    runs: dict[str, Callable[[], None]] = framework.contenders(shape, dtype, device)
    times = take_turns(runs, seconds)
    results = []
    for name in runs:
        if name == "copy":
            continue
        _, comma, mode = name.partition(", ")
        ratios = times[name] / times[f"cross-entropy{comma}{mode}"]
        low, ratio, high = np.percentile(ratios, [25, 50, 75])
        milliseconds = 1e3 * np.median(times[name])
        copies = np.median(times[name] / times["copy"])
        held = framework.peak_memory(name, shape, dtype, device)
        memory = None if held is None else held / logits_size(shape, dtype)
        results.append(
            Result(shape, dtype, name, milliseconds, ratio, low, high, float(copies), memory)
        )
    return results


def take_turns(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, np.ndarray]:
    """Seconds of a call, one for each round; a turn repeats calls that are too short to time."""
    calls = {}
    for name, run in runs.items():
        run()  # compiles
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(1e-3 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < ROUNDS:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: np.array(values) for name, values in times.items()}


def logits_size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the logits."""
    return int(np.prod(shape)) * {"float32": 4, "bfloat16": 2}[dtype]


def table(results: Sequence[Result], framework: str) -> Table:
    """Shape × loss."""
    caption = (
        "ratio: to cross-entropy in the same mode, median (middle half of the rounds)\n"
        "copies: time over that of one copy of the logits; memory: peak, in sizes of the logits"
    )
    made = Table(title=f"{framework}, forward + backward", caption=caption, caption_justify="left")
    made.add_column("logits")
    made.add_column("loss")
    for heading in ("ms", "ratio", "copies", "memory"):
        made.add_column(heading, justify="right")
    for before, result in zip([None, *results], results, strict=False):
        new = before is None or (before.shape, before.dtype) != (result.shape, result.dtype)
        if new and before is not None:
            made.add_section()
        made.add_row(
            f"{result.shape} {result.dtype}" if new else "",
            result.loss,
            f"{result.milliseconds:.3g}",
            f"{result.ratio:.2f} ({result.ratio_low:.2f}-{result.ratio_high:.2f})",
            f"{result.copies:.1f}",
            "–" if result.memory is None else f"{result.memory:.2f}",
        )
    return made


def about_line(about: dict[str, str]) -> str:
    """One line under the table."""
    return "; ".join(f"{name} {value}" for name, value in about.items())


if __name__ == "__main__":
    main()
