"""The network of a finished Flax run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, export

from examples.models import flax as models
from examples.trained.finished import Finished
from examples.training import checkpoints_flax as checkpoints

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # that an exported program runs on


def network(run: Finished) -> Callable[[np.ndarray], np.ndarray]:
    """Pixels uint8 (N, S, S, 3) to logits float32 (N, C); compiled anew for each N."""
    graph, state = nnx.split(built(run, jnp.bfloat16 if run.bf16 else jnp.float32))

    @jax.jit
    def forward(state: nnx.State, pixels: Array) -> Array:
        return nnx.merge(graph, state)(models.normalize(pixels))

    return lambda pixels: np.asarray(forward(state, pixels))


def built(run: Finished, dtype: Any) -> nnx.Module:
    """With the checkpoint's weights, in evaluation; dtype is that of the computation."""
    options = {"head": run.head, "dtype": dtype, "rngs": nnx.Rngs(0)}
    model = models.build(run.arch, run.num_classes, **options)
    saved = variables(run.checkpoint)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable[...] = jnp.asarray(saved[tuple(map(str, path))], variable.dtype)
    model.eval()
    return model


def variables(folder: Path) -> dict[tuple[str, ...], np.ndarray]:
    """The arrays of the network that the trainer has written, by their paths in it."""
    places = {tuple(name.split(".")): array for name, array in checkpoints.read(folder).items()}
    # an nnx.Variable holds its value
    return {place[1:-1]: array for place, array in places.items() if place[0] == "model"}


def export_stablehlo(run: Finished, file: Path) -> None:
    """Write what ``jax.export.deserialize`` reads, in float32, for any N, weights and all."""
    graph, state = nnx.split(built(run, jnp.float32))
    forward = jax.jit(lambda pixels: nnx.merge(graph, state)(models.normalize(pixels)))
    (rows,) = export.symbolic_shape("N")
    pixels = jax.ShapeDtypeStruct((rows, run.image_size, run.image_size, 3), np.uint8)
    file.write_bytes(export.export(forward, platforms=PLATFORMS)(pixels).serialize())


EXPORTS = {"stablehlo": export_stablehlo}
