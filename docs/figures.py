"""The pictures of README and docs, from stored results and the definition: python docs/figures.py

Each file's description holds the numbers that are drawn, which a test compares with what they are
said to be.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.study import comparisons, planning
from examples.study.picture import COLOURS, MARKERS
from lmf_multi import LMFSpec, reference

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RECOMMENDED = "ldam:scale=1:logit-adjustment=1:class-weight=none"
SHOWN = {  # losses of the study, and what they are called here
    RECOMMENDED: "recommended: margins on\nadjusted logits",
    "la": "adjusted logits alone",
    "lmf:scale=1": "LMF, scale 1",
    "lmf": "LMF as published",
    "ldam": "LDAM as published",
    "focal": "focal",
}
DATA = {
    "ham10000": "HAM10000, skin\n59 to 1",
    "pbc_lt": "PBC, blood cells\n100 to 1",
    "busi": "BUSI, ultrasound\n3 to 1",
}
COUNTS = (6705, 115)  # of a frequent and a rare class, as HAM10000 has them
Z = np.linspace(-8, 8, 321)


def which_loss() -> tuple[Figure, object]:
    """Differences from cross-entropy with intervals, τ tuned for both, and their mean."""
    found = differences()
    figure = Figure((8.2, 3.3), layout="constrained")
    axes = figure.subplots(1, len(DATA) + 1, sharex=True, sharey=True)
    titles = {**DATA, "mean": "mean of\nthe three"}
    for ax, (data, title) in zip(axes, titles.items(), strict=True):
        ax.axvline(0, color="#777777", linewidth=1)
        for i, loss in enumerate(SHOWN):
            mean, low, high = found[data][loss]
            colour = COLOURS[0] if low > 0 else COLOURS[1] if high < 0 else "#555555"
            ax.plot([low, high], [i, i], color=colour, linewidth=2)
            filled = colour if low > 0 or high < 0 else "white"
            ax.plot(mean, i, "o", color=colour, markerfacecolor=filled, markersize=6)
        ax.set_title(title, fontsize=9, fontweight="bold" if data == "mean" else None)
        ax.tick_params(labelsize=8)
        ax.set_xticks([-0.04, 0, 0.04], ["-.04", "0", "+.04"])
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(SHOWN)), SHOWN.values())
    axes[0].invert_yaxis()
    figure.supxlabel(
        "macro-F1 on test images less cross-entropy's, τ tuned for both, with 95 % intervals "
        "(frozen features)",
        fontsize=9,
    )
    return figure, found


def differences() -> dict[str, dict[str, list[float]]]:
    """Mean, low and high by dataset and loss."""
    study = planning.read(ROOT / "examples" / "study" / "heads")
    kinds = {kind[0]: (kind, found) for kind, found in comparisons.by_kind(study.results()).items()}
    numbers = {}
    for loss in SHOWN:
        pair = ((loss, comparisons.TUNED), ("ce", comparisons.TUNED))
        each = {d: comparisons.difference(study, *kinds[d][:1], *pair, kinds[d][1]) for d in DATA}
        each["mean"] = comparisons.averaged(study, dict(kinds.values()), *pair)
        for data, found in each.items():
            numbers.setdefault(data, {})[loss] = [found.mean, found.low, found.high]
    return numbers


def loss() -> tuple[Figure, object]:
    """Loss and slope over the log-odds of the true class, published and recommended."""
    curves = loss_curves()
    figure = Figure((8.2, 4.6), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (name, title) in enumerate(
        {"published": "as published", "recommended": "as recommended"}.items()
    ):
        for row, (what, label) in enumerate(
            {"loss": "loss, nats", "slope": "slope for the true logit"}.items()
        ):
            ax = rows[row][column]
            for i, (who, words) in enumerate(
                {
                    "frequent": f"class of {COUNTS[0]:,} images",
                    "rare": f"class of {COUNTS[1]} images",
                    "ce": "cross-entropy",
                }.items()
            ):
                style = {"linestyle": ("-", "--", ":")[i], "marker": MARKERS[i], "markevery": 40}
                ax.plot(Z, curves[name][who][what], color=COLOURS[i], label=words, ms=4, **style)
            ax.tick_params(labelsize=8)
            ax.grid(color="#dddddd", linewidth=0.6)
            if column == 0:
                ax.set_ylabel(label, fontsize=9)
        rows[0][column].set_title(f"LMF {title}", fontsize=10)
    rows[0][0].set_ylim(0, 12)
    rows[1][0].set_ylim(-4, 0.2)
    rows[0][0].legend(fontsize=8)
    figure.supxlabel("log-odds of the true class, logit units", fontsize=9)
    return figure, curves


def loss_curves() -> dict[str, dict[str, dict[str, list[float]]]]:
    """By configuration and class: the loss at Z, and its slope for the true logit."""
    specs = {"published": LMFSpec(COUNTS), "recommended": LMFSpec.recommended(COUNTS)}
    found = {}
    for name, spec in specs.items():
        found[name] = {}
        for who, y in {"frequent": 0, "rare": 1}.items():
            found[name][who] = at(y, spec.margins, spec.weights, spec)
        found[name]["ce"] = at(0, None, None, LMFSpec(COUNTS, alpha=0, gamma=0))
    return found


def at(y: int, margins: object, weights: object, spec: LMFSpec) -> dict[str, list[float]]:
    """Loss of two classes and its slope for the true one, over its log-odds Z."""
    logits = np.zeros((len(Z), 2))
    logits[:, y] = Z
    labels = np.full(len(Z), y)
    numbers = {key: getattr(spec, key) for key in ("alpha", "beta", "gamma", "scale")}
    adjustment = spec.adjustments if spec.logit_adjustment else None
    options = numbers | {"logit_adjustment": adjustment, "reduction": "none"}
    margins = np.zeros(2) if margins is None else margins
    value, gradient = reference.lmf_loss_and_grad(logits, labels, margins, weights, **options)
    return {"loss": value.tolist(), "slope": gradient[:, y].tolist()}


PICTURES = {"which-loss": which_loss, "loss": loss}


def description(name: str) -> object:
    """The numbers that a stored picture was drawn of."""
    text = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    return json.loads(text.partition("<dc:description>")[2].partition("</dc:description>")[0])


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "lmf_multi"  # the same file of the same numbers
    for name, draw in PICTURES.items():
        figure, numbers = draw()
        told = json.dumps(numbers, default=float)
        rounded = json.dumps(json.loads(told, parse_float=lambda x: round(float(x), 6)))
        about = {"Description": rounded, "Date": None}
        figure.savefig(IMAGES / f"{name}.svg", facecolor="white", metadata=about)
        print(IMAGES / f"{name}.svg")
