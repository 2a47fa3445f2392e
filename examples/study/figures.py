"""A study's results as figures: differences and scores of each loss, of each class, and more.

    python -m examples.study.figures runs/study

Those of predictions and Grad-CAM have files of their own; what is drawn here needs result files.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from examples.study import prediction_figures
from examples.study.comparisons import (
    ALONE,
    ARGMAX,
    BASELINE,
    BOTH,
    TUNED,
    Difference,
    Results,
    against_baseline,
    by_kind,
    macro_f1,
    scored,
)
from examples.study.picture import COLOURS, INK, SHADES, WIDTH, Picture, bar_styles, grid, in_lines
from examples.study.planning import Kind, Study, named
from examples.study.tables import classes
from examples.training.checkpoints import write_atomically
from examples.training.settings import LOSSES
from examples.training.start import one_sentence

# marker, colour, whether it is filled, and how far below a row's middle it stands
RULES = {
    ARGMAX: ("s", COLOURS[1], False, -0.15),
    TUNED: ("o", COLOURS[0], True, 0.15),
    ALONE: ("D", INK, True, 0.0),
}
SWEPT = [name for name, value in LOSSES["lmf"].items() if isinstance(value, float)]


def findings(study: Study) -> Iterator[Picture]:
    """What the results so far say of each loss."""
    results = study.results()
    compared = against_baseline(study, results)
    for data in dict.fromkeys(training.data for training in results):
        if mine := [each for each in compared if each.kind[0] == data]:
            yield forest(mine, data)
    for kind, losses in by_kind(results).items():
        yield heat_map(results, kind, losses)


def details(study: Study) -> Iterator[Picture]:
    """What lies behind it."""
    results = study.results()
    for data in dict.fromkeys(training.data for training in results):
        yield scores(results, data)
        yield images_per_class(results, data)
    for option in SWEPT:
        yield from sweep(results, option)
    yield from prediction_figures.pictures(study)
    try:
        from examples.study import gradcam  # which imports PyTorch
    except ModuleNotFoundError as error:
        print(f"Grad-CAM is left out: {error}")
    else:
        yield from gradcam.pictures(study)


def forest(compared: Sequence[Difference], data: str) -> Picture:
    """Differences from cross-entropy with their intervals: axes a kind, a row a loss."""
    kinds = list(dict.fromkeys(each.kind for each in compared))
    names = list(dict.fromkeys(each.loss for each in compared))
    figure, all_axes = grid(len(kinds), WIDTH, 0.4 * len(names) + 1.1, columns=1, sharex=True)
    for axes, kind in zip(all_axes, kinds, strict=True):
        axes.axvline(0, color=INK, linewidth=0.8)
        for rule, (marker, colour, filled, height) in RULES.items():
            mine = [each for each in compared if (each.kind, each.rule) == (kind, rule)]
            for each in mine:
                y = names.index(each.loss) + (height if len(names) > 1 else 0)
                if each.low is not None:
                    style = "-" if each.over == BOTH else ":"
                    axes.plot([each.low, each.high], [y, y], style, color=colour, linewidth=2)
                axes.plot(
                    each.mean,
                    y,
                    marker,
                    color=colour,
                    markerfacecolor=colour if filled else "white",
                    markersize=7,
                    linestyle="none",
                    label=rule if each is mine[0] else None,
                )
        axes.set_yticks(range(len(names)), [in_lines(name, 36) for name in names], fontsize="small")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(", ".join(kind), fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        line.get_label(): line
        for axes in all_axes
        for line in axes.lines
        if line.get_label()[0] != "_"
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    figure.supxlabel(f"macro-F1 minus {BASELINE}'s, read by the same rule", fontsize="medium")
    return Picture(
        f"against-ce-{data}",
        f"How much macro-F1 differs from cross-entropy's on {data}, with 95 % intervals: over "
        "seeds and test images where the line is whole, over seeds alone where it is dotted.",
        figure,
    )


def heat_map(results: Results, kind: Kind, losses: dict[str, dict[int, dict[str, Any]]]) -> Picture:
    """F1 of each loss and class, the commonest first: axes a rule."""
    order = classes(results, kind[0])
    rules = [
        rule
        for rule in (ARGMAX, TUNED)
        if all(scored(r, rule) for seeds in losses.values() for r in seeds.values())
    ]
    height = 0.32 * len(losses) + 1.3
    figure, all_axes = grid(len(rules), min(WIDTH, 0.65 * len(order) + 2), height, columns=1)
    for axes, rule in zip(all_axes, rules, strict=True):
        tests = [[scored(r, rule)["f1"] for r in seeds.values()] for seeds in losses.values()]
        means = np.array([np.mean(f1, axis=0) for f1 in tests])[:, [c for c, *_ in order]]
        axes.imshow(means, SHADES, aspect="auto", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(means):
            style = {"color": ink_on(value), "ha": "center", "va": "center", "fontsize": "small"}
            axes.text(column, row, f"{value:.2f}", **style)
        axes.set_yticks(
            range(len(losses)), [in_lines(name, 36) for name in losses], fontsize="small"
        )
        labels = [f"{name} {count}" for _, name, count in order]
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(order)), labels, fontsize="small", **slanted)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(rule, fontsize="medium")
    return Picture(
        f"f1-{'-'.join(kind)}",
        f"F1 of each class, {', '.join(kind)}: mean over seeds, the commonest class first, beside "
        "each its number of training images.",
        figure,
    )


def ink_on(value: float) -> str:
    """Of letters on the shade of a number from 0 to 1."""
    return "#000000" if value > 0.46 else "#ffffff"


def scores(results: Results, data: str) -> Picture:
    """Bars of macro-F1 with sample standard deviations, a group for each loss."""
    kinds = {kind: losses for kind, losses in by_kind(results).items() if kind[0] == data}
    names = list(dict.fromkeys(loss for losses in kinds.values() for loss in losses))
    figure, (axes,) = grid(1, min(WIDTH, 0.9 * len(names) + 2), 4)
    width = 0.8 / len(kinds)
    for place, ((kind, losses), style) in enumerate(zip(kinds.items(), bar_styles(), strict=False)):
        values = [[macro_f1(r) for r in losses[name].values()] for name in losses]
        axes.bar(
            [names.index(name) + (place - (len(kinds) - 1) / 2) * width for name in losses],
            [np.mean(each) for each in values],
            width,
            yerr=[np.std(each, ddof=1) if len(each) > 1 else 0 for each in values],
            capsize=3,
            ecolor=INK,
            label=" ".join(kind[1:]),
            **style,
        )
    labels = map(in_lines, names)
    axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylabel("macro-F1 on test images")
    axes.set_title(data)
    if len(kinds) > 1:
        figure.legend(loc="outside upper right", ncols=len(kinds))
    return Picture(
        f"macro-f1-{data}",
        f"Macro-F1 of each loss on {data}: mean over seeds, error bars of one sample standard "
        "deviation.",
        figure,
    )


def images_per_class(results: Results, data: str) -> Picture:
    """Bars on a logarithmic scale, the commonest class first."""
    _, names, counts = zip(*classes(results, data), strict=True)
    figure, (axes,) = grid(1, min(WIDTH, max(5.0, 0.6 * len(counts) + 1)), 3.5)
    bars = axes.bar(range(len(counts)), counts, color=COLOURS[0])
    axes.bar_label(bars)
    axes.set_xticks(range(len(counts)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 2 * max(counts))  # one image has a bar as well
    axes.set_ylabel("training images")
    axes.set_title(data)
    return Picture(f"images-per-class-{data}", f"Training images of each class of {data}.", figure)


def sweep(results: Results, option: str) -> Iterator[Picture]:
    """Macro-F1 of LMF over one hyper-parameter, wherever nothing else differs."""
    lines = swept(results, option)
    if not lines:
        return
    figure, all_axes = grid(len(lines), 4, 3.5, sharey=True)
    for axes, (kind, _), scores in zip(all_axes, lines, lines.values(), strict=True):
        values = sorted(scores)
        axes.errorbar(
            values,
            [np.mean(scores[value]) for value in values],
            [np.std(scores[v], ddof=1) if len(scores[v]) > 1 else 0 for v in values],
            color=COLOURS[0],
            marker="o",
            capsize=3,
            label="LMF",
        )
        if base := by_kind(results)[kind].get(BASELINE):
            mean = np.mean([macro_f1(result) for result in base.values()])
            axes.axhline(mean, color=INK, linestyle="--", label="cross-entropy")
        axes.set_xlabel(option.replace("_", " "))
        axes.set_title(" ".join(kind), fontsize="medium")
        axes.legend()
    all_axes[0].set_ylabel("macro-F1 on test images")
    yield Picture(
        f"sweep-{option}",
        f"Macro-F1 of LMF over {option.replace('_', ' ')}: mean over seeds, error bars of one "
        "sample standard deviation.",
        figure,
    )


def swept(results: Results, option: str) -> dict[tuple[Kind, str], dict[float, list[float]]]:
    """Macro-F1 of each seed by the option's value, by kind and all other settings.

    Of heads each row has its own settings, chosen from as many; no two differ in one alone.
    """
    found: dict[tuple[Kind, str], dict[float, list[float]]] = {}
    for training, result in results.items():
        settings = training.decides() | {"epochs": result["epochs"], "seed": None}
        if settings["loss"] != "lmf" or "settings_tried" in result:
            continue
        value = settings["loss_options"].pop(option)
        values = found.setdefault((training.kind, json.dumps(settings)), {})
        values.setdefault(value, []).append(macro_f1(result))
    return {key: values for key, values in found.items() if len(values) > 1}


def write(study: Study, picture: Picture) -> Path:
    """The picture's file in ``DIR/figures``."""
    folder = study.folder / "figures"
    folder.mkdir(exist_ok=True)
    file = folder / f"{picture.name}.png"
    write_atomically(file, picture.png())
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figures, and print where they are."""
    study = named(argv, "examples.study.figures", "Draw a study.")
    with one_sentence():
        for picture in chain(findings(study), details(study)):
            print(write(study, picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
