"""Two losses of a study against each other: on each dataset, and the mean over datasets.

python -m examples.study.versus examples/study/heads lmf focal
python -m examples.study.versus runs/study la ce --score balanced_accuracy
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.study import planning, tables
from examples.study.comparisons import ARGMAX, TUNED, Difference, averaged, difference, groups
from examples.study.planning import Study
from examples.training.start import one_sentence

SCORES = ("macro_f1", "balanced_accuracy", "accuracy")  # that predicted classes decide


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(
        "python -m examples.study.versus",
        description="One loss of a study minus another, read by the same rule.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of examples.compare")
    parser.add_argument("ours", metavar="LOSS", help="as the study calls it: lmf:scale=1")
    parser.add_argument("theirs", metavar="OTHER", help="what is taken from it")
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help=f"({SCORES[0]})")
    args = parser.parse_args(argv)
    with one_sentence():
        study = planning.read(args.folder)
        found = list(differences(study, args.ours, args.theirs, args.score))
    title = f"{tables.SCORES[args.score]}, {args.ours} minus {args.theirs}"
    print(tables.differences(found, "versus", title).markdown())
    return 0


def differences(study: Study, ours: str, theirs: str, name: str) -> Iterator[Difference]:
    """By argmax and with τ tuned, of each dataset and of all that an architecture was trained on.

    Raises:
        ValueError: the study has no dataset with results of both.
    """
    found = groups(study.results(), ours, theirs)
    if not found:
        losses = dict.fromkeys(training.loss for training in study.results())
        raise ValueError(
            f"{study.folder} must hold results of {ours} and {theirs} on one dataset, "
            f"got none; it has {', '.join(losses)}"
        )
    for datasets in found.values():
        for rule in (ARGMAX, TUNED):
            pair = (ours, rule), (theirs, rule)
            each = [difference(study, kind, *pair, of, name) for kind, of in datasets.items()]
            yield from filter(None, [*each, averaged(study, datasets, *pair, name)])


if __name__ == "__main__":
    sys.exit(main())
