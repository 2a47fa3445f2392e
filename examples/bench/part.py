"""A part of ``bench_loss --all`` in a process of its own, which writes what it has as it goes.

``python -m examples.bench.part JSON``, the order as ``everything`` writes it.
"""

import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.bench.measure import Cell, figures
from examples.training.quiet import stderr_kept_back


def main(part: str, file: str, limit: float, **order: Any) -> None:
    """Measure a framework, or compile for a GPU, as far as the limit lets it."""
    cells = [(tuple(shape), dtype) for shape, dtype in order["cells"]]
    end = time.monotonic() + limit
    if part.startswith("sm_"):
        compile_kernel(part, file, cells, end)
    else:
        measure(part, file, cells, end, order["device"], order["seconds"])


def compile_kernel(architecture: str, file: str, cells: list[Cell], end: float) -> None:
    """What the compilers say of the Triton kernel."""
    gpu_compiler = importlib.import_module("examples.bench.gpu_compiler")
    found: dict[str, Any] = {"results": [], "missing": {}}
    for program in gpu_compiler.programs(architecture, cells):
        found["results"].append(asdict(program))
        if time.monotonic() > end:
            found["missing"][f"what follows {program.shape} {program.dtype}"] = "out of time"
            break
        write(file, found)
    write(file, found)


def measure(
    name: str, file: str, cells: list[Cell], end: float, device: str, seconds: float
) -> None:
    """Time and memory in a framework."""
    with stderr_kept_back():
        framework = importlib.import_module(f"examples.bench.{name}")
    found: dict[str, Any] = {"about": framework.versions(), "results": [], "missing": {}}
    found |= framework.prepare(device)
    limit = end - time.monotonic()
    for cell, (results, missing) in zip(
        cells, figures(framework, cells, device, seconds, limit), strict=True
    ):
        found["results"] += [asdict(result) for result in results]
        found["missing"] |= missing
        write(file, found)
        lines = [f"{result.loss} {result.ratio:.2f}" for result in results if "ours" in result.loss]
        lines += [f"not measured: {what}: {why}" for what, why in missing.items()]
        print(f"{name} {cell[0]} {cell[1]}:", "\n  ".join(lines), flush=True)
    write(file, found)


def write(file: str, found: dict[str, Any]) -> None:
    """Whoever reads the file finds all of it or what was there before."""
    half = Path(f"{file}.half")
    half.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    half.replace(file)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
