"""Trainings on many machines: Ray places each on a node with room, and places it again if it dies.

A training is a task that starts a trainer as a process and waits for it. What a trainer saved, its
log and its result lie in the study's folder, which every node sees; so a training whose node is
gone goes on elsewhere from its checkpoint. ``ray.cancel``, an interrupt of its worker, has the
trainer save and end.

Source: Ray, Task Fault Tolerance, docs.ray.io/en/latest/ray-core/fault_tolerance/tasks.html.
"""

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from examples.study import processes
from examples.study.node import Interrupted, Order, train
from examples.study.planning import Study, Training
from examples.study.processes import Command
from examples.study.trainer import LOG, POLL, Ended
from examples.training.start import STOPPED

ROOT = Path(__file__).parents[2]  # at the same path on every node
RETRIES = 10  # of a training that was ended from outside
PATIENCE = 120.0  # seconds; NFS frees the locks of a node that is gone after 90
LAG = 90.0  # seconds after which, at the latest, one node sees what another has written
LOOK = 1.0  # seconds between two looks at the nodes
CONNECT = 5.0  # seconds
# With these a user decides how a training computes, on each node as here.
PASSED_ON = ("CUBLAS_", "JAX_", "KERAS_", "LMF_MULTI_", "MKL_", "NPROC", "OMP_", "OPENBLAS_")
PASSED_ON += ("PYTHONPATH", "TF_", "TORCH_", "XLA_")
# How a process ends that a node took with it, or its administrator, or the kernel short of memory.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
FROM_OUTSIDE = frozenset((STOPPED, *(-number for number in SIGNALS)))


@dataclass
class Task:
    """A training under way, or about to be."""

    study: Study
    training: Training
    reference: Any
    started: float = field(default_factory=time.monotonic)
    finished: float | None = None  # when its task was seen to have ended

    def ended(self) -> Ended | None:
        """None while it runs, or its result is not seen here yet."""
        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        self.finished = self.finished or time.monotonic()
        try:
            ended = ray.get(self.reference)
        except TaskCancelledError:
            return Ended(STOPPED, 0.0)
        except RayError as error:
            self._log(str(getattr(error, "cause", None) or error))
            return Ended(1, 0.0)
        late = time.monotonic() - self.finished > LAG
        unseen = ended.status == 0 and not self.study.result(self.training)
        return None if unseen and not late else ended

    def stop(self) -> None:
        """Ask it to save and end; asked again, it ends at once."""
        ray.cancel(self.reference)

    def _log(self, text: str) -> None:
        with (self.study.out(self.training) / LOG).open("a") as log:
            log.write(f"{text.rstrip()}\n")


class RayEngine:
    """As many trainings at once as a running cluster has room for.

    Args:
        address: the head's ``host:port``; ``auto`` for the cluster that this machine is a node of.
        cpus: for each training.
        gpus: for each training, a part of one or several; None for one where there are any.
        words: what Python is started with for a training, as ``processes.command`` has it.

    Raises:
        ConnectionError: there is no cluster at the address.
        ValueError: no node has what a training needs.
    """

    def __init__(
        self, address: str, cpus: float, gpus: float | None, words: Command | None = None
    ) -> None:
        connect(address)
        self._nodes = alive()
        if gpus is None:
            gpus = float(any(has(node, "GPU") for node in self._nodes.values()))
        self.cpus, self.gpus, self._words = cpus, gpus, words or processes.command
        self.threads = max(1, int(cpus))
        if not self.room():
            self.close()
            raise ValueError(
                f"a training must fit on one node, got --cpus-per-training {cpus:g} and "
                f"--gpus-per-training {gpus:g}; the largest node has {self._most()}"
            )
        retries = {"max_retries": RETRIES, "retry_exceptions": [Interrupted]}
        self._train = ray.remote(num_cpus=cpus, num_gpus=gpus, **retries)(train)
        self._tasks: list[Task] = []
        self._looked = time.monotonic()
        self._passed_on = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}

    def room(self) -> int:
        """How many trainings the nodes hold at once, as of now."""
        return sum(places(node["Resources"], self.cpus, self.gpus) for node in self._nodes.values())

    def start(self, study: Study, training: Training) -> Task:
        """Have one begin, or go on."""
        order = Order(
            words=tuple(self._words(training, self.threads)),
            out=str(study.out(training)),
            cwd=os.getcwd(),
            threads=self.threads,
            gpus=self.gpus,
            passed_on=self._passed_on,
            from_outside=FROM_OUTSIDE,
            patience=PATIENCE,
        )
        task = Task(study, training, self._train.options(name=training.name).remote(order))
        self._tasks.append(task)
        return task

    def wait(self) -> Sequence[str]:
        """Until a task ends, at most a moment; says which nodes have come and gone."""
        self._tasks = [task for task in self._tasks if task.finished is None]
        if self._tasks:
            ray.wait([task.reference for task in self._tasks], timeout=POLL)
        else:
            time.sleep(POLL)
        if time.monotonic() - self._looked < LOOK:
            return ()
        self._looked = time.monotonic()
        return self._look()

    def close(self) -> None:
        """Let go of the cluster, which goes on."""
        ray.shutdown()

    def _look(self) -> list[str]:
        before, self._nodes = self._nodes, alive()
        news = [
            f"node {named(before[node])} has left the cluster; its trainings go on from their "
            "checkpoints where there is room"
            for node in before.keys() - self._nodes.keys()
        ]
        news += [
            f"node {named(self._nodes[node])} has joined the cluster"
            for node in self._nodes.keys() - before.keys()
        ]
        if news and not self.room():
            news.append("No node has room for a training now; waiting for one to join.")
        return news

    def _most(self) -> str:
        cpus, gpus = (max(has(n, name) for n in self._nodes.values()) for name in ("CPU", "GPU"))
        return f"{cpus:g} CPUs, and {gpus:g} GPUs at most"


def connect(address: str) -> None:
    """Join a running cluster.

    Raises:
        ConnectionError: there is none.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        if address != "auto":  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT).close()
        ray.init(address, logging_level="error", log_to_driver=False, runtime_env=importable())
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"--address must be that of a running Ray cluster which this machine is a node of, got "
            f"{address} ({reason}); ray start --head begins one"
        ) from error


def importable() -> dict[str, Any]:
    """Where the nodes find this package, whichever folders they and the command are started in."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}


def alive() -> dict[str, dict[str, Any]]:
    """The cluster's nodes by identifier, as Ray describes them."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def named(node: Mapping[str, Any]) -> str:
    """A node for a sentence."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def has(node: Mapping[str, Any], resource: str) -> float:
    """How much of a resource a node has."""
    return node["Resources"].get(resource, 0.0)


def places(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many trainings a node holds; a part of a GPU is never spread over two.

    >>> places({"CPU": 16.0, "GPU": 2.0}, 4, 0.6)
    2
    >>> places({"CPU": 16.0, "GPU": 2.0}, 4, 0)
    4
    """
    of_cpus = round(resources.get("CPU", 0.0) / cpus, 6)
    if not gpus:
        return int(of_cpus)
    there = resources.get("GPU", 0.0)
    of_gpus = there * int(round(1 / gpus, 6)) if gpus < 1 else there / gpus
    return int(min(of_cpus, of_gpus))
