"""What ``bench_loss`` measures in JAX: forward and backward, compiled, and a TPU's compiler."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

# PyTorch's or another program's tests use the GPU too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A TPU's compiler asks for the machine that it runs on; there is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from examples.bench.measure import Run
from examples.bench.measure import host_clock as clock  # noqa: F401  how calls are timed
from lmf_multi import LMFSpec
from lmf_multi.jax import LMFLoss

Loss = Callable[[Array, Array], Array]
AOT_SHAPES = [(4096, 1000), (65536, 8)]  # rows of one chip


def contenders(shape: tuple[int, ...], dtype: str, device: str) -> dict[str, Run]:
    """Names, and what runs one forward and backward pass on fixed logits and labels.

    ``shape`` is PyTorch's (N, C, …); the class axis is last here.
    """
    z, y = inputs(shape, dtype)
    copy = jax.jit(lambda z: z.copy())

    def step(loss: Loss) -> Run:
        program = None

        def call() -> None:
            nonlocal program
            program = program or compiled(loss, z, y)
            jax.block_until_ready(program(z, y))

        def memory() -> int:
            """Of the compiled program beside its inputs: temporaries and the gradient."""
            found = program.memory_analysis()
            return found.temp_size_in_bytes + found.output_size_in_bytes

        return Run(call, memory)

    runs = {"copy": Run(lambda: jax.block_until_ready(copy(z)), lambda: None)}
    return runs | {name: step(loss) for name, loss in losses(shape[1]).items()}


def prepare(device: str) -> dict[str, float]:
    """Refuse another device than there is."""
    platform = {"cuda": "gpu"}.get(device, device)
    if jax.default_backend() != platform:
        raise SystemExit(f"JAX finds no {platform}, got {jax.default_backend()}")
    return {}


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """Logits with the class axis last, and labels."""
    N, C, *spatial = shape
    z = jax.random.normal(jax.random.key(0), (N, *spatial, C), dtype)
    return z, jax.random.randint(jax.random.key(1), (N, *spatial), 0, C)


def losses(C: int) -> dict[str, Loss]:
    """Mean losses of C classes, long-tailed as in the applications: 1000 to 10."""
    spec = LMFSpec([round(1000 * 100 ** (-j / (C - 1))) for j in range(C)])
    margins, weights = (jnp.asarray(v, jnp.float32) for v in (spec.margins, spec.weights))

    def cross_entropy(z: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def published(z: Array, y: Array) -> Array:
        return published_formula(z, y, margins, weights, spec)

    ours = LMFLoss.from_spec(spec)
    return {
        "cross-entropy": cross_entropy,
        "published formula": published,
        "ours": lambda z, y: ours(z, y),
    }


def published_formula(z: Array, y: Array, Δ: Array, w: Array, spec: LMFSpec) -> Array:
    """LMF as it is published: a cross-entropy of shifted, scaled logits and a focal one."""
    is_y = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
    shifted = spec.scale * (z - is_y * Δ.astype(z.dtype))
    ldam = w[y] * optax.softmax_cross_entropy_with_integer_labels(shifted, y)
    ce = optax.softmax_cross_entropy_with_integer_labels(z, y)
    focal = (1 - jnp.exp(-ce)) ** spec.gamma * w[y] * ce
    return spec.alpha * ldam.sum() / w[y].sum() + spec.beta * focal.mean()


def compiled(loss: Loss, z: Any, y: Any) -> Any:
    """Value and gradient."""
    return jax.jit(jax.value_and_grad(loss)).lower(z, y).compile()


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    device = jax.devices()[0]
    found = {"jax": jax.__version__, "optax": optax.__version__}
    return found if device.platform == "cpu" else found | {"device": device.device_kind}


# --- ahead of time, for a TPU that is not here


class Program(NamedTuple):
    """What XLA says of a compiled loss, for each chip."""

    shape: tuple[int, int]
    loss: str
    bytes_accessed: int
    temporaries: int
    estimated_seconds: float | None  # XLA's cost model; None where it has none


def compile_ahead(topology: str) -> list[Program]:
    """Every loss for a TPU topology such as ``v5e:2x2``, the batch sharded over its chips."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    chips = len(description.devices)
    mesh = Mesh(np.array(description.devices), ("batch",))
    by_rows = NamedSharding(mesh, PartitionSpec("batch"))
    programs = []
    for rows, C in AOT_SHAPES:
        z = jax.ShapeDtypeStruct((rows * chips, C), jnp.float32, sharding=by_rows)
        y = jax.ShapeDtypeStruct((rows * chips,), jnp.int32, sharding=by_rows)
        for name, loss in losses(C).items():
            program = compiled(loss, z, y)
            cost = program.cost_analysis()
            seconds = cost.get("optimal_seconds", -1)
            programs.append(
                Program(
                    (rows, C),
                    name,
                    int(cost["bytes accessed"]),
                    program.memory_analysis().temp_size_in_bytes,
                    seconds if seconds > 0 else None,
                )
            )
    return programs


def report_aot(topology: str, console: Console) -> list[Program]:
    """Compile, and print a table."""
    caption = (
        "as XLA counts them, for each chip; ratio: bytes to cross-entropy's\n"
        "estimate: XLA's cost model, not a measurement; – where it gives none"
    )
    title = f"{topology}, forward + backward, float32, the batch sharded over all chips"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("logits of a chip")
    table.add_column("loss")
    for heading in ("MB accessed", "ratio", "MB temporary", "estimate, µs"):
        table.add_column(heading, justify="right")
    programs, plain = compile_ahead(topology), 1
    for program in programs:
        if program.loss == "cross-entropy":
            plain = program.bytes_accessed
            table.add_section()
        estimate = program.estimated_seconds
        table.add_row(
            str(program.shape) if program.loss == "cross-entropy" else "",
            program.loss,
            f"{program.bytes_accessed / 1e6:.1f}",
            f"{program.bytes_accessed / plain:.2f}",
            f"{program.temporaries / 1e6:.2f}",
            "–" if estimate is None else f"{1e6 * estimate:.0f}",
        )
    console.print(table)
    return programs
