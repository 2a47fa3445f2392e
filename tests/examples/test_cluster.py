"""A study on a Ray cluster: nodes that leave, devices, and what cannot run there."""

import _thread
import doctest
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.frameworks import load

for package in ("PIL", "sklearn", "rich", "matplotlib", "tensorboard", "ray"):
    load(package)

from examples import compare  # noqa: E402
from examples.study import cluster as ray_cluster  # noqa: E402
from examples.study import node, planning  # noqa: E402
from examples.study.execution import DONE, FAILED, Execution  # noqa: E402
from tests.examples.clusters import add_node, cluster  # noqa: E402

ROOT = Path(__file__).parents[2]

# Stands for a trainer: dies as when memory is short, the first times; its result comes late.
TRAINER = """
import json, os, signal, subprocess, sys
from pathlib import Path

out, kills, delay = Path(sys.argv[sys.argv.index("--out") + 1]), int(sys.argv[1]), sys.argv[2]
with (out / "attempts").open("a") as attempts:
    attempts.write("x")
if (out / "attempts").stat().st_size <= kills:
    os.kill(os.getpid(), signal.SIGKILL)
names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE", "KERAS_BACKEND", "NPROC")
result = {"epochs": 3} | {name: os.environ.get(name) for name in names}
(out / "unfinished").write_text(json.dumps(result))
subprocess.Popen(["sh", "-c", f"sleep {delay}; mv {out}/unfinished {out}/result.json"])
"""


@pytest.fixture(scope="module")
def nodes():
    with cluster(num_cpus=2, num_gpus=2) as started:
        yield started


@pytest.fixture
def study(tmp_path):
    """Two trainings."""
    trainings = planning.plan(["digits"], ["small"], ["torch"], ["ce"], 2, ["--epochs", "3"])
    return planning.remember(tmp_path, "", trainings)


def run(study, address, *, cpus=1, gpus=None, kills=0, delay=0):
    """All its trainings: their states, what the engine said, and its room at the start."""
    words = ["-c", TRAINER, str(kills), str(delay)]
    engine = ray_cluster.RayEngine(address, cpus, gpus, lambda training, threads: words)
    room, told = engine.room(), []
    try:
        execution = Execution(study, study.trainings, engine, lambda *change: None, told.append)
        execution.run()
    finally:
        engine.close()
    return set(execution.states.values()), told, room


def found(study):
    """The results."""
    files = (study.out(training) / "result.json" for training in study.trainings)
    return [json.loads(file.read_text()) for file in files]


# --- where it runs


@pytest.mark.parametrize(
    ("cpus", "gpus", "room", "devices", "shared"),
    [(1, 0.5, 4, {"0", "1"}, "false"), (1, None, 4, {"0", "1"}, None), (2, 0, 2, {""}, None)],
)
def test_a_training_has_its_share_of_a_node(
    study, nodes, monkeypatch, cpus, gpus, room, devices, shared
):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # the user's word, which the nodes did not hear
    monkeypatch.delenv("NPROC", raising=False)
    assert run(study, nodes.address, cpus=cpus, gpus=gpus) == ({DONE}, [], room)
    for result in found(study):
        assert result["CUDA_VISIBLE_DEVICES"] in devices
        assert result["XLA_PYTHON_CLIENT_PREALLOCATE"] == shared
        assert (result["KERAS_BACKEND"], result["NPROC"]) == ("jax", str(cpus))


def test_a_trainer_that_is_killed_is_tried_again(study, nodes):
    assert run(study, nodes.address, kills=2)[0] == {DONE}
    assert [(study.out(t) / "attempts").read_text() for t in study.trainings] == ["xxx", "xxx"]


def test_not_for_ever(study, nodes, monkeypatch):
    monkeypatch.setattr(ray_cluster, "RETRIES", 1)
    assert run(study, nodes.address, kills=9)[0] == {FAILED}
    assert [(study.out(t) / "attempts").read_text() for t in study.trainings] == ["xx", "xx"]
    log = (study.out(study.trainings[0]) / "log.txt").read_text()
    assert "the trainer was ended from outside, with status -9" in log


def test_a_result_may_be_seen_late(study, nodes):
    """As on a network file system."""
    assert run(study, nodes.address, delay=2)[0] == {DONE}


def test_nodes_that_come_and_go_are_told_of(monkeypatch):
    monkeypatch.setattr(ray_cluster, "LOOK", 0)
    with cluster(num_cpus=1) as started:
        engine = ray_cluster.RayEngine(started.address, 1, None)
        try:
            for node in started.list_all_nodes()[1:]:
                started.remove_node(node, allow_graceful=True)
            told = []
            wait_until(lambda: told.extend(engine.wait()) or engine.room() == 0)
            assert [line.partition(" has left the cluster;")[1] != "" for line in told]
            assert told[-1] == "No node has room for a training now; waiting for one to join."
            add_node(started, num_cpus=3)
            wait_until(lambda: told.extend(engine.wait()) or engine.room() == 3)
            assert told[-1].endswith("has joined the cluster")
        finally:
            engine.close()


# --- what cannot run


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--address 127.0.0.1:1", "got 127.0.0.1:1 ([Errno 111] Connection refused); ray start"),
        ("--address nowhere", "got nowhere (invalid literal"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--engine", "ray", *flags.split(), "--out", str(tmp_path / "study")])
    assert sentence in str(stopped.value)
    assert not (tmp_path / "study").exists()


def test_more_than_a_node_has_is_one_sentence(tmp_path, nodes):
    flags = f"--engine ray --address {nodes.address} --cpus-per-training 3 --gpus-per-training 1"
    with pytest.raises(SystemExit) as stopped:
        compare.main([*flags.split(), "--out", str(tmp_path / "study")])
    assert str(stopped.value) == (
        "error: a training must fit on one node, got --cpus-per-training 3 and "
        "--gpus-per-training 1; the largest node has 2 CPUs, and 2 GPUs at most"
    )
    assert not (tmp_path / "study").exists()


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path):
    order = node.Order(("-c", ""), "study/runs/a", str(tmp_path), 1, 0, {}, frozenset(), 0)
    with pytest.raises(FileNotFoundError, match="study/runs/a must be on a file system that every"):
        node.train(order)


def test_a_stop_while_a_trainer_starts_reaches_it(tmp_path, monkeypatch):
    """Ray interrupts the worker, wherever it is: here before the process is known to it."""

    def interrupted(*arguments):
        process = launch(*arguments)
        wait_until(lambda: "waiting" in (tmp_path / "log.txt").read_text())
        _thread.interrupt_main()
        return process

    launch = node.launch
    monkeypatch.setattr(node, "launch", interrupted)
    trainer = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130)); "
    words = ("-c", trainer + "print('waiting', flush=True); time.sleep(60)")
    order = node.Order(words, ".", str(tmp_path), 1, 0, {}, frozenset((130,)), 0)
    assert node.train(order).status == 130


def test_doctests():
    assert doctest.testmod(ray_cluster).failed == 0


# --- nodes that leave


def wait_until(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def under_way(runs):
    """The trainings that have a checkpoint and no result yet."""
    begun = {folder.parents[1] for folder in runs.glob("*/checkpoints/*-*[0-9]")}
    return {out for out in begun if not (out / "result.json").exists()}


def test_trainings_of_a_node_that_dies_go_on_elsewhere_from_their_checkpoints(tmp_path):
    """Real ones, of a command as users start it, in a folder that is not the nodes'."""
    load("torch")
    epochs, log = 100, tmp_path / "log.txt"  # both nodes are at work when one dies
    command = f"-m examples.compare --losses ce,lmf --seeds 1 --epochs {epochs} --image-size 16"
    with cluster(num_cpus=1) as started, log.open("w") as stream:
        command += f" --engine ray --address {started.address} --out study"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *command.split()], cwd=tmp_path, env=env, stdout=stream
        )
        wait_until(lambda: len(under_way(tmp_path / "study" / "runs")) == 2)
        started.remove_node(started.list_all_nodes()[-1], allow_graceful=False)
        assert process.wait(300) == 0
    told = log.read_text()
    assert "has left the cluster; its trainings go on from their checkpoints" in told
    assert "2 of 2 trainings are done." in told
    study = planning.read(tmp_path / "study")
    assert len(study.results()) == 2
    assert [len(study.history(t)["epoch"]) for t in study.trainings] == [epochs, epochs]
    logs = "".join((study.out(t) / "log.txt").read_text() for t in study.trainings)
    assert logs.count("Going on after epoch") == 1
