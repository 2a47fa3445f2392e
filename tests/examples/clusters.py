"""Ray clusters of several nodes on this machine, as small as they can be."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tests.frameworks import load

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}  # bytes
PROMPT = {  # to notice within seconds that a node is gone, and to train beside other work
    "worker_niceness": 0,
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


@contextmanager
def cluster(**resources) -> Iterator:
    """A head that trains nothing and two nodes with these resources, such as ``num_cpus=1``."""
    load("ray")
    from ray.cluster_utils import Cluster

    head = SMALL | {"num_cpus": 0, "_system_config": PROMPT}
    with processes_begin():
        started = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            add_node(started, **resources)
        yield started
    finally:
        started.shutdown()


def add_node(started, **resources):
    """One more."""
    with processes_begin():
        return started.add_node(**SMALL, **resources)


@contextmanager
def processes_begin() -> Iterator[None]:
    """Without JAX' warning of a fork, if another test has used JAX: Ray's become other programs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os.fork\(\) was called", RuntimeWarning)
        yield
