"""Differences between losses: intervals over seeds and images, corrected p, and what is advised."""

import doctest
from itertools import product

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from tests.frameworks import load

for package in ("PIL", "sklearn", "rich", "tensorboard"):
    load(package)

from examples.study import comparisons, resampling, versus  # noqa: E402
from examples.study.comparisons import ALONE, ARGMAX, BOTH, SEEDS, TUNED  # noqa: E402
from tests.examples.studies import made_up  # noqa: E402

SCORES = {
    "macro_f1": lambda y, p: f1_score(y, p, labels=[0, 1, 2], average="macro", zero_division=0),
    "balanced_accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
}


@pytest.mark.parametrize("name", SCORES)
def test_each_draw_is_scikit_learns_score_of_the_drawn_images_and_seeds(name):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 20)
    ours, theirs = rng.integers(0, 3, (2, 4, 20))
    found = resampling.resampled(name, labels, ours, theirs, 3)
    images, shares = resampling.draws(20, 4)
    assert images.shape == (2000, 20) and shares.shape == (2000, 4)
    assert (images.sum(1) == 20).all() and images.std() > 0.9
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    for draw in range(25):
        drawn = np.repeat(np.arange(20), images[draw].astype(int))

        def score(predicted, drawn=drawn):
            return SCORES[name](labels[drawn], predicted[drawn])

        gains = [score(a) - score(b) for a, b in zip(ours, theirs, strict=True)]
        np.testing.assert_allclose(found[draw], gains @ shares[draw], atol=1e-6)


def test_the_draws_of_two_images_and_two_seeds_are_all_there_are():
    """Exact: of every 16 draws each of the four sums comes as often as its images and seeds do."""
    labels, theirs = np.array([0, 1]), np.zeros((2, 2), int)
    ours = np.array([[0, 1], [1, 1]])  # of two images right: both and one; theirs: one, always
    found = resampling.resampled("accuracy", labels, ours, theirs, 2)
    right, theirs_right = ours == labels, theirs == labels
    every = [
        np.mean([right[s][[i, j]].mean() - theirs_right[s][[i, j]].mean() for s in (a, b)])
        for i, j, a, b in product((0, 1), repeat=4)
    ]
    for value in set(every):
        share = np.mean(np.isclose(found, value))
        np.testing.assert_allclose(share, np.mean(np.isclose(every, value)), atol=0.03)


def test_the_interval_over_seeds_and_images_holds_the_truth():
    """Of 200 simulated studies; the one over seeds alone does not: it leaves the images out."""
    rng, truth = np.random.default_rng(0), 0.05
    seeds, images, wide, narrow = 10, 150, [], []
    labels = np.zeros(images, int)
    for _ in range(200):
        # how hard an image is and how good a seed is shift the chance of being right
        hard = rng.normal(0, 0.12, images)
        ours, theirs = (
            rng.random((seeds, images))
            >= np.clip(0.7 + gain + side * hard + rng.normal(0, 0.03, (seeds, 1)), 0, 1)
            for gain, side in ((truth, 1), (0, -1))
        )
        drawn = resampling.resampled("accuracy", labels, ours.astype(int), theirs.astype(int), 2)
        low, high = np.percentile(drawn, [2.5, 97.5])
        wide.append(low <= truth <= high)
        low, high = comparisons.interval(theirs.mean(1) - ours.mean(1))
        narrow.append(low <= truth <= high)
    assert 0.92 <= np.mean(wide) <= 1
    assert np.mean(narrow) < 0.85


def test_predictions_give_intervals_over_both_and_scores_alone_over_seeds(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=6)
    found = comparisons.against_baseline(planned, planned.results())
    assert [(each.loss, each.rule, each.over) for each in found] == [
        ("ce", ALONE, BOTH),
        ("lmf", ARGMAX, BOTH),
        ("lmf", TUNED, BOTH),
    ]
    gains = [
        planned.result(planned.training(("digits", "small", "torch"), "lmf", seed))["test"][
            "macro_f1"
        ]
        - planned.result(planned.training(("digits", "small", "torch"), "ce", seed))["test"][
            "macro_f1"
        ]
        for seed in range(6)
    ]
    np.testing.assert_allclose(found[1].mean, np.mean(gains), rtol=1e-12)
    assert found[1].low < found[1].mean < found[1].high
    over_seeds = comparisons.interval(np.array(gains))
    assert found[1].high - found[1].low > over_seeds[1] - over_seeds[0]
    for file in tmp_path.glob("runs/*lmf-3/predictions.npz"):
        file.unlink()  # one that is missing is enough
    again = comparisons.against_baseline(planned, planned.results())
    assert [each.over for each in again] == [BOTH, SEEDS, SEEDS]
    np.testing.assert_allclose((again[1].low, again[1].high), over_seeds)


def test_the_mean_over_datasets_counts_each_alike(tmp_path):
    """Its draws are apart, here of equal ones: widths add up as those of independent numbers."""
    planned = made_up(tmp_path, ["ce", "lmf", "la"], seeds=6, data=("digits", "kidney.npz"))
    single = comparisons.against_baseline(planned, planned.results())
    found = comparisons.over_datasets(planned, planned.results())
    assert [(each.loss, each.rule) for each in found] == [
        (loss, rule) for rule in (ARGMAX, TUNED) for loss in ("lmf", "la")
    ]
    for mean in found:
        parts = [d for d in single if (d.loss, d.rule) == (mean.loss, mean.rule)]
        assert {part.kind[0] for part in parts} == {"digits", "kidney"}
        assert mean.kind == ("mean of 2", "small", "torch") and mean.over == BOTH
        np.testing.assert_allclose(mean.mean, np.mean([part.mean for part in parts]))
        widths = [part.high - part.low for part in parts]
        expected = np.hypot(*widths) / 2
        np.testing.assert_allclose(mean.high - mean.low, expected, rtol=0.15)
        assert mean.p <= mean.holm
    for file in tmp_path.glob("runs/kidney-*la-3/predictions.npz"):
        file.unlink()  # so that one dataset is left for it
    found = comparisons.over_datasets(planned, planned.results())
    assert [each.loss for each in found] == ["lmf", "lmf"]


def test_any_two_losses_can_be_compared(tmp_path, capsys):
    planned = made_up(tmp_path, ["ce", "lmf", "la"], seeds=5, data=("digits", "cells.npz"))
    assert versus.main([str(tmp_path), "la", "lmf", "--score", "accuracy"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## accuracy, la minus lmf\n")
    datasets = comparisons.by_kind(planned.results())
    for rule in (ARGMAX, TUNED):
        pair = (planned, datasets, ("la", rule), ("lmf", rule), "accuracy")
        whole = comparisons.averaged(*pair)
        assert f"| mean of 2 | small | torch | la | {rule} | 5 | {whole.mean:.3f} |" in printed
        for kind, losses in datasets.items():
            one = comparisons.difference(planned, kind, *pair[2:4], losses, "accuracy")
            numbers = f"{one.mean:.3f} | {one.low:.3f} | {one.high:.3f}"
            assert f"| {kind[0]} | small | torch | la | {rule} | 5 | {numbers} |" in printed
    with pytest.raises(SystemExit) as stopped:
        versus.main([str(tmp_path), "la", "focal"])
    assert str(stopped.value).endswith(
        "must hold results of la and focal on one dataset, got none; it has ce, lmf, la"
    )


def test_other_test_images_are_not_paired(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)
    file = tmp_path / "runs" / "digits-small-torch-lmf-1" / "predictions.npz"
    with np.load(file) as kept:
        arrays = dict(kept)
    np.savez(file, **arrays | {"labels": arrays["labels"][::-1]})
    found = comparisons.against_baseline(planned, planned.results())
    assert [each.over for each in found] == [BOTH, SEEDS, SEEDS]


def test_holm_is_the_step_down_of_bonferroni():
    np.testing.assert_allclose(comparisons.holm([0.3, 0.001, 0.02]), [0.3, 0.003, 0.04])
    np.testing.assert_allclose(comparisons.holm([0.9, 0.8]), [1, 1])
    assert comparisons.holm([]) == []


# --- what to train with


def advised(folder, gains, seeds=8):
    """Of macro-F1 that is cross-entropy's plus a gain, which varies a little between seeds."""
    noise = 0.004 * np.random.default_rng(0).standard_normal((len(gains), seeds))
    noise -= noise.mean(1, keepdims=True)
    scores = {
        loss: (0.5 + gain + each).tolist()
        for (loss, gain), each in zip(gains.items(), noise, strict=True)
    }
    planned = made_up(folder, list(gains), seeds=seeds, scores=scores)
    (sentence,) = comparisons.advice(planned, planned.results())
    return sentence


def test_a_loss_that_is_clearly_better_is_advised_and_its_rivals_are_told(tmp_path):
    sentence = advised(tmp_path, {"ce": 0, "la": 0.101, "ldam": 0.1, "focal": 0.02, "lmf": -0.1})
    assert sentence.startswith("digits: train with la: macro-F1 +0.101 (+0.09")
    assert sentence.endswith(") over cross-entropy; ldam cannot be told from it.")


def test_nothing_is_advised_where_nothing_is_clear(tmp_path):
    sentence = advised(tmp_path, {"ce": 0, "la": 0.001, "lmf": -0.1})
    assert sentence.startswith(
        "digits: nothing here is clearly better than cross-entropy, so train with ce; "
        "the largest difference is la's, macro-F1 +0.001 (-0.00"
    )
    assert sentence.endswith(" after Holm's correction.")


def test_holms_correction_decides_what_is_clear(tmp_path):
    """Of 6 seeds Wilcoxon's p is 1/32 at least, which is below 0.05 for one loss, not for two."""
    alone = advised(tmp_path / "one", {"ce": 0, "la": 0.1}, seeds=6)
    assert alone.startswith("digits: train with la: macro-F1 +0.1")
    two = advised(tmp_path / "two", {"ce": 0, "la": 0.1, "lmf": -0.1}, seeds=6)
    assert "nothing here is clearly better" in two and "p 0.06 after Holm's" in two


def test_few_seeds_are_too_few_to_say(tmp_path):
    sentence = advised(tmp_path, {"ce": 0, "la": 0.1}, seeds=3)
    assert sentence.startswith(
        "digits: 3 seeds are too few to say what to train with; "
        "the largest difference from cross-entropy is la's, macro-F1 +0.1"
    )


def test_tuned_rows_are_compared_with_cross_entropy_tuned(tmp_path):
    losses = ["ce", "bwcce", "focal", "ldam", "lmf"]
    planned = made_up(tmp_path, losses, seeds=5, frameworks=["flax", "torch"])
    (sentence,) = comparisons.advice(planned, planned.results())
    tuned = [
        each
        for each in comparisons.against_baseline(planned, planned.results())
        if (each.loss, each.rule) == ("lmf", TUNED)
    ]
    for each in tuned:
        assert each.holm < 0.05  # of logits that find 80 % instead of 40 %
        told = f"small on {each.kind[2]}, train with lmf and tune τ on validation: macro-F1 {each}"
        assert f"{told} over cross-entropy with τ tuned" in sentence
    assert sentence.startswith("digits: small on flax, ") and "; small on torch, " in sentence


def test_a_study_without_cross_entropy_or_others_claims_nothing(tmp_path):
    for loss in ("ce", "lmf"):
        planned = made_up(tmp_path / loss, [loss], seeds=2)
        assert comparisons.advice(planned, planned.results()) == [
            "digits: there is nothing to compare with cross-entropy yet."
        ]


def test_doctests():
    for module in (comparisons, resampling):
        assert doctest.testmod(module).failed == 0
