"""A study's results as figures: scores of each loss, images of each class, sweeps, and more.

    python -m examples.study.figures runs/study

Those of predictions and Grad-CAM have files of their own; what is drawn here needs result files.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.study import prediction_figures
from examples.study.picture import Picture, bar_styles, grid
from examples.study.planning import Kind, Study, named
from examples.study.tables import BASELINE, Results, by_kind, macro_f1
from examples.training.checkpoints import write_atomically
from examples.training.run import one_sentence
from examples.training.settings import LOSSES

SWEPT = [name for name, value in LOSSES["lmf"].items() if isinstance(value, float)]


def pictures(study: Study) -> Iterator[Picture]:
    """All figures that the results so far allow."""
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


def scores(results: Results, data: str) -> Picture:
    """Bars of macro-F1 with sample standard deviations, a group for each loss."""
    kinds = {kind: losses for kind, losses in by_kind(results).items() if kind[0] == data}
    names = list(dict.fromkeys(loss for losses in kinds.values() for loss in losses))
    figure, (axes,) = grid(1, max(6.0, 0.9 * len(names) + 2), 4)
    width = 0.8 / len(kinds)
    for place, ((kind, losses), style) in enumerate(zip(kinds.items(), bar_styles(), strict=False)):
        values = [[macro_f1(r) for r in losses[name].values()] for name in losses]
        axes.bar(
            [names.index(name) + (place - (len(kinds) - 1) / 2) * width for name in losses],
            [np.mean(each) for each in values],
            width,
            yerr=[np.std(each, ddof=1) if len(each) > 1 else 0 for each in values],
            capsize=3,
            label=" ".join(kind[1:]),
            **style,
        )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
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
    about = next(result["data"] for t, result in results.items() if t.data == data)
    counts = np.array(about["class_counts"])
    order = np.argsort(counts, kind="stable")[::-1]
    figure, (axes,) = grid(1, max(5.0, 0.6 * len(counts) + 1), 3.5)
    bars = axes.bar(range(len(counts)), counts[order], color="0.6", edgecolor="black")
    axes.bar_label(bars)
    names = [about["class_names"][c] for c in order]
    axes.set_xticks(range(len(counts)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 2 * counts.max())  # one image has a bar as well
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
            color="black",
            marker="o",
            capsize=3,
            label="LMF",
        )
        if base := by_kind(results)[kind].get(BASELINE):
            mean = np.mean([macro_f1(result) for result in base.values()])
            axes.axhline(mean, color="0.5", linestyle="--", label="cross-entropy")
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
    """Macro-F1 of each seed by the option's value, by kind and all other settings."""
    found: dict[tuple[Kind, str], dict[float, list[float]]] = {}
    for training, result in results.items():
        settings = training.decides() | {"epochs": result["epochs"], "seed": None}
        if settings["loss"] != "lmf":
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
        for picture in pictures(study):
            print(write(study, picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
