"""The demo, run as a user runs it, and what it reads and reports."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from examples.training import quiet
from tests.frameworks import load

NEEDS = {"torch": ["torch"], "flax": ["jax", "flax", "optax"], "keras": ["keras"]}
NAMES = {"torch": "PyTorch", "flax": "Flax NNX", "keras": "Keras"}


@pytest.fixture(scope="module")
def demo():
    """The demo module, which itself imports no framework."""
    load("rich")
    load("sklearn")
    from examples import demo

    return demo


@pytest.fixture(scope="module")
def report(demo):
    """What the demo says of its runs."""
    from examples.study import report

    return report


def made_up(report, gains):
    """Runs of two frameworks in which LMF's scores are cross-entropy's plus one gain a seed."""
    return [
        report.Run(framework, loss, seed, 0.5 + gain, 0.3 + gain, 2.0, (1.0,))
        for framework in ("PyTorch", "Keras")
        for loss in report.LOSSES
        for seed, gain in enumerate(gains if loss == "LMF" else [0.0] * len(gains))
    ]


def test_the_training_images_have_a_long_tail_of_50_to_1(demo):
    counts = np.bincount(demo.digits.load(imbalance=50).train_labels)
    np.testing.assert_array_equal(counts, [100, 65, 42, 27, 18, 11, 7, 5, 3, 2])
    assert counts[0] / counts[-1] == 50


def test_the_test_images_keep_the_balance_and_are_not_trained_on(demo):
    digits = demo.digits.load(imbalance=50)
    counts = np.bincount(digits.test_labels)
    assert counts.sum() == 1797 - 10 * demo.digits.HEAD
    assert counts.max() <= 1.15 * counts.min()
    trained_on = {image.tobytes() for image in digits.train_images}
    assert len(trained_on) == 280
    assert trained_on.isdisjoint(image.tobytes() for image in digits.test_images)


def test_a_seed_fixes_the_split_and_another_changes_it(demo):
    first, again, other = (demo.digits.load(seed=seed).train_images for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("imbalance", ["0.5", "101", "nan"])
def test_an_impossible_imbalance_is_one_sentence(demo, capsys, imbalance):
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--imbalance", imbalance])
    assert f"imbalance must be between 1 and 100, got {float(imbalance)}" in capsys.readouterr().err


@pytest.mark.parametrize("framework", NEEDS)
def test_the_demo_trains_and_prints_its_table(demo, framework):
    """A process of its own, as users start it: no other test's imports are in the way."""
    for package in NEEDS[framework]:
        load(package)
    arguments = f"--frameworks {framework} --epochs 5 --seeds 2".split()
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for loss in ("cross-entropy", "LMF"):
        runs = re.findall(
            rf"^{NAMES[framework]}, {loss}, seed \d: loss (\S+) to (\S+), macro-F1 (\S+),",
            done.stdout,
            re.MULTILINE,
        )
        assert len(runs) == 2
        for first, last, macro_f1 in np.array(runs, dtype=float):
            assert last < first
            assert 0.1 < macro_f1 <= 1  # calling every image a zero scores 0.02
        mean = np.array(runs, dtype=float)[:, 2].mean()
        row = rf"│ {NAMES[framework]} +│ {loss} +│ (\S+) ± \S+ │ +\S+ ± \S+ │ +\d+\.\d │"
        shown = float(re.search(row, done.stdout)[1])
        np.testing.assert_allclose(shown, mean, atol=0.0011)  # both were rounded to three digits
    assert re.search(
        r"Rarest class \(digit 9, 2 training images\): LMF .* cross-entropy,", done.stdout
    )
    assert "Macro-F1: LMF" in done.stdout


def test_the_table_has_a_row_for_each_framework_and_loss(report):
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(report.table(made_up(report, [0.1, 0.3])))
    text = console.file.getvalue()
    for framework in ("PyTorch", "Keras"):
        assert re.search(
            rf"{framework} +│ cross-entropy │ 0\.500 ± 0\.000 │ +0\.300 ± 0\.000", text
        )
        assert re.search(rf"{framework} +│ LMF +│ 0\.700 ± 0\.141 │ +0\.500 ± 0\.141", text)


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ([0.2], "LMF is above cross-entropy, 0.700 against 0.500 (one seed, perhaps by chance)"),
        ([-0.2], "LMF is below cross-entropy, 0.300 against 0.500 (one seed, perhaps by chance)"),
        ([0.0], "LMF is level with cross-entropy"),
        # Student's interval: mean ± t · s / √3, with t = 4.303 for 95 % and two degrees of freedom
        (
            [0.1, 0.2, 0.3],
            "LMF is on a par with cross-entropy, 0.700 against 0.500 "
            "(+0.200, 95 % interval -0.048 to +0.448)",
        ),
        ([0.19, 0.2, 0.21], "LMF beats cross-entropy"),
        ([-0.19, -0.2, -0.21], "LMF loses to cross-entropy"),
    ],
)
def test_the_sentence_follows_from_the_numbers(report, gains, sentence):
    assert report.comparison(made_up(report, gains), "macro_f1").startswith(sentence)


def test_a_framework_that_is_not_installed_is_one_sentence(demo, capsys, monkeypatch):
    monkeypatch.setitem(demo.FRAMEWORKS, "flax", ("Flax NNX", ("numpy", "no_such_package")))
    assert demo.main(["--frameworks", "flax"]) == 1
    assert " ".join(capsys.readouterr().out.split()) == (
        "Flax NNX is left out because no_such_package is not installed; "
        "run: pip install 'lmf-multi[all]'"
    )


def test_a_loss_that_is_not_finite_stops_the_demo(demo, monkeypatch):
    def train(digits, loss, recipe, on_epoch):
        on_epoch(1.0)
        on_epoch(float("nan"))

    monkeypatch.setattr(demo, "import_train", lambda framework: train)
    with pytest.raises(FloatingPointError, match="PyTorch, LMF, seed 3, epoch 2: the loss is nan"):
        demo.run("torch", "LMF", epochs=2, seed=3, imbalance=50)


def test_stderr_is_kept_back_until_something_fails(capfd):
    with quiet.stderr_kept_back():
        os.write(2, b"a greeting")  # as C++ does, past sys.stderr
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError), quiet.stderr_kept_back():
        os.write(2, b"the reason")
        raise ImportError
    assert capfd.readouterr().err == "the reason"
