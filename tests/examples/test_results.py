"""The results in docs are those of the stored table of results."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.frameworks import load

for package in ("scipy", "sklearn", "rich", "tensorboard"):
    load(package)

from examples.study import comparisons, planning, tables  # noqa: E402
from tests.pages import ROOT, page, prose  # noqa: E402

SECTION = page("docs/choose-a-loss.md").partition("\n## HAM10000 at 64 pixels")[2]
PROSE = prose(SECTION)
HAM10000 = planning.read(ROOT / "examples" / "study" / "ham10000")
RESULTS = HAM10000.results()
COMPARED = comparisons.against_baseline(HAM10000, RESULTS)
LOSSES = list(dict.fromkeys(training.loss for training in RESULTS))


def of(loss, score):
    """What ``score`` makes of each seed's result file, in the seeds' order."""
    found = {t.seed: score(result) for t, result in RESULTS.items() if t.loss == loss}
    return np.array([found[seed] for seed in sorted(found)])


def flags(loss):
    """As the trainers take a loss with its options."""
    return " ".join(part if i == 0 else f"--{part}" for i, part in enumerate(loss.split(":")))


def in_words(gain, low, high):
    """A difference and its interval."""
    return f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"


def change(loss, base, name="macro_f1"):
    """What a score of the test images differs by, its interval in words, and the verdict."""
    gains = of(loss, lambda r: r["test"][name]) - of(base, lambda r: r["test"][name])
    low, high = comparisons.interval(gains)
    about = (("ham10000", "small", "torch"), loss, comparisons.ARGMAX, len(gains))
    found = comparisons.Difference(*about, gains.mean(), low, high, comparisons.SEEDS, None)
    return in_words(gains.mean(), low, high), found.verdict


def validation(loss, first, last):
    """Mean macro-F1 on the validation images over epochs from first to last, and over seeds."""
    values = []
    for training in RESULTS:
        if loss in (training.loss, "all"):
            values += HAM10000.history(training)["val_macro_f1"][first - 1 : last]
    return f"{np.mean(values):.3f}"


def test_the_table():
    rarest = np.argmin(next(iter(RESULTS.values()))["data"]["class_counts"])
    scores = {row[3]: row[5:8] for row in tables.scores(RESULTS).rows}
    differences = {each.loss: each for each in COMPARED}
    lines = []
    for loss in LOSSES:
        rare = tuple(of(loss, lambda result: result["test"]["f1"][rarest]))
        cells = [f"`{flags(loss)}`", *map(tables.text, (*scores[loss], rare))]
        if loss in differences:
            cells += [str(differences[loss]), f"{differences[loss].p:.3f}"]
            cells.append(differences[loss].verdict)
        else:
            cells += ["–"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    expected = "\n".join(lines)
    assert expected in SECTION, f"\n{expected}"


def test_every_planned_training_is_there_with_the_command_that_made_it():
    assert len(RESULTS) == len(HAM10000.trainings)
    (command,) = HAM10000.commands
    shown = re.search(r"```console\n(python -m examples.compare .*?)\n```", SECTION, re.DOTALL)[1]
    shown = shown.replace("\\\n", " ").split()
    defaults = {"--archs", "small", "--frameworks", "torch"}
    how = {"--jobs", "2"}
    assert [word for word in command.split() if word not in defaults] == [
        word for word in shown if word not in how
    ]


STORED = [
    planning.read(file.parent) for file in sorted(HAM10000.folder.parent.glob("*/study.json"))
]


@pytest.mark.parametrize("study", STORED, ids=lambda study: study.folder.name)
def test_a_stored_table_is_whole_and_what_a_study_gathers(study, tmp_path):
    planning.gather(replace(study, folder=tmp_path))
    stored, gathered = (folder / "results.jsonl" for folder in (study.folder, tmp_path))
    assert stored.read_bytes() == gathered.read_bytes()
    assert len(stored.read_text().splitlines()) == len(study.trainings)


def test_what_they_took():
    seconds = [HAM10000.seconds(training) for training in HAM10000.trainings]
    took = f"{len(RESULTS)} trainings took {sum(seconds) / 3600:.1f} hours of a core"
    (device,) = {result["device"] for result in RESULTS.values()}
    assert f"{took} ({device}" in PROSE, took


def test_how_sure_they_are():
    data = next(iter(RESULTS.values()))["data"]
    support = [sum(row) for row in next(iter(RESULTS.values()))["test"]["confusion_matrix"]]
    assert f"{data['train']:,} images to train, {data['val']} to choose the epoch" in PROSE
    assert f"{data['test']:,} to test, {min(support)} of which show the rarest class" in PROSE
    seeds = len(of("ce", comparisons.macro_f1))
    held = re.search(rf"(\d+ %) of {seeds}", tables.DIFFERENCES_NOTE.split("2 seeds")[1])
    sentence = f"an interval of {seeds} seeds holds the true mean in about {held[1]} of studies"
    assert sentence in PROSE, sentence


@pytest.mark.parametrize(
    ("sentence", "loss", "base", "score", "verdict"),
    [
        ("balanced accuracy changes by {}", "lmf", "ce", "balanced_accuracy", "better"),
        ("accuracy by {}", "lmf", "ce", "accuracy", "worse"),
        ("balanced accuracy too, by {}", "lmf:scale=1", "ce", "balanced_accuracy", "better"),
        ("about the same, {}", "lmf:scale=1", "ce", "accuracy", "no clear difference"),
        ("minus focal's is {}", "lmf:scale=1", "focal", "macro_f1", "no clear difference"),
    ],
)
def test_what_is_said_of_other_differences(sentence, loss, base, score, verdict):
    words, found = change(loss, base, score)
    assert sentence.format(words) in PROSE, words
    assert found == verdict


def test_p_values_after_correction():
    smallest = f"{min(each.holm for each in COMPARED):.2f}"
    assert f"the smallest p is {smallest};" in PROSE, smallest


def test_validation_scores_have_stopped_rising():
    means = [validation("all", first, first + 4) for first in (6, 11, 16, 21, 26)]
    words = f"{', '.join(means[:-1])} and {means[-1]}"
    assert f"epochs 6–10, 11–15, 16–20, 21–25 and 26–30: {words}" in PROSE, words
    assert float(means[-1]) <= float(means[1]) + 0.005


@pytest.mark.parametrize("loss", LOSSES)
def test_validation_scores_of_the_last_epochs(loss):
    words = f"`{flags(loss)}` {validation(loss, 26, 30)}"
    assert words in PROSE, words
