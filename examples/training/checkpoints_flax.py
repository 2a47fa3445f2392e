"""The arrays of a checkpoint, for the Flax trainer, in Flax' own format: one file, nothing else."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.tree_util import KeyPath, keystr, tree_leaves_with_path

FILE = "state.msgpack"


def save(state: Any, folder: Path) -> None:
    """Write a state that is whole on this process."""
    arrays = {name(path): array for path, array in tree_leaves_with_path(jax.device_get(state))}
    (folder / FILE).write_bytes(serialization.msgpack_serialize(arrays))


def load(folder: Path, like: Any) -> Any:
    """The state that was saved, on the host, in the structure of another one."""
    arrays = read(folder)
    return jax.tree.map_with_path(lambda path, _: arrays[name(path)], like)


def read(folder: Path) -> dict[str, np.ndarray]:
    """All arrays by their names.

    Raises:
        FileNotFoundError: it is a checkpoint of before 0.2.0, which Orbax wrote.
    """
    if not (folder / FILE).exists():
        raise FileNotFoundError(
            f"{folder} must hold {FILE}, which checkpoints of before 0.2.0 do not; train anew, "
            "with another --out"
        )
    return serialization.msgpack_restore((folder / FILE).read_bytes())


def name(path: KeyPath) -> str:
    """An array's by its place in the state, such as ``model.head.kernel.value``."""
    return keystr(path, simple=True, separator=".")
