"""Checkpoints: whole or absent, told apart from damaged ones, and only as many as are needed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.training.checkpoints import DIGESTS, Checkpoints, write_atomically

ROOT = Path(__file__).parents[2]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings):
    return Checkpoints(tmp_path / "checkpoints", warnings.append)


def state(epoch, best, step=0):
    return {"epoch": epoch, "step": step, "best_epoch": best}


def save(checkpoints, epoch, best, step=0):
    """A checkpoint with one file in its folder and one below it."""

    def write(folder):
        (folder / "model").write_text(f"weights of epoch {epoch}")
        (folder / "below").mkdir()
        (folder / "below" / "optimizer").write_bytes(bytes(1000))

    checkpoints.save(state(epoch, best, step), write)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_without_any_there_is_none(checkpoints):
    assert checkpoints.newest() is None


def test_the_newest_comes_back_as_it_was_written(checkpoints, warnings):
    for epoch in (1, 2, 10):  # not in the order of the numbers' text
        save(checkpoints, epoch, best=1)
    save(checkpoints, 10, best=1, step=3)
    found = checkpoints.newest()
    assert found.state == state(10, 1, step=3)
    assert (found.folder / "model").read_text() == "weights of epoch 10"
    assert (found.folder / "below" / "optimizer").read_bytes() == bytes(1000)
    assert warnings == []


def test_the_last_two_and_their_best_epochs_are_kept(checkpoints):
    for epoch, best in enumerate([1, 2, 2, 4, 4, 4], 1):
        save(checkpoints, epoch, best)
    assert names(checkpoints) == ["00004-0000000", "00005-0000000", "00006-0000000"]
    save(checkpoints, 7, best=7)
    save(checkpoints, 8, best=7)
    assert names(checkpoints) == ["00007-0000000", "00008-0000000"]


@pytest.mark.parametrize("file", ["model", "below/optimizer", "state.json", DIGESTS])
@pytest.mark.parametrize("harm", ["cut short", "one bit", "gone"])
def test_a_damaged_one_falls_back_to_the_one_before(checkpoints, warnings, file, harm):
    save(checkpoints, 1, best=1)
    save(checkpoints, 2, best=1)
    path = checkpoints.folder / "00002-0000000" / file
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert checkpoints.newest().state == state(1, 1)
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint 00002-0000000 is damaged (00002-0000000/")
    assert warnings[0].endswith("; trying the one before")
    save(checkpoints, 2, best=2)  # and the run goes on over it
    assert checkpoints.newest().state == state(2, 2)


def test_one_whose_best_epoch_is_damaged_is_not_gone_on_from(checkpoints, warnings):
    for epoch, best in [(1, 1), (2, 2), (3, 2)]:
        save(checkpoints, epoch, best)
    (checkpoints.folder / "00002-0000000" / "model").write_text("")
    assert checkpoints.newest() is None  # epoch 2 is damaged itself, epoch 1 was dropped
    assert [w[: len("checkpoint 00003")] for w in warnings] == [
        "checkpoint 00003",
        "checkpoint 00002",
    ]


def test_an_error_while_writing_leaves_the_old_ones_alone(checkpoints):
    save(checkpoints, 1, best=1)

    def write(folder):
        (folder / "model").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(state(2, 1), write)
    assert checkpoints.newest().state == state(1, 1)
    save(checkpoints, 2, best=1)
    assert names(checkpoints) == ["00001-0000000", "00002-0000000"]


KILLED = """
import os, signal, sys
from pathlib import Path
from examples.training import checkpoints
from examples.training.checkpoints import Checkpoints

def write(folder):
    (folder / "model").write_text("weights")

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

c = Checkpoints(Path(sys.argv[1]), print)
c.save({"epoch": 1, "step": 0, "best_epoch": 1}, write)
if sys.argv[2] == "write":
    write = kill
elif sys.argv[2] == "rename":
    Path.rename = kill
else:
    setattr(checkpoints, sys.argv[2], kill)
c.save({"epoch": 2, "step": 0, "best_epoch": 1}, write)
"""


@pytest.mark.parametrize("moment", ["write", "digests", "sync", "rename"])
def test_a_kill_while_writing_leaves_the_one_before(checkpoints, warnings, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(checkpoints.folder), moment], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert checkpoints.newest().state == state(1, 1)
    assert warnings == []
    save(checkpoints, 2, best=1)  # over what the killed process left
    assert names(checkpoints) == ["00001-0000000", "00002-0000000"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, json.dumps({"a": 1}).encode())

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"other")
    assert json.loads(path.read_text()) == {"a": 1}
