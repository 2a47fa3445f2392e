"""A disk that fills up under a training: one sentence, and nothing lost of what was saved."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.training.checkpoints import Checkpoints
from tests.frameworks import load

ROOT = Path(__file__).parents[2]
EPOCHS = 300  # of which few are trained before the disk is full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("only root may mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def train(framework, out, *flags, epochs=EPOCHS):
    """A trainer under way."""
    for package in {"torch": ("torch",), "flax": ("flax",), "keras": ("keras",)}[framework]:
        load(package)
    command = f"-m examples.train_{framework} --image-size 16 --epochs {epochs} --out".split()
    return subprocess.Popen(
        [sys.executable, *command, out, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(process, out):
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("*-*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def check_that_nothing_is_lost(framework, process, out):
    """It ended with a sentence, and goes on from the newest checkpoint, which is whole."""
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith("error: ") and last.endswith("--resume goes on from the last checkpoint")
    damages = []
    newest = Checkpoints(out / "checkpoints", damages.append).newest()
    assert newest.state["epoch"] >= 1 and damages == []
    return last, newest.state["epoch"]


def check_that_it_goes_on(framework, out, epoch):
    told = train(framework, out, "--resume", epochs=epoch + 1).communicate(timeout=120)[0]
    assert f"Going on after epoch {epoch} of {epoch + 1}." in told, told
    assert (out / "result.json").exists()


def test_a_full_disk(small_disk):
    out = small_disk / "run"
    process = train("torch", out)
    wait_for_checkpoint(process, out)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(2**25))
    sentence, epoch = check_that_nothing_is_lost("torch", process, out)
    assert "No space left on device" in sentence
    filler.unlink()
    check_that_it_goes_on("torch", out, epoch)


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux'")
@pytest.mark.parametrize("framework", ["torch", "flax", "keras"])
def test_files_that_may_not_grow(tmp_path, framework):
    """As by a quota, and where no file system can be mounted."""
    out = tmp_path / "run"
    process = train(framework, out)
    wait_for_checkpoint(process, out)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    sentence, epoch = check_that_nothing_is_lost(framework, process, out)
    assert "File too large" in sentence or "could not be written" in sentence
    check_that_it_goes_on(framework, out, epoch)
