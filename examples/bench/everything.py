"""``bench_loss --all``: tests and benchmarks of a machine in one file, within a limit of time.

Each part is a process of its own with a share of the time: what hangs or fails there leaves the
rest alone. The file is written again and again meanwhile, so that it holds whatever is finished.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from examples.bench.measure import Cell
from examples.bench.part import write
from examples.training.machine import hardware

ROOT = Path(__file__).parents[2]


class Part(NamedTuple):
    """What is run by itself."""

    share: float  # of the time
    needs: tuple[str, ...]  # packages


PARTS = {
    "torch": Part(6.0, ("torch",)),
    "tests": Part(3.5, ("torch", "triton", "pytest")),
    "jax": Part(1.5, ("jax", "optax")),
    "keras": Part(1.5, ("tensorflow", "keras")),
    "sm_80": Part(0.6, ("torch", "triton")),
    "sm_90": Part(0.6, ("torch", "triton")),
    "random tests": Part(1.0, ("torch", "triton", "pytest", "hypothesis")),
}
TESTS = (
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_compiled.py",
    "tests/loss/test_edges.py",
    "tests/loss/test_equivalence.py",
)
# of those files; what compilers say is told by parts of its own
CHOICE = {
    "tests": "triton and not without_a_gpu and not random",
    "random tests": "triton and random",
}
REHEARSED: list[Cell] = [((2, 3, 2, 2), "bfloat16")]
REHEARSED_TESTS = "losses_take_the_kernel or (test_one_class_of_two and triton)"
# CPU tensors take the Triton kernel, in its interpreter
REHEARSAL = {"LMF_MULTI_CPU_KERNEL": "0", "LMF_MULTI_TRITON": "always", "TRITON_INTERPRET": "1"}
# or are compiled for, and run nowhere
COMPILED = REHEARSAL | {"TRITON_INTERPRET": "0"}
SILENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "KINETO_LOG_LEVEL": "99", "KERAS_BACKEND": "tensorflow"}


class Order(NamedTuple):
    """What is wanted of all parts."""

    file: str
    device: str
    cells: list[Cell]
    seconds: float  # for each cell
    rehearse: bool


def run_all(order: Order, limit: float, parts: Iterable[str] = PARTS) -> None:
    """Run one part after the other, and leave the file."""
    about = hardware(order.device) | gpu() | {"date": date.today().isoformat()}
    found = {"rehearsal": order.rehearse, "device": order.device, "about": about, "parts": {}}
    absent = {name: [p for p in PARTS[name].needs if find_spec(p) is None] for name in parts}
    found["parts"] = {
        name: {"state": f"not installed: {', '.join(packages)}" if packages else "waits"}
        for name, packages in absent.items()
    }
    write(order.file, found)
    waiting, end = [name for name in absent if not absent[name]], time.monotonic() + limit
    while waiting:
        share = PARTS[waiting[0]].share / sum(PARTS[name].share for name in waiting)
        name = waiting.pop(0)
        seconds = max(1.0, share * (end - time.monotonic()))
        say(f"{name}: at most {seconds:.0f} s")
        run_part(name, order, seconds, found)
    for name, part in found["parts"].items():
        say(f"{name}: {part['state']}")


def run_part(name: str, order: Order, limit: float, found: dict[str, Any]) -> None:
    """Run it, and keep the file up to date meanwhile."""
    started, state = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/errors", "w+b") as errors:
        part = Path(folder) / "part"
        command, env = command_of(name, order, limit, part)
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=errors, start_new_session=True
        )
        while not state:
            # what watches its time itself gets a little more for what it is in the midst of
            left = started + 1.1 * limit + 2 - time.monotonic()
            try:
                status = process.wait(min(5.0, max(0.1, left)))
                fine = (0, 1) if "tests" in name else (0,)  # 1 if some fail
                state = "finished" if status in fine else f"failed: exit status {status}"
            except subprocess.TimeoutExpired:
                if left < 0:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session, begun above
                    process.wait()
                    state = "out of time"
            found["parts"][name] = read(name, part) | {"state": state or "runs"}
            write(order.file, found)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if state.startswith("failed"):
        print(said[-3000:], file=sys.stderr, flush=True)
        state += f": {said.splitlines()[-1][:300]}" if said else ""
    found["parts"][name] |= {"state": state, "seconds": round(time.monotonic() - started, 1)}
    write(order.file, found)


def command_of(
    name: str, order: Order, limit: float, part: Path
) -> tuple[list[str], dict[str, str]]:
    """What is run, and in which environment."""
    env = os.environ | SILENT | (REHEARSAL if order.rehearse else {})
    if order.device == "cpu":
        env |= {"JAX_PLATFORMS": "cpu"}
    if "tests" in name:
        command = ["-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        command += ["-p", "examples.bench.outcomes", "-p", "no:cacheprovider", *TESTS, "-k"]
        command += [REHEARSED_TESTS if order.rehearse else CHOICE[name]]
        command += ["-W", "default"]  # other releases than the suite runs with warn of more
        if order.device == "cuda" and find_spec("xdist"):
            # the kernel is compiled on the CPU
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        return [sys.executable, *command], env | {"OUTCOMES": str(part)}
    if name.startswith("sm_"):
        env |= COMPILED | {"TRITON_CACHE_DIR": str(part.parent / "cache")}
    cells = REHEARSED if order.rehearse else order.cells
    words = order._asdict() | {"part": name, "file": str(part), "limit": limit, "cells": cells}
    return [sys.executable, "-m", "examples.bench.part", json.dumps(words)], env


def read(name: str, part: Path) -> dict[str, Any]:
    """What a part has written."""
    text = part.read_text(encoding="utf-8") if part.exists() else ""
    if "tests" in name:
        return outcomes(text)
    found: dict[str, Any] = json.loads(text or "{}")
    return found


def outcomes(text: str) -> dict[str, Any]:
    """How many tests passed, failed and were skipped; which failed, and what they say."""
    lines = [json.loads(line) for line in text.splitlines()]
    count = Counter(line["outcome"] for line in lines)
    failing = {line["test"]: line["why"] for line in lines if line["outcome"] == "failed"}
    return {each: count[each] for each in ("passed", "failed", "skipped")} | {"failing": failing}


def gpu() -> dict[str, str]:
    """NVIDIA's name of the first GPU, and its driver; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    name, _, driver = done.stdout.splitlines()[0].partition(", ")
    return {"GPU": name, "driver": driver}


def say(line: str) -> None:
    """With the time, since somebody may wait."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
