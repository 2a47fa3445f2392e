"""Losses against each other: paired differences, how sure they are, and what to train with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap, wilcoxon

from examples.study.planning import ROWS, Kind, Study, Training
from examples.study.resampling import resampled

BASELINE = "ce"
FEWEST = 5  # seeds of which a difference is said to be one: intervals of fewer are far too narrow
SURE = 0.05  # what p must be below after Holm's correction, for a loss to be recommended
ARGMAX, TUNED = ROWS[1:]  # the rules that logits are read by: as they are, or less τ log π
ALONE = "τ tuned, minus argmax"
BOTH, SEEDS = "seeds, images", "seeds"  # what an interval is over
Results = dict[Training, dict[str, Any]]
Seeds = Mapping[int, dict[str, Any]]  # result files
Datasets = dict[Kind, dict[str, dict[int, dict[str, Any]]]]  # which are by loss and seed


@dataclass(frozen=True)
class Difference:
    """A score on the test images less another's, seed by seed.

    ``low`` and ``high`` bound the 95 % interval, over ``over``; they and ``p`` are None of one
    seed. ``holm`` is ``p`` corrected for the other losses of its kind and rule.
    """

    kind: Kind
    loss: str
    rule: str
    seeds: int
    mean: float
    low: float | None
    high: float | None
    over: str
    p: float | None
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """In words, which claim a difference only where the interval of enough seeds excludes 0."""
        if self.seeds < FEWEST:
            seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
            return f"{seeds}, perhaps by chance"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear difference"

    def __str__(self) -> str:
        """The mean and its interval.

        >>> str(Difference(("a", "b", "c"), "lmf", ARGMAX, 5, 0.0312, 0.01, 0.052, SEEDS, 0.06))
        '+0.031 (+0.010 to +0.052)'
        """
        interval = "" if self.low is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.mean:+.3f}{interval}"


def by_kind(results: Results) -> dict[Kind, dict[str, dict[int, dict[str, Any]]]]:
    """Result files by kind, then by loss, then by seed."""
    found: dict[Kind, dict[str, dict[int, dict[str, Any]]]] = {}
    for t, result in results.items():
        losses = found.setdefault(t.kind, {})
        losses.setdefault(t.loss, {})[t.seed] = result
    return found


def scored(result: Mapping[str, Any], rule: str) -> dict[str, Any] | None:
    """The scores on the test images; None of a file that is older than the rule."""
    return result["test"] if rule == ARGMAX else result.get("tuned", {}).get("test")


def macro_f1(result: Mapping[str, Any]) -> float:
    """On the test images."""
    return result["test"]["macro_f1"]


def against_baseline(study: Study, results: Results, name: str = "macro_f1") -> list[Difference]:
    """Each loss less cross-entropy, read by the same rule; and what tuning does for the latter.

    Args:
        study: whose predictions the intervals are of, where they are kept.
        results: which of its results.
        name: of the score.
    """
    found: list[Difference] = []
    for kind, losses in by_kind(results).items():
        if BASELINE not in losses:
            continue
        alone = [difference(study, kind, (BASELINE, TUNED), (BASELINE, ARGMAX), losses, name)]
        found += corrected(filter(None, alone))
        for rule in (ARGMAX, TUNED):
            others = [loss for loss in losses if loss != BASELINE]
            base = (BASELINE, rule)
            made = (difference(study, kind, (o, rule), base, losses, name) for o in others)
            found += corrected(filter(None, made))
    return found


def over_datasets(study: Study, results: Results, name: str = "macro_f1") -> list[Difference]:
    """Each loss less cross-entropy, averaged over the datasets of an architecture and framework.

    Every dataset counts alike; those without predictions of both losses do not count, and there
    must be two. Intervals hold seeds and test images, drawn in each dataset apart.

    Args:
        study: whose predictions the intervals are of.
        results: which of its results.
        name: of the score.
    """
    found: list[Difference] = []
    for datasets in groups(results, BASELINE).values():
        others = dict.fromkeys(loss for losses in datasets.values() for loss in losses)
        for rule in (ARGMAX, TUNED):
            means = (
                averaged(study, datasets, (loss, rule), (BASELINE, rule), name)
                for loss in others
                if loss != BASELINE
            )
            found += corrected(filter(None, means))
    return found


def groups(results: Results, *needed: str) -> dict[tuple[str, str], Datasets]:
    """The datasets that have these losses, by architecture and framework."""
    found: dict[tuple[str, str], Datasets] = {}
    for kind, losses in by_kind(results).items():
        if all(loss in losses for loss in needed):
            found.setdefault(kind[1:], {})[kind] = losses
    return found


def averaged(
    study: Study,
    datasets: Datasets,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    name: str = "macro_f1",
) -> Difference | None:
    """The mean over datasets of a difference; None where fewer than two have predictions of both.

    Args:
        study, datasets: where both are of, one of `groups`.
        ours, theirs: loss and rule.
        name: of the score.
    """
    pairs = [
        pair
        for kind, losses in datasets.items()
        if ours[0] in losses and theirs[0] in losses
        if (pair := paired(study, kind, ours, theirs, losses, name)) and pair.drawn is not None
    ]
    if len(pairs) < 2:
        return None
    shuffled = (np.random.default_rng(i).permutation(pair.drawn) for i, pair in enumerate(pairs))
    mean = np.mean([pair.gains.mean() for pair in pairs], keepdims=True)
    seeds = min(len(pair.gains) for pair in pairs)
    kind = (f"mean of {len(pairs)}", *next(iter(datasets))[1:])
    return judged((kind, *ours, seeds), Pair(mean, np.mean(list(shuffled), axis=0)))


class Pair(NamedTuple):
    """What one loss scores more than another: of each seed (S,), and the mean of each draw."""

    gains: np.ndarray
    drawn: np.ndarray | None  # of seeds and test images; None where predictions are not kept


def paired(
    study: Study,
    kind: Kind,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    losses: Mapping[str, Seeds],
    name: str,
) -> Pair | None:
    """Of the seeds that have both scores; None where no seed has."""
    pairs = {}
    for seed in losses[ours[0]].keys() & losses[theirs[0]].keys():
        both = [scored(losses[loss][seed], rule) for loss, rule in (ours, theirs)]
        if all(both):
            pairs[seed] = both[0][name] - both[1][name]
    if not pairs:
        return None
    seeds = sorted(pairs)
    gains = np.array([pairs[seed] for seed in seeds])
    if len(gains) == 1:
        return Pair(gains, None)
    answers = [predicted(study, kind, *each, seeds) for each in (ours, theirs)]
    if not all(answers) or not np.array_equal(answers[0][0], answers[1][0]):
        return Pair(gains, None)
    (labels, mine), (_, other) = answers
    classes = len(losses[ours[0]][seeds[0]]["data"]["class_names"])
    return Pair(gains, resampled(name, labels, mine, other, classes))


def difference(
    study: Study,
    kind: Kind,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    losses: Mapping[str, Seeds],
    name: str = "macro_f1",
) -> Difference | None:
    """Of two losses, each with its rule; None where no seed has both scores.

    Args:
        study, kind: where both are of.
        ours, theirs: loss and rule.
        losses: result files by loss and seed.
        name: of the score.
    """
    pair = paired(study, kind, ours, theirs, losses, name)
    if pair is None:
        return None
    rule = ours[1] if ours[1] == theirs[1] else ALONE
    return judged((kind, ours[0], rule, len(pair.gains)), pair)


def judged(about: tuple[Kind, str, str, int], pair: Pair) -> Difference:
    """The mean with its interval and p: over seeds and images, or where need be over seeds."""
    gains, drawn = pair
    mean = float(gains.mean())
    if drawn is not None:
        low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
        beyond = 1 + min(np.sum(drawn <= 0), np.sum(drawn >= 0))
        p = min(1.0, 2 * float(beyond) / (1 + len(drawn)))
        return Difference(*about, mean, low, high, BOTH, p)
    if len(gains) == 1:
        return Difference(*about, mean, None, None, SEEDS, None)
    return Difference(*about, mean, *interval(gains), SEEDS, p_value(gains))


def predicted(
    study: Study, kind: Kind, loss: str, rule: str, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels (N,) and predicted classes (S, N) of the test images; None where some are not kept."""
    found = [study.answers(study.training(kind, loss, seed)) for seed in seeds]
    if not all(rule in each for each in found):
        return None
    labels = found[0]["labels"]
    if not all(np.array_equal(each["labels"], labels) for each in found):
        return None
    return labels, np.stack([each[rule] for each in found])


# --- statistics


def interval(gains: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of differences (seeds,), of two at least."""
    found = bootstrap((gains,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def p_value(gains: np.ndarray) -> float:
    """Of Wilcoxon's signed-rank test, two-sided; 1 where nothing differs."""
    return float(wilcoxon(gains).pvalue) if gains.any() else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979).

    >>> holm([0.01, 0.04, 0.03, 0.5])
    [0.04, 0.09, 0.09, 0.5]
    """
    order, corrected = np.argsort(p), np.empty(len(p))
    steps = np.arange(len(p), 0, -1) * np.asarray(p, np.float64)[order]
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def corrected(family: Iterator[Difference]) -> list[Difference]:
    """The differences with Holm's correction for their number."""
    found = list(family)
    known = [i for i, each in enumerate(found) if each.p is not None]
    for i, p in zip(known, holm([found[i].p for i in known]), strict=True):
        found[i] = replace(found[i], holm=p)
    return found


# --- what to train with


def advice(study: Study, results: Results) -> list[str]:
    """A sentence for each dataset."""
    compared = against_baseline(study, results)
    found = []
    for data, kinds in groupby(by_kind(results).items(), lambda item: item[0][0]):
        kinds = list(kinds)
        clauses = []
        for kind, losses in kinds:
            mine = [each for each in compared if each.kind == kind]
            where = f"{' on '.join(kind[1:])}, " if len(kinds) > 1 else ""
            clauses.append(f"{where}{clause(study, kind, losses, mine)}")
        found.append(f"{data}: {'; '.join(clauses)}.")
    return found


def clause(
    study: Study, kind: Kind, losses: Mapping[str, Seeds], compared: Sequence[Difference]
) -> str:
    """What to train with, and how sure that is, of one kind's differences."""
    alone = next((each for each in compared if each.rule == ALONE), None)
    rule = TUNED if alone and alone.verdict != "worse" else ARGMAX
    others = [each for each in compared if each.rule == rule]
    if not others:
        return "there is nothing to compare with cross-entropy yet"
    how = " and tune τ on validation" if rule == TUNED else ""
    base = f"cross-entropy{' with τ tuned' if rule == TUNED else ''}"
    known = [each for each in others if each.seeds >= FEWEST]
    sure = [each for each in known if each.low > 0 and each.holm < SURE]
    best = max(sure or known or others, key=lambda each: each.mean)
    if sure:
        below = {loss for loss in losses if clearly_below(study, best, loss, losses)}
        rivals = [loss for loss in losses if loss not in below | {best.loss}]
        level = f"; {listed(rivals)} cannot be told from it" if rivals else ""
        return f"train with {best.loss}{how}: macro-F1 {best} over {base}{level}"
    most = f"is {best.loss}'s, macro-F1 {best}"
    if not known:
        seeds = "one seed is" if best.seeds == 1 else f"{best.seeds} seeds are"
        return (
            f"{seeds} too few to say what to train with; the largest difference from {base} {most}"
        )
    tuning = f", which by itself gives {alone}" if rule == TUNED else ""
    return (
        f"nothing here is clearly better than {base}, so train with {BASELINE}{how}{tuning}; "
        f"the largest difference {most}, p {best.holm:.2f} after Holm's correction"
    )


def clearly_below(study: Study, best: Difference, loss: str, losses: Mapping[str, Seeds]) -> bool:
    """Whether a loss's interval against the best one is below 0."""
    pair = (loss, best.rule), (best.loss, best.rule)
    found = difference(study, best.kind, *pair, losses)
    return found is not None and found.high is not None and found.high < 0


def listed(words: Sequence[str]) -> str:
    """As a sentence has them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
