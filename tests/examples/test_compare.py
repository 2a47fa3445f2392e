"""The study as one command: what it plans, and how its trainings run, fail, stop and go on."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.frameworks import load

for package in ("PIL", "sklearn", "rich", "matplotlib", "tensorboard"):
    load(package)

from examples import compare  # noqa: E402
from examples.study import execution, planning, processes, trainer  # noqa: E402
from tests.examples.clusters import cluster  # noqa: E402

ROOT = Path(__file__).parents[2]

# Stands for a trainer: writes its share of the cores as the result, fails, or waits to be stopped.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path

arguments, out = sys.argv[1:], Path(sys.argv[sys.argv.index("--out") + 1])
loss = arguments[arguments.index("--loss") + 1]
if loss == "focal":
    sys.exit("error: no luck today")
if loss == "ldam" and not (out / "state").exists():
    def save(number, frame):
        (out / "state").write_text("saved")
        print("Stopped and saved")
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    print("waiting", flush=True)
    time.sleep(60)
    sys.exit("was not stopped")
result = {"epochs": int(arguments[arguments.index("--epochs") + 1])}
result["threads"] = os.environ["OMP_NUM_THREADS"]
(out / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder for a study whose trainers are the one above, in processes of their own."""
    for name in trainer.environment(1, shared=True):
        if name.endswith("_THREADS"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        processes,
        "command",
        lambda training, threads: ["-c", TRAINER, *training.arguments],
    )

    def tell(planned):  # of results that have no scores
        (planned.folder / "report.html").touch()

    monkeypatch.setattr(compare.html_report, "tell", tell)
    return tmp_path / "study"


@pytest.fixture(scope="module")
def two_nodes():
    with cluster(num_cpus=1) as started:
        yield started


@pytest.fixture(params=["local", "ray"])
def engine(request, monkeypatch):
    """Flags of an engine that runs two trainings at once."""
    if request.param == "local":
        return "--jobs 2"
    address = request.getfixturevalue("two_nodes").address
    from examples.study import cluster as ray_cluster

    monkeypatch.setattr(ray_cluster, "PATIENCE", 0.5)
    return f"--engine ray --address {address}"


def run(out, flags):
    return compare.main([*flags.split(), "--epochs", "3", "--out", str(out)])


def results(out):
    """Names of the trainings that have a result file."""
    return {file.parent.name for file in out.glob("runs/*/result.json")}


# --- the plan


def test_every_combination_is_planned_seed_by_seed():
    trainings = planning.plan(
        ["digits", "data/HAM.npz"],
        ["small", "resnet50"],
        ["torch", "keras"],
        ["ce", "lmf:scale=5:head=cosine"],
        3,
        ["--epochs", "7"],
    )
    assert len(trainings) == 3 * 2 * 2 * 2 * 2
    assert [t.seed for t in trainings] == [0] * 16 + [1] * 16 + [2] * 16
    last = trainings[-1]
    assert (last.data, last.arch, last.framework) == ("HAM", "resnet50", "keras")
    assert last.name == "HAM-resnet50-keras-lmf_scale=5_head=cosine-2"
    settings = last.settings()
    assert (settings.loss, settings.loss_options["scale"]) == ("lmf", 5)
    assert (settings.head, settings.seed, settings.epochs) == ("cosine", 2, 7)
    assert settings.data == "data/HAM.npz"


def test_options_replace_flags_and_those_that_change_nothing_are_not_trained_again():
    losses = ["lmf", "lmf:alpha=1.5", "lmf:alpha=2", "lmf:epochs=9"]
    trainings = planning.plan(["digits"], ["small"], ["torch"], losses, 1, ["--epochs", "7"])
    assert [t.loss for t in trainings] == ["lmf", "lmf:alpha=2", "lmf:epochs=9"]
    assert [t.settings().epochs for t in trainings] == [7, 7, 9]
    losses = ["la", "la:logit-adjustment=1", "crt", "crt:head-epochs=1", "crt:head-epochs=2"]
    losses += ["ce", "ce:sampler=balanced", "ldam:logit-adjustment=1"]
    trainings = planning.plan(["digits"], ["small"], ["torch"], losses, 1, ["--epochs", "7"])
    kept = ["la", "crt", "crt:head-epochs=2", "ce", "ce:sampler=balanced"]
    assert [t.loss for t in trainings] == [*kept, "ldam:logit-adjustment=1"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--losses dice",
            "argument --losses: each loss must be one of ce, bwcce, focal, ldam, lmf, la, crt, "
            "got 'dice'",
        ),
        (
            "--archs vgg",
            "each arch must be one of small, resnet50, efficientnet_v2_s, densenet121, "
            "efficientnet_lite0, got 'vgg'",
        ),
        ("--frameworks jax", "each framework must be one of torch, flax, keras, got 'jax'"),
        ("--seeds 0", "argument --seeds: must be at least 1, got 0"),
        ("--sweep alpha", "argument --sweep: must be like alpha=0.5,1,1.5, got 'alpha'"),
        (
            "--jobs 2 --cpus-per-training 4",
            "error: --cpus-per-training belongs to --engine ray, got --engine local; "
            "leave one of them out",
        ),
        (
            "--engine ray --jobs 2",
            "error: --jobs belongs to --engine local, got --engine ray; leave one of them out",
        ),
        (
            "--engine ray --gpus-per-training 1.5",
            "argument --gpus-per-training: must be at most 1 or a whole number, got 1.5",
        ),
        (
            "--cpus-per-training 0",
            "argument --cpus-per-training: must be positive and finite, got 0.0",
        ),
        ("--epochs none", "argument --epochs: invalid whole number value: 'none'"),
        ("--batchsize 3", "unrecognized arguments: --batchsize 3"),
        ("--losses ce:scale=3", "--scale belongs to ldam, lmf, got --loss ce"),
        ("--sweep delta=1", "unrecognized arguments: --delta=1"),
        (
            "--seed 3",
            "error: --seed is the study's to choose, 0 for ce, got 3; leave it out",
        ),
        (
            "--losses lmf:arch=resnet50",
            "error: --arch is the study's to choose, small for lmf:arch=resnet50, "
            "got resnet50; leave it out",
        ),
        (
            "--data a/x.npz b/x.npz",
            "error: each training must have a name of its own, got x-small-torch-ce-0 twice; "
            "rename one of the data sources, or spell the losses' options apart",
        ),
    ],
)
def test_a_study_that_cannot_be_is_one_sentence(out, flags, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([*flags.split(), "--out", str(out)])
    told = capsys.readouterr().err.splitlines() or [str(stopped.value)]
    assert told[-1].endswith(sentence)
    assert not out.exists()


def test_without_ray_the_extra_that_brings_it_is_named(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--engine", "ray", "--out", str(out)])
    assert str(stopped.value) == (
        "error: --engine ray needs ray, which is not installed; run: pip install "
        "'lmf-multi[cluster]'"
    )
    assert not out.exists()


def test_doctests():
    for module in (compare, planning, processes):
        assert doctest.testmod(module).failed == 0


# --- processes


def test_a_failed_training_is_reported_and_does_not_stop_the_rest(out, engine, capsys):
    assert run(out, f"--losses focal,ce,lmf:scale=5 --seeds 2 {engine}") == 1
    assert results(out) == {
        f"digits-small-torch-{loss}-{seed}" for loss in ("ce", "lmf_scale=5") for seed in (0, 1)
    }
    told = capsys.readouterr().out
    log = out / "runs" / "digits-small-torch-focal-0" / "log.txt"
    assert "failed: digits-small-torch-focal-0, the end of its log:" in told
    assert "    error: no luck today" in told
    assert f"failed: digits-small-torch-focal-0, see {log}" in told
    assert "4 of 6 trainings are done." in told
    assert (out / "report.html").exists()
    assert log.read_text() == "error: no luck today\n"


@pytest.mark.parametrize(("jobs", "share"), [(1, 8), (3, 2), (16, 1)])
def test_each_training_has_its_share_of_the_cores(out, jobs, share, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    assert run(out, f"--losses ce --seeds 1 --jobs {jobs}") == 0
    found = json.loads((out / "runs/digits-small-torch-ce-0/result.json").read_text())
    assert found["threads"] == str(share)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's word
    assert trainer.environment(share, jobs > 1)["OMP_NUM_THREADS"] == "5"


# Notes its devices, and fails where another training has them at the same time.
ON_DEVICES = """
import json, os, sys, time
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
names = ("CUDA_VISIBLE_DEVICES", "TF_FORCE_GPU_ALLOW_GROWTH")
result = {name: os.environ.get(name) for name in names}
held = [out.parent / f"GPU {device}" for device in result[names[0]].split(",")]
if "alone" in sys.argv:
    for file in held:
        file.touch(exist_ok=False)
time.sleep(0.3)
(out / "result.json").write_text(json.dumps(result | {"epochs": 3}))
for file in held:
    file.unlink(missing_ok=True)
"""


@pytest.mark.parametrize(
    ("visible", "jobs", "devices"),
    [
        ("4,5,6,7", 2, {"4,5", "6,7"}),
        ("GPU-a, GPU-b,GPU-c", 2, {"GPU-a", "GPU-b"}),
        ("4,5", 3, {"4", "5"}),
        ("4,-1,5", 2, {"4"}),
        ("4,5", 1, {"4,5"}),
        ("", 2, {""}),
    ],
)
def test_each_job_has_gpus_of_its_own(out, monkeypatch, visible, jobs, devices):
    words = ["-c", ON_DEVICES, *(["alone"] if jobs <= len(devices) else [])]
    monkeypatch.setattr(processes, "command", lambda training, threads: words)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run(out, f"--losses ce --seeds 5 --jobs {jobs}") == 0
    found = [json.loads(file.read_text()) for file in out.glob("runs/*/result.json")]
    assert {result["CUDA_VISIBLE_DEVICES"] for result in found} == devices
    shared = "true" if jobs > len(devices) else None
    assert {result["TF_FORCE_GPU_ALLOW_GROWTH"] for result in found} == {shared}


def test_gpus_are_those_that_the_driver_lists(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert processes.gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    assert processes.gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert processes.gpus() == []


def test_what_is_done_is_not_run_again_unless_more_epochs_are_asked_for(out, capsys):
    assert run(out, "--losses ce --seeds 2") == 0
    files = [out / f"runs/digits-small-torch-ce-{seed}/result.json" for seed in (0, 1)]
    times = [file.stat().st_mtime_ns for file in files]
    assert run(out, "--losses ce --seeds 2") == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    assert "Trainings: 2, done already: 2, at once: 1." in capsys.readouterr().out
    assert compare.main(["--losses=ce", "--seeds=2", "--epochs", "5", "--out", str(out)]) == 0
    assert [json.loads(file.read_text())["epochs"] for file in files] == [5, 5]
    assert len(planning.read(out).commands) == 2
    assert len(planning.read(out).trainings) == 2


def test_a_study_goes_on_with_the_settings_that_it_began_with(out):
    assert run(out, "--losses ce --seeds 1") == 0
    with pytest.raises(SystemExit) as stopped:
        run(out, "--losses ce --seeds 1 --learning-rate 0.5")
    assert str(stopped.value) == (
        "error: --resume needs the learning_rate that the run began with, 0.0001, got 0.5; "
        "choose another --out to begin anew"
    )


def test_a_folder_that_holds_something_else_is_one_sentence_and_left_alone(out):
    out.write_text("thesis")
    with pytest.raises(SystemExit) as stopped:
        run(out, "--losses ce --seeds 1")
    assert str(stopped.value) == (
        f"error: --out must be a folder, got the file {out}; choose another"
    )
    assert out.read_text() == "thesis"
    out.unlink()
    out.mkdir()
    (out / "study.json").write_text('{"commands": [')
    with pytest.raises(SystemExit, match=r"study\.json must be JSON, as examples\.compare"):
        run(out, "--losses ce --seeds 1")
    assert (out / "study.json").read_text() == '{"commands": ['


REMEMBER = """
import sys
from pathlib import Path
from examples.study import planning

flags = ["--epochs", "3"]
trainings = planning.plan(["digits"], ["small"], ["torch"], sys.argv[2:3], 15, flags)
print("ready", flush=True)
sys.stdin.read(1)
for training in trainings:
    planning.remember(Path(sys.argv[1]), sys.argv[2], [training])
"""


def test_plans_that_are_made_at_once_do_not_lose_each_other(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [
        subprocess.Popen([sys.executable, "-c", REMEMBER, tmp_path, loss], **pipes)
        for loss in ("ce", "ldam", "lmf")
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("x")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    study = planning.read(tmp_path)
    assert len(study.trainings) == 45 and set(study.commands) == {"ce", "ldam", "lmf"}


def wait_for(path, text):
    """Until a file holds a text."""
    deadline = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.05)


def test_ctrl_c_lets_the_trainings_save_and_the_same_command_goes_on(out, engine, capsys):
    logs = [out / "runs" / f"digits-small-torch-ldam-{seed}" / "log.txt" for seed in (0, 1)]
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background

    def interrupt():
        for log in logs:
            wait_for(log, "waiting")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(out, f"--losses ldam,ce --seeds 2 {engine}") == 130
    thread.join()
    for log in logs:
        assert log.read_text() == "waiting\nStopped and saved\n"
    told = capsys.readouterr().out
    assert "stopped: digits-small-torch-ldam-0" in told and "ldam-1" in told
    assert told.endswith("Stopped; the same command goes on from there.\n")
    assert results(out) == {"digits-small-torch-ce-0"} and not (out / "report.html").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert run(out, f"--losses ldam,ce --seeds 2 {engine}") == 0
    assert len(results(out)) == 4


def test_a_training_that_runs_elsewhere_is_left_alone(out, engine, capsys):
    """As after kill -9 of the study, or on another machine."""
    folder = out / "runs" / "digits-small-torch-ldam-0"
    folder.mkdir(parents=True)
    hold = "import fcntl, sys, time; fcntl.flock(1, fcntl.LOCK_EX); print('held', flush=True)"
    with (folder / "log.txt").open("a") as log:
        other = subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(60)"], stdout=log)
    try:
        wait_for(folder / "log.txt", "held")
        assert run(out, f"--losses ldam,ce --seeds 1 {engine}") == 0
    finally:
        other.kill()
        other.wait()
    told = capsys.readouterr().out
    assert "left alone: digits-small-torch-ldam-0 is run by another process" in told
    assert "1 of 2 trainings are done." in told
    assert results(out) == {"digits-small-torch-ce-0"}


# --- what it shows


def test_the_table_counts_and_estimates(out):
    from rich.console import Console

    assert run(out, "--losses ce --seeds 2") == 0
    trainings = planning.plan(["digits"], ["small"], ["torch"], ["ce", "lmf"], 2, ["--epochs", "3"])
    planned = planning.remember(out, "", trainings)
    for training in trainings[::2]:
        (planned.out(training) / "seconds.json").write_text("90")
    show = compare.Show(planned, trainings, processes.LocalEngine(1))
    states = show.execution.states
    states[trainings[3]] = execution.FAILED
    np.testing.assert_allclose(show.execution.seconds_left(), 90)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(show.table())
    assert re.search(r"digits │ small +│ torch +│ +2 │ +0 │ +1 │ +1 │", shown.get())
    assert "about 1 min 30 s left" in shown.get()


def test_a_real_study_of_two_losses_ends_with_its_report(tmp_path):
    """Through the three trainers, on digits, as users start it."""
    for package in ("torch", "torchvision", "pytorch_grad_cam", "flax", "keras"):
        load(package)
    command = [sys.executable, "-m", "examples.compare", "--losses", "ce,lmf:scale=5"]
    command += ["--frameworks", "torch,flax,keras", "--seeds", "1"]
    command += ["--epochs", "1", "--learning-rate", "1e-3", "--out"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 trainings are done." in done.stdout
    found = planning.read(tmp_path).results()
    assert [t.loss for t in found] == 3 * ["ce", "lmf:scale=5"]
    for training, result in found.items():
        assert result["loss"]["name"] == training.loss.partition(":")[0]
        assert result["loss"].get("scale") == (5 if "scale" in training.loss else None)
        assert (result["seed"], result["epochs"]) == (training.seed, 1)
        assert planning.read(tmp_path).seconds(training) > 0
    for framework in planning.FRAMEWORKS:
        assert f"small on {framework}, one seed is too few to say what to train" in done.stdout
    assert f"All of it is in {tmp_path / 'report.html'}" in done.stdout
    assert "left out" not in done.stdout
    for framework in planning.FRAMEWORKS:
        file = tmp_path / "figures" / f"grad-cam-digits-small-{framework}.png"
        assert file.stat().st_size > 10_000
