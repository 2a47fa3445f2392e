"""A trainer as a process: its environment, its log, and the lock on it.

The process itself holds the lock: a training that goes on after what had started it was killed is
not started again beside itself. Imports little, as every node of a cluster does it anew.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LOG = "log.txt"
POLL = 0.1  # seconds


class Ended(NamedTuple):
    """What became of a training.

    status: its process's exit status, None where another process trains it already.
    seconds: that it ran.
    """

    status: int | None
    seconds: float


def launch(
    words: Sequence[str], out: Path, env: Mapping[str, str], cwd: str = "."
) -> subprocess.Popen[bytes] | None:
    """Start Python as a trainer that goes on in ``out``, which may be relative to ``cwd``.

    None where another process does so.
    """
    with (cwd / out / LOG).open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return subprocess.Popen(
            [sys.executable, *words, "--out", str(out), "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,  # a terminal's Ctrl-C comes through the study, once
        )


def environment(threads: int, shared: bool) -> dict[str, str]:
    """That of a training with so many cores, and perhaps a part of a GPU; the user's own stays."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    names += ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    names += ("NPROC",)  # XLA's on CPUs
    share = dict.fromkeys(names, str(threads))
    if shared:  # JAX and TensorFlow would each take the whole memory of a GPU
        share |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    return share | {"PYTHONUNBUFFERED": "1"} | os.environ
