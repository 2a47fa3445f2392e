"""Training, validation and test: whole groups (lesions, patients), every class in each."""

from collections.abc import Sequence

import numpy as np

from examples.data import findings
from examples.data.listings import SPLITS, Listing


def assign(listing: Listing, seed: int) -> tuple[np.ndarray, str]:
    """The split of each example, and a sentence on how it was found.

    Splits that come with the data are honoured, if no group is in two of them. Where none comes,
    70, 15 and 15 % are drawn; where only validation or test is missing, a tenth of training becomes
    validation.

    Returns:
        str (N,), of `SPLITS`, and the sentence.

    Raises:
        ValueError: other splits are given, or a group in two of them, or a class has too few groups
            to be split.
    """
    given = np.array([example.split for example in listing.examples])
    found = set(given.tolist())
    if found <= set(SPLITS):
        refuse_groups_in_two_splits(listing)
    if found == set(SPLITS):
        return given, "The splits are those that come with the data."
    if found == {""}:
        split = _draw(listing, given == "", {"train": 0.70, "val": 0.15, "test": 0.15}, seed)
        return split, f"Split 70/15/15 by {listing.unit}, {stratified(listing)}."
    if found not in ({"train", "val"}, {"train", "test"}):
        raise ValueError(
            "splits that come with the data must be train with val, test or both, "
            f"got {', '.join(map(repr, sorted(found)))}"
        )
    train = given == "train"
    split = np.full(len(given), "test", "<U5")
    split[train] = _draw(listing, train, {"train": 0.9, "val": 0.1}, seed)
    tenth = f"a tenth of train, by {listing.unit} and {stratified(listing)}, chooses the epoch."
    if "val" in found:
        return split, f"No test split comes with the data: val is scored as test, and {tenth}"
    return split, f"No val split comes with the data: {tenth}"


def stratified(listing: Listing) -> str:
    """How, in words."""
    several = listing.labels.ndim == 2
    return f"stratified by {'the rarest finding of each' if several else 'class'}"


def refuse_groups_in_two_splits(listing: Listing) -> None:
    """Raise ValueError for a group of which images were given to several splits."""
    split_of: dict[str, str] = {}
    for example in listing.examples:
        if (before := split_of.setdefault(example.group, example.split)) != example.split:
            raise ValueError(
                f"each {listing.unit} must be in one split, got {example.group} in {before} and "
                f"{example.split}; give all its images to one, or leave the splits out"
            )


def _draw(listing: Listing, among: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """The names in `shares` for the examples `among`, bool (N,)."""
    labels = listing.labels[among]
    groups = np.array([example.group for example in listing.examples])[among]
    several = labels.ndim == 2
    for label, name in enumerate(listing.class_names):
        having = labels[:, label] == 1 if several else labels == label
        if (size := len(np.unique(groups[having]))) < len(shares):
            raise ValueError(
                f"{'finding' if several else 'class'} {name!r} must have at least {len(shares)} "
                f"{listing.unit}s to be in {', '.join(shares)}, got {size}; add images or leave it "
                "out"
            )
    if several:
        labels = findings.strata(labels)
    return np.array(list(shares))[deal(labels, groups, tuple(shares.values()), seed)]


def deal(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each example, int64 (N,), such that the parts' sizes are as `shares`.

    A group with images of several classes counts for the rarest. The groups of each class are dealt
    out, the largest first, to the part that is emptiest for its share: with as many groups as there
    are parts, a class is in all of them, which scikit-learn's StratifiedGroupKFold does not
    promise; what cannot be divided goes to the smaller parts. The result depends on the groups, the
    labels and the seed, not on the examples' order.
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
