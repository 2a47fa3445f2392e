"""Time and memory of the loss beside the framework's own cross-entropy, forward and backward.

    python -m examples.bench_loss                           PyTorch on the CPU, all shapes
    python -m examples.bench_loss --framework jax           or keras (TensorFlow with XLA)
    python -m examples.bench_loss --sigmoid                 beside binary cross-entropy
    python -m examples.bench_loss --operations              without the CPU kernel, or Triton's
    python -m examples.bench_loss --device cuda --json cuda.json
    python -m examples.bench_loss --aot sm_90               a GPU's compiler, without a GPU
    python -m examples.bench_loss --framework jax --aot v5e:2x2    a TPU's, without a TPU

All losses take turns in one process, so that whatever else the machine does meets them alike; a
ratio is the median over the rounds of the ratio within a round, with its middle half. Memory is the
peak beyond logits and labels, in sizes of the logits; one of them is the gradient.

    python -m examples.bench_loss --device cuda --all gpu.json     the Triton kernel's tests too
    python -m examples.bench_loss --table gpu.json cpu.json        the tables of such files
    python -m examples.bench_loss --rehearse --all rehearsal.json

The first of these takes less than seven minutes, needs no network, and leaves out what is not
installed; liger-kernel is measured where it is. The file holds what is finished, at any moment. The
last takes every step on a CPU, in Triton's interpreter, and measures nothing.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.bench import everything, pages
from examples.bench.measure import Cell, Result, figures
from examples.training.machine import hardware
from examples.training.quiet import stderr_kept_back

if TYPE_CHECKING:  # not everywhere --all is to run
    from rich.table import Table

FRAMEWORKS = ("torch", "jax", "keras")
SHAPES = [
    (32, 7),
    (4096, 7),
    (4096, 1000),
    (1024, 8142),
    (8, 5, 256, 256),
    (2, 4, 64, 96, 96),
]
CUDA_SHAPES = [
    (65536, 1000),
    (8, 5, 512, 512),
    (4096, 1000),
    (1024, 8142),
    (2, 4, 64, 96, 96),
    (4096, 7),
    (32, 7),
]
SIGMOID_SHAPES = [(4096, 14), (2, 1, 512, 512)]
DTYPES = ("float32", "bfloat16")
SECONDS = 4.0  # for each shape and dtype
LIMITS = {"cpu": 1800.0, "cuda": 390.0}  # seconds of --all; GPUs are lent for minutes


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and perhaps write it."""
    args = parse(argv)
    if args.table:
        print(pages.tables(args.table))
        return
    prepare(args)
    cells = [(shape, dtype) for dtype in DTYPES for shape in shapes(args)]
    if args.all:
        limit = LIMITS[args.device] if args.limit is None else args.limit
        seconds = 0.01 if args.rehearse else args.seconds
        order = everything.Order(args.all, args.device, cells, seconds, args.rehearse)
        everything.run_all(order, limit)
        if not args.rehearse:
            print(pages.tables([args.all]))
    elif args.aot.startswith("sm_"):
        compile_for_gpu(args, cells)
    elif args.aot:
        compile_for_tpu(args)
    else:
        run(args, cells)


def prepare(args: argparse.Namespace) -> None:
    """The environment, before any framework is imported."""
    # XLA's alarms about the time that folding a constant takes are errors to it; a real error is an
    # exception too
    for name, silent in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("KINETO_LOG_LEVEL", "99")):
        os.environ.setdefault(name, silent)
    if args.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.operations:
        os.environ["LMF_MULTI_CPU_KERNEL"] = os.environ["LMF_MULTI_TRITON"] = "0"
    if args.aot.startswith("sm_"):
        os.environ.update(everything.COMPILED)


def shapes(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of the logits."""
    if args.sigmoid:
        return SIGMOID_SHAPES[: 1 if args.quick else None]
    return SHAPES[:1] if args.quick else CUDA_SHAPES if args.device == "cuda" else SHAPES


def run(args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """One framework, in this process."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    with stderr_kept_back():
        framework: Any = importlib.import_module(f"examples.bench.{args.framework}")
        if args.sigmoid:
            framework = importlib.import_module("examples.bench.sigmoid").of(args.framework)
    results: list[Result] = []
    measured = figures(framework, cells, args.device, args.seconds)
    for shape, dtype in cells:
        with console.status(f"{shape} {dtype}"):
            results += next(measured)[0]
    about = hardware(args.device) | framework.versions()
    console.print(table(results, args.framework), about_line(about), soft_wrap=True)
    write(args.json, {"about": about, "results": [asdict(result) for result in results]})


def compile_for_gpu(args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """What the compilers say of the Triton kernel, as docs/speed.md shows it."""
    gpu_compiler = importlib.import_module("examples.bench.gpu_compiler")
    rows = [asdict(program) for program in gpu_compiler.programs(args.aot, cells)]
    print(*pages.kernels(rows))
    write(args.json, {"about": {"architecture": args.aot}, "programs": rows})


def compile_for_tpu(args: argparse.Namespace) -> None:
    """What XLA counts."""
    from rich.console import Console

    framework = importlib.import_module("examples.bench.jax")
    console = Console(width=None if sys.stdout.isatty() else 110)
    rows = [program._asdict() for program in framework.report_aot(args.aot, console)]
    about = framework.versions() | {"topology": args.aot}
    write(args.json, {"about": about, "programs": rows})


def write(file: str | None, found: dict[str, Any]) -> None:
    """The figures, if they are to be kept."""
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m examples.bench_loss", description=summary)
    add = parser.add_argument
    add("--framework", choices=FRAMEWORKS, default="torch")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--sigmoid", action="store_true", help="the sigmoid form beside binary cross-entropy")
    add("--operations", action="store_true", help="as where the CPU kernel was not compiled")
    add("--quick", action="store_true", help="the smallest shape alone")
    add("--seconds", type=float, default=SECONDS, help="for each shape and dtype")
    add("--aot", metavar="TARGET", default="", help="compile for a GPU (sm_90) or TPU instead")
    add("--all", metavar="FILE", help="all that is installed, and the Triton kernel's tests")
    add("--limit", type=float, metavar="SECONDS", help="of --all; 390 on a GPU, else 1800")
    add("--rehearse", action="store_true", help="--all in small, which measures nothing")
    add("--table", nargs="+", metavar="FILE", help="print the tables of what --all wrote")
    args = parser.parse_args(argv)
    if args.aot.startswith("sm_"):
        if args.framework != "torch":
            parser.error(f"--aot {args.aot} needs --framework torch, got {args.framework}")
        args.device = "cuda"
    elif args.aot and args.framework != "jax":
        parser.error(f"--aot {args.aot} needs --framework jax, got {args.framework}")
    if args.sigmoid and (args.all or args.aot):
        parser.error("--sigmoid measures one framework here, without --all and --aot")
    if args.rehearse and (not args.all or args.device != "cpu"):
        parser.error("--rehearse needs --all FILE, and runs on the CPU")
    return args


def table(results: Sequence[Result], framework: str) -> "Table":
    """Shape × loss."""
    from rich.table import Table

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
