"""Tables for docs/speed.md of the files that ``bench_loss --all`` wrote: ``--table FILE...``."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.bench.measure import LIGER, bytes_a_logit, logits_size

MODES = {
    ("torch", ""): "PyTorch, eager",
    ("torch", ", compiled"): "PyTorch, compiled",
    ("torch", ", CUDA graph"): "PyTorch, CUDA graph",
    ("jax", ""): "JAX, `jit`",
    ("keras", ""): "Keras, TensorFlow XLA",
}

Row = dict[str, Any]
Show = Callable[[dict[str, Row]], str | None]


def tables(files: Iterable[str]) -> str:
    """Markdown, a row for each mode and processor."""
    found = [read(file) for file in files]
    parts = []
    for device in ("cpu", "cuda"):
        runs = [run for run in found if run["device"] == device]
        dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
        for title, show in (TABLES | (OF_GPUS if device == "cuda" else {})).items():
            parts += table(title, show, runs, dtypes)
    compiled = [part for run in found for name, part in run["parts"].items() if "sm_" in name]
    parts += kernels([program for part in compiled for program in part.get("results", [])])
    return "\n\n".join([*parts, *(about(run) for run in found)])


def read(file: str) -> dict[str, Any]:
    """A file of measurements; a rehearsal's figures are refused."""
    found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    if found["rehearsal"]:
        raise SystemExit(f"{file} is a rehearsal, which measures nothing: there is no table of it")
    return found


def table(title: str, show: Show, runs: list[dict[str, Any]], dtypes: tuple[str, ...]) -> list[str]:
    """Shapes in columns, modes and processors in rows; nothing if there is nothing to show."""
    rows: dict[tuple[str, str], dict[tuple[int, ...], str]] = {}
    for (framework, mode), label in MODES.items():
        for dtype in dtypes:
            for run in runs:
                name = label if len(dtypes) == 1 else f"{label}, {dtype}"
                for shape, by_loss in losses(run, framework, mode, dtype):
                    shown = show(by_loss)
                    if shown is not None:
                        rows.setdefault((name, processor(run)), {})[shape] = shown
    if not rows:
        return []
    shapes = list(dict.fromkeys(shape for row in rows.values() for shape in row))
    lines = [[title, "processor", *map(str, shapes)], ["---"] * (2 + len(shapes))]
    lines += [[*key, *(row.get(shape, "–") for shape in shapes)] for key, row in rows.items()]
    return [markdown(lines)]


def losses(
    run: dict[str, Any], framework: str, mode: str, dtype: str
) -> Iterator[tuple[tuple[int, ...], dict[str, Row]]]:
    """Each shape's rows by loss, those of the mode without its name."""
    by_shape: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in run["parts"].get(framework, {}).get("results", []):
        loss, comma, found = row["loss"].partition(", ")
        if row["dtype"] == dtype and f"{comma}{found}" == mode:
            by_shape.setdefault(tuple(row["shape"]), {})[loss] = row
    for shape, rows in by_shape.items():
        if "ours" in rows:
            yield shape, rows


def over_cross_entropy(rows: dict[str, Row]) -> str:
    """Median and middle half."""
    ours = rows["ours"]
    return f"{ours['ratio']:.2f} ({ours['ratio_low']:.2f}–{ours['ratio_high']:.2f})"


def published_over_ours(rows: dict[str, Row]) -> str | None:
    """How much longer the published formula takes."""
    ratio = rows.get("published formula", {}).get("over", {}).get(rows["ours"]["loss"])
    return None if ratio is None else f"{ratio:.1f}"


def memory(rows: dict[str, Row]) -> str | None:
    """In sizes of the logits, and cross-entropy's."""
    held = [rows[loss]["memory"] for loss in ("ours", "cross-entropy")]
    return None if None in held else f"{held[0]:.1f} ({held[1]:.1f})"


def over(other: str) -> Show:
    """Eager or compiled, beside that one; not replayed, which takes no time on the host."""

    def show(rows: dict[str, Row]) -> str | None:
        is_replayed = rows["ours"]["loss"].endswith("CUDA graph")
        ratio = None if is_replayed else rows["ours"]["over"].get(other)
        return None if ratio is None else f"{ratio:.2f}"

    return show


def share_of_a_copy(rows: dict[str, Row]) -> str | None:
    """Of the bandwidth of copying the same logits, if this is the GPU's time; and its own."""
    ours = rows["ours"]
    if ours["loss"] != "ours, CUDA graph":  # which waits for no host
        return None
    shape, dtype = tuple(ours["shape"]), ours["dtype"]
    size = logits_size(shape, dtype)
    moved = sum(bytes_a_logit(shape, dtype).values()) * math.prod(shape)
    speed = moved / (1e-3 * ours["milliseconds"])
    return f"{moved / (2 * size) / ours['copies']:.0%} ({speed / 1e9:.0f} GB/s)"


TABLES: dict[str, Show] = {
    "time over plain cross-entropy's": over_cross_entropy,
    "published formula's time over ours": published_over_ours,
    "peak memory in sizes of the logits, plain cross-entropy's in brackets": memory,
}
OF_GPUS: dict[str, Show] = {
    "time over compiled cross-entropy's": over("cross-entropy, compiled"),
    f"time over {LIGER}": over(LIGER),
    "share of a copy's bandwidth": share_of_a_copy,
}


def kernels(programs: list[Row]) -> list[str]:
    """What compilers say, the forward and the backward pass of a shape in one row."""
    rows: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for each in programs:
        key = tuple(each["shape"]), each["dtype"]
        rows.setdefault(key, {})[each["architecture"], each["kernel"]] = each
    if not rows:
        return []
    kinds = sorted({each["architecture"] for each in programs})
    lines = [["Triton kernel, forward / backward"]]
    lines[0] += [f"{kind}: registers; bytes spilt; shared" for kind in kinds]
    lines[0] += ["bytes moved a logit (over a copy's)"]
    lines += [["---"] * len(lines[0])]
    for (shape, dtype), found in rows.items():
        line = [f"{shape} {dtype}"]
        for kind in kinds:
            passes = [found.get((kind, each)) for each in ("forward", "backward")]
            numbers = (
                " / ".join("–" if p is None else str(p[name]) for p in passes)
                for name in ("registers", "spilt", "shared")
            )
            line.append("; ".join(numbers))
        each = {kernel: p["bytes_a_logit"] for (_, kernel), p in found.items()}
        copied = 2 * logits_size((1,), dtype)
        line.append(f"{sum(each.values()):.1f} ({sum(each.values()) / copied:.2f})")
        lines.append(line)
    return [markdown(lines)]


def markdown(lines: list[list[str]]) -> str:
    """A table of the first line's columns."""
    return "\n".join(
        "|---" * len(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |"
        for line in lines
    )


def processor(run: dict[str, Any]) -> str:
    """What the figures were measured on, in a table."""
    if run["device"] == "cuda":
        return str(run["about"].get("GPU", "GPU"))
    return str(run["about"]["CPU"])


def about(run: dict[str, Any]) -> str:
    """Versions, the outcome of the tests, and what was not measured."""
    known = dict(run["about"])
    lines = []
    for name, part in run["parts"].items():
        known |= part.get("about", {})
        if "copy_bandwidth" in part:
            known["a large copy"] = f"{part['copy_bandwidth'] / 1e9:.0f} GB/s"
        if "passed" in part:
            counts = ", ".join(f"{part[each]} {each}" for each in ("passed", "failed", "skipped"))
            lines.append(f"{name}: {counts} ({part['state']})")
            lines += [f"failed: {test}: {why}" for test, why in part["failing"].items()]
        elif part["state"] != "finished":
            lines.append(f"{name}: {part['state']}")
        lines += [
            f"not measured: {name}, {it}: {why}" for it, why in part.get("missing", {}).items()
        ]
    return "\n".join(["; ".join(f"{name} {value}" for name, value in known.items()), *lines])
