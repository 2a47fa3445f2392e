"""Figures of a study's predictions: confusion matrices, precision–recall and reliability."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    precision_recall_curve,
)

from examples.study.comparisons import by_kind
from examples.study.picture import COLOURS, INK, WIDTH, Picture, grid, in_lines, line_styles
from examples.study.planning import Kind, Study, Training

BINS = 10  # of confidence
SOFTMAX = (
    "Probabilities are the softmax of the logits as they are, which LDAM multiplies by its scale "
    "in training: at scale 30 they are too even, and order images otherwise than the scaled ones."
)


def pictures(study: Study) -> Iterator[Picture]:
    """Three for each data source, architecture and framework.

    Where the predictions are not kept, a sentence says what is left out.
    """
    for kind, losses in by_kind(study.results()).items():
        names = next(iter(next(iter(losses.values())).values()))["data"]["class_names"]
        yield confusion(kind, losses, names)
        try:
            predictions = {
                loss: pooled(study, [study.training(kind, loss, seed) for seed in seeds])
                for loss, seeds in losses.items()
            }
        except FileNotFoundError as error:
            print(f"Precision, recall and reliability of {', '.join(kind)} are left out: {error}")
            continue
        yield precision_recall(kind, predictions, names)
        yield reliability(kind, predictions)


def pooled(study: Study, trainings: Sequence[Training]) -> tuple[np.ndarray, np.ndarray]:
    """Test labels int64 (seeds · N,) and probabilities (seeds · N, C) of all seeds together."""
    files = [np.load(study.out(training) / "predictions.npz") for training in trainings]
    labels = np.concatenate([file["labels"] for file in files])
    return labels, softmax(np.concatenate([file["logits"] for file in files]), axis=1)


def confusion(
    kind: Kind, losses: dict[str, dict[int, dict[str, Any]]], names: list[str]
) -> Picture:
    """Axes a loss: the share of each true class, by predicted class."""
    size = min(WIDTH, max(2.6, 0.38 * len(names)))
    figure, all_axes = grid(len(losses), size, size + 0.5)
    figure.set_layout_engine("compressed")  # of axes that are square
    for axes, (loss, seeds) in zip(all_axes, losses.items(), strict=True):
        counts = sum(np.array(r["test"]["confusion_matrix"]) for r in seeds.values())
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        display = ConfusionMatrixDisplay(100 * shares, display_labels=names)
        display.plot(
            ax=axes,
            cmap="Greys",
            colorbar=False,
            values_format=".0f",
            im_kw={"vmin": 0, "vmax": 100},  # the same shades for every loss
        )
        for number, share in zip(display.text_.flat, shares.flat, strict=True):
            number.set(color="#ffffff" if share > 0.5 else "#000000", fontsize="small")
        axes.tick_params("x", rotation=90)
        axes.set_title(in_lines(loss))
        axes.set(xlabel="predicted", ylabel="true")
    return Picture(
        f"confusion-{'-'.join(kind)}",
        f"Confusion matrices, {', '.join(kind)}: percent of each true class, all seeds together.",
        figure,
    )


def precision_recall(
    kind: Kind,
    predictions: dict[str, tuple[np.ndarray, np.ndarray]],
    names: list[str],
) -> Picture:
    """Axes a class, a line a loss."""
    figure, all_axes = grid(len(names), sharex=True, sharey=True)
    for c, axes in enumerate(all_axes):
        for (loss, (labels, probabilities)), style in zip(
            predictions.items(), line_styles(), strict=False
        ):
            precision, recall, _ = precision_recall_curve(labels == c, probabilities[:, c])
            axes.plot(recall, precision, label=loss, markevery=0.2, **style)
        axes.set_title(names[c])
    longest = max(map(len, predictions))
    columns = max(1, min(len(predictions), int(8 * WIDTH / (longest + 8))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(predictions) // columns))
    lines = all_axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=columns, fontsize="small")
    figure.supxlabel("recall")
    figure.supylabel("precision")
    return Picture(
        f"precision-recall-{'-'.join(kind)}",
        f"Precision and recall of each class, {', '.join(kind)}, the test predictions of all seeds "
        f"together. {SOFTMAX}",
        figure,
    )


def reliability(kind: Kind, predictions: dict[str, tuple[np.ndarray, np.ndarray]]) -> Picture:
    """Axes a loss: how often a prediction is right, over how sure it is."""
    figure, all_axes = grid(len(predictions), sharex=True, sharey=True)
    for axes, (loss, (labels, probabilities)) in zip(all_axes, predictions.items(), strict=True):
        right = probabilities.argmax(1) == labels
        shares, confidences = calibration_curve(right, probabilities.max(1), n_bins=BINS)
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=0.8)
        axes.plot(confidences, shares, color=COLOURS[0], marker="o")
        axes.set_title(in_lines(loss), fontsize="medium")
    figure.supxlabel("predicted probability of the predicted class")
    figure.supylabel("share that is right")
    return Picture(
        f"reliability-{'-'.join(kind)}",
        f"Reliability, {', '.join(kind)}: below the dashed line the softmax is surer than it "
        f"should be. {BINS} bins, all seeds together. {SOFTMAX}",
        figure,
    )
