"""A study's results as tables: Markdown, CSV, and what they say about each loss.

    python -m examples.study.tables runs/study

Everything is computed from the results so far, so that a study may still be running.
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.study.comparisons import (
    ARGMAX,
    TUNED,
    Difference,
    Results,
    against_baseline,
    by_kind,
    over_datasets,
    scored,
)
from examples.study.planning import Study, named
from examples.study.report import mean_and_spread
from examples.training.checkpoints import write_atomically
from examples.training.results import CALIBRATION_BINS
from examples.training.start import one_sentence

KIND = ("data", "architecture", "framework")  # headings of a training's kind
SCORES = {
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_auroc": "macro AUROC",
    "average_precision": "average precision",
    "calibration_error": "calibration error",
}
SURENESS = ("interval over", "p", "p, Holm", "verdict")
SCORES_NOTE = (
    "On the test images, with the model of the epoch whose validation macro-F1 was best; mean ± "
    "sample standard deviation over seeds, the epoch's median. AUROC and average precision are "
    "means over the classes, each against the rest; the calibration error is the expected one, of "
    f"{CALIBRATION_BINS} bins of confidence. Probabilities are the softmax of the logits as they "
    "are, which LDAM multiplies by its scale in training."
)
TUNED_NOTE = (
    "The same models, whose logits are read less τ log π, π being the classes' shares of the "
    "training images; τ is the one that gives the best macro-F1 on the validation images."
)
DIFFERENCES_NOTE = (
    "Paired by seed, both read by the same rule; the first row of each kind is what τ does for "
    "cross-entropy. Intervals of 95 % are bootstrap percentiles: over seeds and test images, drawn "
    "together, where predictions are kept, and p is theirs; elsewhere over seeds alone, which is "
    "narrower, and p is that of Wilcoxon's signed-rank test, with n seeds at least 2/2ⁿ. Holm's "
    "correction is for the losses that are compared by one rule; the verdict is the interval's, "
    "without it. Of few seeds a bootstrap interval "
    "is too narrow: of normal differences it held the true mean in 51 % of simulated studies of "
    "2 seeds, 74 % of 3, 84 % of 5 and 92 % of 10."
)
OVER_DATASETS_NOTE = "Every dataset counts alike; seeds and test images are drawn in each apart."


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers (None where there is none) or tuples of numbers, one a seed."""

    name: str  # of its file
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """With a heading; a pipe in a cell would end it."""
        rows = [self.headings, ["---"] * len(self.headings), *(map(text, r) for r in self.rows)]
        lines = ("| " + " | ".join(cell.replace("|", r"\|") for cell in r) + " |" for r in rows)
        return "\n".join((f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])))

    def csv(self) -> str:
        """Numbers in full; what has a value a seed becomes its mean and its deviation."""
        spread = [any(isinstance(row[i], tuple) for row in self.rows) for i in self.columns]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        headings = (
            (name, f"{name} standard deviation")[: 1 + both]
            for name, both in zip(self.headings, spread, strict=True)
        )
        writer.writerow([cell for cells in headings for cell in cells])
        for row in self.rows:
            writer.writerow([number for cell in row for number in numbers(cell)])
        return stream.getvalue()

    @property
    def common(self) -> int:
        """How many columns, the first ones, say what kind of training a row is of."""
        return len(KIND) if self.headings[: len(KIND)] == KIND else 0

    @property
    def columns(self) -> range:
        """Their indices."""
        return range(len(self.headings))


def text(cell: Any) -> str:
    """A cell as people read it.

    >>> text((0.5, 0.7)), text(0.12345), text(3), text(None)
    ('0.600 ± 0.141', '0.123', '3', '–')
    """
    if cell is None:
        return "–"
    if isinstance(cell, tuple):
        return mean_and_spread(cell)
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def numbers(cell: Any) -> tuple[Any, ...]:
    """A cell as programs read it: values of several seeds as mean and sample deviation."""
    if not isinstance(cell, tuple):
        return ("" if cell is None else cell,)
    return float(np.mean(cell)), float(np.std(cell, ddof=1)) if len(cell) > 1 else ""


# --- the tables


def tables(study: Study) -> list[Table]:
    """All tables that the results so far allow."""
    results = study.results()
    found = []
    minus = "minus that of cross-entropy"
    if compared := against_baseline(study, results):
        found.append(differences(compared, "against-ce", f"Macro-F1 {minus}", DIFFERENCES_NOTE))
        accuracy = against_baseline(study, results, "balanced_accuracy")
        title = f"Balanced accuracy {minus}"
        found.append(differences(accuracy, "against-ce-balanced-accuracy", title))
    if compared := over_datasets(study, results):
        title = f"Macro-F1 {minus}, the mean over datasets"
        found.append(differences(compared, "against-ce-over-datasets", title, OVER_DATASETS_NOTE))
    for rule in (ARGMAX, TUNED):
        if mine := {t: result for t, result in results.items() if scored(result, rule)}:
            found.append(scores(mine, rule))
    data = dict.fromkeys(training.data for training in results)
    found += [per_class(results, name) for name in data]
    if results:
        found.append(costs(study, results))
    if len(results) < len(study.trainings):
        found.append(missing(study, results))
    return found


def scores(results: Results, rule: str = ARGMAX) -> Table:
    """Scores on the test images, over seeds, of the epoch with the best validation macro-F1."""
    rows = []
    for kind, losses in by_kind(results).items():
        for loss, seeds in losses.items():
            test = [scored(result, rule) for result in seeds.values()]
            values = (values_of(test, name) for name in SCORES)
            epochs = tuple(float(r["best_validation"]["epoch"]) for r in seeds.values())
            row = (*kind, loss, len(seeds), *values)
            if rule == TUNED:
                row += (tuple(result["tuned"]["tau"] for result in seeds.values()),)
            rows.append((*row, round(float(np.median(epochs)))))
    return Table(
        "scores" if rule == ARGMAX else "scores-tuned",
        "Scores" if rule == ARGMAX else "Scores with τ tuned",
        (*KIND, "loss", "seeds", *SCORES.values(), *(["τ"] if rule == TUNED else []), "best epoch"),
        tuple(rows),
        SCORES_NOTE if rule == ARGMAX else TUNED_NOTE,
    )


def values_of(scores: Sequence[dict[str, Any]], name: str) -> tuple[float, ...] | None:
    """A score of each seed; None where files are older than the score."""
    values = tuple(each.get(name) for each in scores)
    return None if None in values else values


def per_class(results: Results, data: str) -> Table:
    """F1, sensitivity and precision of each class of one dataset, the commonest first."""
    mine = {training: result for training, result in results.items() if training.data == data}
    rules = (ARGMAX, TUNED) if any(scored(r, TUNED) for r in mine.values()) else (ARGMAX,)
    rows = []
    for kind, losses in by_kind(mine).items():
        for c, name, count in classes(mine, data):
            for loss, seeds in losses.items():
                row = [*kind, name, count, loss]
                for rule in rules:
                    known = [test for r in seeds.values() if (test := scored(r, rule))]
                    for score in ("f1", "recall", "precision"):
                        row.append(tuple(test[score][c] for test in known) or None)
                rows.append(tuple(row))
    names = ("F1", "sensitivity", "precision")
    tuned = [f"{name}, {TUNED}" for name in names] if TUNED in rules else []
    return Table(
        f"per-class-{data}",
        f"Each class of {data}",
        (*KIND, "class", "images", "loss", *names, *tuned),
        tuple(rows),
        "On the test images, the commonest class of the training images first, whose number stands "
        "beside it; a class that is never predicted has precision 0.",
    )


def classes(results: Results, data: str) -> list[tuple[int, str, int]]:
    """Label, name and training images of each class of a dataset, the commonest first."""
    about = next(result["data"] for t, result in results.items() if t.data == data)
    counts = about["class_counts"]
    order = np.argsort(counts, kind="stable")[::-1]
    return [(int(c), about["class_names"][c], counts[c]) for c in order]


def differences(compared: Sequence[Difference], name: str, title: str, note: str = "") -> Table:
    """One loss minus another, seed by seed."""
    rows = [
        (*d.kind, d.loss, d.rule, d.seeds, d.mean, d.low, d.high, d.over, d.p, d.holm, d.verdict)
        for d in compared
    ]
    headings = (*KIND, "loss", "read by", "seeds", "difference", "from", "to", *SURENESS)
    return Table(name, title, headings, tuple(rows), note)


def costs(study: Study, results: Results) -> Table:
    """What a training took."""
    rows = []
    for kind, losses in by_kind(results).items():
        took = [study.seconds(training) for training in results if training.kind == kind]
        measured = [r["measured"] for seeds in losses.values() for r in seeds.values()]
        speeds = tuple(each["images_per_second"] for each in measured)
        memory = max(each["peak_memory_bytes"] for each in measured) / 2**30
        known = tuple(each for each in took if each is not None)
        hours = sum(known) / 3600 if known else None
        rows.append((*kind, len(measured), hours, known or None, speeds, memory))
    ran = [r["epochs_run"] for r in results.values() if stopped_early(r)]
    early = f" Stopped early: {len(ran)}, after {min(ran)} to {max(ran)} epochs." if ran else ""
    return Table(
        "costs",
        "What it took",
        (*KIND, "trainings", "hours in all", "seconds each", "images a second", "peak GiB"),
        tuple(rows),
        "From a training's start to its result, reading and testing included; images a second "
        "while it trains; memory of the device, or of the process where it has none of its own."
        + early,
    )


def stopped_early(result: dict[str, Any]) -> bool:
    """Whether a training had fewer epochs than planned; older files do not know."""
    planned = result["epochs"] + result.get("head_epochs", 0)
    return result.get("epochs_run", planned) < planned


def missing(study: Study, results: Results) -> Table:
    """Trainings that are planned and have no result, or one of fewer epochs."""
    rows = []
    for t in study.trainings:
        if t not in results:
            begun = (study.out(t) / "checkpoints").exists()
            state = "unfinished" if begun else "no checkpoint yet"
            rows.append((*t.kind, t.loss, t.seed, state))
    return Table(
        "missing",
        f"Missing: {len(rows)} of {len(study.trainings)} trainings",
        (*KIND, "loss", "seed", "state"),
        tuple(rows),
    )


# --- files


def write(study: Study, found: Sequence[Table]) -> None:
    """``DIR/tables.md`` and a CSV file of each table."""
    content = "\n\n".join(table.markdown() for table in found) + "\n"
    write_atomically(study.folder / "tables.md", content.encode())
    for table in found:
        write_atomically(study.folder / f"table-{table.name}.csv", table.csv().encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, and print them."""
    study = named(argv, "examples.study.tables", "Tables of a study.")
    with one_sentence():
        found = tables(study)
        write(study, found)
    print((study.folder / "tables.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
