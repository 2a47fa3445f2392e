"""What a training step needs of a TPU that is not here: its compiler (libtpu) says it.

Chips compile the same program each, so that every figure is one chip's.
"""

import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Sharding
from rich.console import Console
from rich.table import Table

# GiB of a chip: cloud.google.com/tpu/docs/system-architecture-tpu-vm
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
MIB, GIB = 2**20, 2**30

# JAX, as it is imported, sets this where it finds no TPU. libtpu would then ask which one there is,
# and keep other processes out as if it had one.
if "TPU_SKIP_MDS_QUERY" in os.environ:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def devices(topology: str) -> list[Any]:
    """The chips of a topology such as ``v5e:2x4``, for compiling only.

    Raises:
        ValueError: there is no such topology, or no libtpu to ask.
    """
    # as JAX runs on v4: the two cores of a chip are one device
    options = {"chip_config_name": "megacore"} if generation(topology) == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **options)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--aot must name a TPU topology such as v5e:2x4, and needs libtpu "
            f"(pip install 'lmf-multi[tpu]'), got {topology}: {first_line(error)}"
        ) from error
    return list(found.devices)


def generation(topology: str) -> str:
    """``v5e`` of ``v5e:2x4``."""
    return topology.partition(":")[0]


def first_line(error: Exception) -> str:
    """The sentence of an error of XLA, without the pages after it."""
    return str(error).partition("\n")[0]


def abstract(tree: Any, sharding: Sharding) -> Any:
    """The shapes and dtypes of arrays that are placed there."""
    shapes = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(lambda x: x.update(sharding=sharding), shapes)


def compile_step(step: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compile a jitted step for the chips that its arguments, all abstract, are on.

    Raises:
        ValueError: it does not fit the chip's memory.
    """
    try:
        return step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"the step does not fit; try a smaller --batch-size, --bf16 or more chips: "
            f"{first_line(error)}"
        ) from error


def report(topology: str, compiled: jax.stages.Compiled, chips: int) -> None:
    """Print a table of what the compiler says."""
    table = Table(title=f"One training step on {topology}, {chips} chips", show_header=False)
    table.add_column()
    table.add_column("of a chip", justify="right")
    for name, value in figures(compiled).items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(verdict(topology, needed(compiled)))


def figures(compiled: jax.stages.Compiled) -> dict[str, str]:
    """What the compiled step takes on each chip, in words; costs where the compiler has a model."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    found = {
        "arguments: state and batch": mib(memory.argument_size_in_bytes),
        "outputs: state and loss": mib(memory.output_size_in_bytes),
        "of these in the memory of donated arguments": mib(memory.alias_size_in_bytes),
        "temporaries: activations, gradients": mib(memory.temp_size_in_bytes),
        "program": mib(memory.generated_code_size_in_bytes),
        "needed in all": mib(needed(compiled)),
    }
    if (accessed := cost.get("bytes accessed", -1)) > 0:
        found["memory read and written"] = mib(accessed)
    if (flops := cost.get("flops", -1)) > 0:
        found["floating-point operations"] = f"{flops / 1e9:,.1f} G"
    return found


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of a chip while the step runs; what is donated counts once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:,.1f} MiB"


def verdict(topology: str, size: int) -> str:
    """Whether so many bytes fit a chip, where its memory is known."""
    if (hbm := HBM.get(generation(topology))) is None:
        return f"The memory of a {generation(topology)} chip is not known here: no verdict."
    share = size / (hbm * GIB)
    return f"{'It fits' if share < 1 else 'It does not fit'}: {share:.1%} of the chip's {hbm} GiB."
