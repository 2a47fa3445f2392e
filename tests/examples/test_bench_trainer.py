"""The trainer beside a plain loop, as a user measures it."""

import re
import subprocess
import sys

from tests.examples.test_trainers import NEEDS, ROOT, SHARED
from tests.frameworks import load


def test_the_trainer_takes_turns_with_a_plain_loop():
    for package in (*SHARED, *NEEDS["torch"]):
        load(package)
    small = "--images 48 --side 40 --image-size 16 --batch-size 8 --epochs 2 --rounds 2 --workers 1"
    command = [sys.executable, "-m", "examples.bench.trainer", *small.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = r"│ ([\w ,]+?) +│ +(\d+) │ +([\d.]+) \(([\d.]+) to ([\d.]+)\) │"
    rows = {row[0]: list(map(float, row[1:])) for row in re.findall(pattern, done.stdout)}
    assert list(rows) == [
        "plain loop",
        "trainer, images in memory",
        "trainer, decoding each epoch",
    ]
    assert rows["plain loop"][1:] == [1, 1, 1]
    assert all(low <= ratio <= high and speed > 0 for speed, ratio, low, high in rows.values())
    assert re.search(r"^The loss takes \d+ µs, \d+\.\d+% of a step in memory\.$", done.stdout, re.M)
