"""What is said of the studies is what their stored results say."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.frameworks import load

for package in ("scipy", "sklearn", "rich", "tensorboard"):
    load(package)

from examples.study import comparisons, planning  # noqa: E402
from examples.study.comparisons import ARGMAX, TUNED  # noqa: E402
from examples.training.settings import parse  # noqa: E402
from lmf_multi import LMFSpec  # noqa: E402
from lmf_multi.reference import LDAMLoss, LMFLoss  # noqa: E402
from tests.pages import ROOT, page, prose  # noqa: E402

SECTION = page("docs/choose-a-loss.md").partition("\n## HAM10000 at 64 pixels")[0]
PROSE = prose(SECTION)
NAMES = ("heads", "cnn")
STUDIES = {name: planning.read(ROOT / "examples" / "study" / name) for name in NAMES}
DATA = {"ham10000": "HAM10000", "pbc_lt": "PBC", "busi": "BUSI"}


@cache
def results(study):
    return STUDIES[study].results()


@cache
def kinds(study):
    """By dataset: the kind, and result files by loss and seed."""
    return {kind[0]: (kind, found) for kind, found in comparisons.by_kind(results(study)).items()}


def losses(study):
    return list(dict.fromkeys(training.loss for training in STUDIES[study].trainings))


@cache
def difference(study, data, ours, theirs, rule, score="macro_f1"):
    kind, found = kinds(study)[data]
    return comparisons.difference(STUDIES[study], kind, (ours, rule), (theirs, rule), found, score)


def mean(study, data, loss, rule):
    """Macro-F1, over seeds."""
    seeds = kinds(study)[data][1][loss].values()
    return np.mean([comparisons.scored(result, rule)["macro_f1"] for result in seeds])


def cell(study, data, loss, rule):
    """The mean; bold where it is clearly above cross-entropy's, ↓ where it is clearly below.

    A – where it was not measured.
    """
    if loss not in kinds(study)[data][1]:
        return "–"
    words = f"{mean(study, data, loss, rule):.3f}"
    if loss == "ce":
        return words
    verdict = difference(study, data, loss, "ce", rule).verdict
    return {"better": f"**{words}**", "worse": f"{words} ↓"}.get(verdict, words)


def table(study):
    """A row a loss; its mean macro-F1 on each dataset by argmax, and with τ tuned."""
    columns = [(data, rule) for data in DATA if data in kinds(study) for rule in (ARGMAX, TUNED)]
    rows = []
    for loss in losses(study):
        cells = [f"`{loss}`", *(cell(study, data, loss, rule) for data, rule in columns)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


@pytest.mark.parametrize("study", NAMES)
def test_the_tables(study):
    expected = table(study)
    assert expected in SECTION, f"\n{expected}"


# --- sentences


RECOMMENDED = "ldam:scale=1:logit-adjustment=1:class-weight=none"
MIXED = "lmf:scale=1:logit-adjustment=1:class-weight=none"


@cache
def over_datasets(ours, theirs, rule):
    """The mean of the three, of heads."""
    study, datasets = STUDIES["heads"], dict(kinds("heads").values())
    return comparisons.averaged(study, datasets, (ours, rule), (theirs, rule))


@cache
def of_tuning(data, study="heads"):
    """What τ does for cross-entropy."""
    kind, found = kinds(study)[data]
    return comparisons.difference(STUDIES[study], kind, ("ce", TUNED), ("ce", ARGMAX), found)


def test_the_recommended_loss_is_first_on_validation():
    """The best epoch's score of the chosen setting, with τ tuned, over seeds and three datasets."""
    means = {
        loss: np.mean(
            [
                np.mean([r["best_validation"]["macro_f1_tuned"] for r in found[loss].values()])
                for _, found in kinds("heads").values()
            ]
        )
        for loss in losses("heads")
    }
    assert max(means, key=means.get) == RECOMMENDED
    assert f"the row `{RECOMMENDED}`" in PROSE
    chosen = LMFSpec.recommended([9, 1])
    for data in DATA:
        result = next(iter(kinds("heads")[data][1][RECOMMENDED].values()))
        for name in ("scale", "class_weight", "logit_adjustment"):
            assert result["loss"][name] == getattr(chosen, name)
    assert (chosen.alpha, chosen.beta) == (1, 0)


def test_the_trainers_take_the_recommended_loss():
    flags = re.search(r"recommended loss as `(.*?)`", PROSE)[1]
    loss = parse("torch", flags.split(), "").loss_arguments([9, 1])
    spec, expected = LMFSpec.recommended([9, 1]), LDAMLoss.from_spec(LMFSpec.recommended([9, 1]))
    z, y = np.array([[1.0, 0.5], [-2.0, 0.3]]), [0, 1]
    np.testing.assert_array_equal(LDAMLoss(**loss)(z, y), expected(z, y))
    np.testing.assert_array_equal(LMFLoss.from_spec(spec)(z, y), expected(z, y))


def test_what_the_recommended_loss_gains():
    gains = [difference("heads", data, RECOMMENDED, "ce", TUNED) for data in DATA]
    mean = over_datasets(RECOMMENDED, "ce", TUNED)
    margins = over_datasets(RECOMMENDED, "la", TUNED)
    words = "HAM10000 {}, PBC {}, BUSI {}; in the mean of the three {}".format(*gains, mean)
    assert words in PROSE, words
    corrected = next(
        each.holm
        for each in comparisons.over_datasets(STUDIES["heads"], results("heads"))
        if (each.loss, each.rule) == (RECOMMENDED, TUNED)
    )
    words = f"p is {mean.p:.3f}, and {corrected:.3f} after Holm's correction"
    assert words in PROSE, words
    evidence = " ".join(LMFSpec.recommended.__doc__.split())
    scratch = difference("cnn", "pbc_lt", RECOMMENDED, "la", TUNED)
    for each in (*gains, mean, margins, scratch):
        assert str(each) in evidence, each


@pytest.mark.parametrize(
    ("sentence", "pairs"),
    [
        ("(`la`): {} in the mean", [(RECOMMENDED, "la", TUNED)]),
        ("By argmax they are, {}", [(RECOMMENDED, "la", ARGMAX)]),
        ("alone beat cross-entropy by {}", [("la", "ce", TUNED)]),
        ("scores {} over cross-entropy", [(MIXED, "ce", TUNED)]),
        ("cannot be told from it, {}", [(MIXED, RECOMMENDED, TUNED)]),
        (
            "`lmf` {}, `lmf:scale=1` {}, `ldam` {}, `focal` {}, `bwcce` {}, `crt`, on frozen "
            "features cross-entropy with balanced batches, {}",
            [
                (loss, "ce", TUNED)
                for loss in ("lmf", "lmf:scale=1", "ldam", "focal", "bwcce", "crt")
            ],
        ),
    ],
)
def test_what_is_said_of_means(sentence, pairs):
    words = sentence.format(*(over_datasets(*pair) for pair in pairs))
    assert words in PROSE, words


def test_what_is_said_of_decisions():
    words = "HAM10000 {}, PBC {}, BUSI {}".format(*map(of_tuning, DATA))
    assert f"tuning τ does for cross-entropy**: {words}" in PROSE, words
    balanced = difference("heads", "ham10000", RECOMMENDED, "ce", ARGMAX, "balanced_accuracy")
    words = "PBC is tested so: {} over cross-entropy's argmax. On HAM10000 it costs macro-F1, {}, "
    words = words.format(
        *(difference("heads", data, RECOMMENDED, "ce", ARGMAX) for data in ("pbc_lt", "ham10000"))
    )
    words += f"and gains balanced accuracy, {balanced}"
    assert words in PROSE, words


@pytest.mark.parametrize(
    ("sentence", "pairs"),
    [
        (
            "`la` {} over cross-entropy, the recommended row {}, published LMF {}.",
            [(loss, "ce", ARGMAX) for loss in ("la", RECOMMENDED, "lmf")],
        ),
        (
            "the recommended row minus `la` is {} by argmax and {} with τ tuned",
            [(RECOMMENDED, "la", rule) for rule in (ARGMAX, TUNED)],
        ),
        ("at most `focal`'s {}", [("focal", "ce", TUNED)]),
        ("the recommended row's is {}", [(RECOMMENDED, "ce", TUNED)]),
    ],
)
def test_what_is_said_of_training_from_scratch(sentence, pairs):
    words = sentence.format(*(difference("cnn", "pbc_lt", *pair) for pair in pairs))
    assert words in PROSE, words


def test_what_is_said_of_training_from_scratch_on_the_other_datasets():
    margins = (difference("cnn", "busi", RECOMMENDED, "la", rule) for rule in (ARGMAX, TUNED))
    words = "on BUSI {} and {}.".format(*margins)
    assert words in PROSE, words
    words = f"On BUSI it gives {of_tuning('busi', 'cnn')}."
    assert words in PROSE, words
    words = "On BUSI, 3 to 1, and on HAM10000 no loss differs clearly from cross-entropy"
    assert words in PROSE
    verdicts = {
        difference("cnn", data, loss, "ce", rule).verdict
        for data in ("busi", "ham10000")
        for loss in kinds("cnn")[data][1]
        for rule in (ARGMAX, TUNED)
        if loss != "ce"
    }
    assert verdicts == {"no clear difference"}
    scores = ("balanced_accuracy", "macro_f1")
    found = (difference("cnn", "ham10000", "la", "ce", ARGMAX, score) for score in scores)
    words = "`la` gains balanced accuracy by argmax, {}, for macro-F1, {}.".format(*found)
    assert words in PROSE, words


def test_what_a_loss_adds_from_scratch_once_tau_is_tuned():
    gains = {
        loss: difference("cnn", "pbc_lt", loss, "ce", TUNED).mean
        for loss in losses("cnn")
        if loss != "ce"
    }
    assert max(gains, key=gains.get) == "focal"
    words = f"Tuning τ gives cross-entropy {of_tuning('pbc_lt', 'cnn')} on PBC"
    assert words in PROSE, words
    took = sum(map(STUDIES["cnn"].seconds, STUDIES["cnn"].trainings)) / 3600
    words = f"The {len(results('cnn'))} trainings took {took:.1f} hours"
    assert words in PROSE, words


def test_what_readme_says_of_three_datasets():
    """Of what gains once τ is tuned, and of how a tuned decision compares with losses."""
    said = prose(page("README.md"))
    assert "LMF with its published settings gains nothing over cross-entropy on any of" in said
    for data in DATA:
        assert difference("heads", data, "lmf", "ce", TUNED).verdict == "no clear difference"
    shown = ("la", RECOMMENDED, "lmf:scale=1", "lmf", "ldam", "focal")  # in README's picture
    above = [loss for loss in shown if over_datasets(loss, "ce", TUNED).verdict == "better"]
    assert above == ["la", RECOMMENDED]
    assert "the two on adjusted logits are above 0 in the mean, the others are not" in said
    scratch = {
        rule: [
            data
            for data in DATA
            for loss in ("la", RECOMMENDED)
            if difference("cnn", data, loss, "ce", rule).verdict == "better"
        ]
        for rule in (ARGMAX, TUNED)
    }
    assert scratch == {ARGMAX: ["pbc_lt"] * 2, TUNED: []}
    assert "it gains by argmax on one of the three, and once τ is tuned on none" in said
    words = "From scratch neither gains clearly on any of the three once τ is tuned."
    assert words in prose(LMFSpec.recommended.__doc__)
    tuning = np.mean([of_tuning(data).mean for data in DATA])
    most = max(over_datasets(loss, "ce", TUNED).mean for loss in shown)
    assert "brings most of what there is to gain" in said and tuning > most


def test_what_the_data_are():
    ratios = {"ham10000": "59 to 1", "pbc_lt": "100 to 1", "busi": "3 to 1"}
    for data, words in ratios.items():
        about = next(iter(kinds("heads")[data][1]["ce"].values()))["data"]
        counts = about["class_counts"]
        assert f"{max(counts) / min(counts):.0f} to 1" == words
        assert words in PROSE


def test_what_the_heads_took():
    study = STUDIES["heads"]
    heads = len(results("heads"))
    assert {result["settings_tried"] for result in results("heads").values()} == {24}
    assert {len(seeds) for _, found in kinds("heads").values() for seeds in found.values()} == {20}
    minutes = sum(map(study.seconds, study.trainings)) / 60
    words = (
        f"{heads} heads are reported of {24 * heads:,} that were trained, in {minutes:.0f} minutes"
    )
    assert words in PROSE, words


DEFAULTS = {"--archs", "small", "--frameworks", "torch"}
DEFAULTS |= {"--head", "linear", "--cache", "runs/features"}


@pytest.mark.parametrize("study", NAMES)
def test_the_commands_are_those_that_were_run(study):
    shown = re.sub(r"\\\n\s*", "", SECTION)
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', shown, re.MULTILINE):
        shown = shown.replace(f"${name}", value)
    for command in STUDIES[study].commands:
        data = re.search(r"--data (\S+)", command)[1]
        losses = re.search(r"--losses (\S+)", command)[1]
        line = next(
            line
            for line in shown.splitlines()
            if f"--losses {losses} " in line
            and any(f"--data {each} " in line for each in (data, f"{Path(data).parent}/$data"))
        )
        words = set(line.replace("$data", Path(data).name).split())
        assert words - {"--jobs", "2"} == set(command.split()) - DEFAULTS
        assert f" {Path(data).name}" in SECTION
