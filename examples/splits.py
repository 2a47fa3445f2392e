"""Training, validation and test: whole groups (lesions, patients), every class in each."""

from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")


def assign(
    given: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    class_names: Sequence[str],
    unit: str,
    seed: int,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The split of each example, and sentences on how it was found.

    Splits that come with the data are honoured. Where none comes, 70, 15 and 15 % are drawn; where
    only validation or test is missing, a tenth of training becomes validation.

    Args:
        given: str (N,), of `SPLITS`, or empty where the data have no splits.
        labels: int64 (N,).
        groups: (N,); examples of one group stay together.
        unit: what a group is, for the sentences.

    Returns:
        str (N,), of `SPLITS`.

    Raises:
        ValueError: other splits are given, or a class has too few groups to be split.
    """
    found = set(np.unique(given))

    def draw(among: np.ndarray, shares: Sequence[float]) -> np.ndarray:
        check_sizes(labels[among], groups[among], len(shares), class_names, unit)
        return deal(labels[among], groups[among], shares, seed)

    if found == set(SPLITS):
        return given, ("The splits are those that come with the data.",)
    if found == {""}:
        parts = draw(np.ones(len(given), bool), (0.70, 0.15, 0.15))
        return np.array(SPLITS)[parts], (f"Split 70/15/15 by {unit}, stratified by class.",)
    if found not in ({"train", "val"}, {"train", "test"}):
        raise ValueError(
            "the given splits must be train with val, test or both, for every image, got "
            + (", ".join(repr(str(name)) for name in sorted(found)) or "none")
        )
    split = np.where(given == "train", "train", "test")
    train = given == "train"
    split[train] = np.array(["train", "val"])[draw(train, (0.9, 0.1))]
    tenth = f"a tenth of train, drawn by {unit} and stratified by class, chooses the epoch."
    if "val" in found:
        return split, (f"No test split comes with the data: val is scored as test, and {tenth}",)
    return split, (f"No val split comes with the data: {tenth}",)


def check_sizes(
    labels: np.ndarray, groups: np.ndarray, parts: int, class_names: Sequence[str], unit: str
) -> None:
    """Raise ValueError for a class that cannot be in every part."""
    for label, name in enumerate(class_names):
        if (size := len(np.unique(groups[labels == label]))) < parts:
            raise ValueError(
                f"class {name!r} must have at least {parts} {unit}s to be split in {parts}, "
                f"got {size}; add images or leave the class out"
            )


def deal(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each example, int64 (N,), such that the parts' sizes are as `shares`.

    Each class is dealt out for itself, its largest groups first, to the part that is emptiest for
    its share: so a class with as many groups as there are parts is in all of them, which
    scikit-learn's StratifiedGroupKFold does not promise. A group with images of several classes
    counts for the rarest. The result depends on the groups, the labels and the seed, not on the
    examples' order.
    """
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    stratum = np.empty(len(names), np.int64)
    for label in np.argsort(-np.bincount(labels), kind="stable"):  # the rarest last
        stratum[group[labels == label]] = label
    rng = np.random.default_rng(seed)
    part = np.empty(len(names), np.int64)
    for label in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == label))
        filled = np.zeros(len(shares))
        for member in members[np.argsort(-sizes[members], kind="stable")]:
            part[member] = emptiest = np.argmin(filled / shares)
            filled[emptiest] += sizes[member]
    return part[group]
