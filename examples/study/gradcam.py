"""Where the networks of a study look: Grad-CAM on test images, side by side for each loss.

The maps are of pytorch-grad-cam (Gildenblat et al.).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from examples.study.comparisons import by_kind
from examples.study.gradcam_networks import Network, load
from examples.study.picture import Picture, grid, in_lines
from examples.study.planning import Study, Training
from examples.training.start import load_data

IMAGES = 8  # at most, of as many classes


def pictures(study: Study) -> Iterator[Picture]:
    """One for each data source, architecture and framework, of the first seed of each loss.

    What cannot be drawn, since data, checkpoints or a framework are not here, is told in a
    sentence.
    """
    for kind, losses in by_kind(study.results()).items():
        first = [study.training(kind, loss, min(seeds)) for loss, seeds in losses.items()]
        try:
            yield picture(study, first)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            print(f"Grad-CAM of {', '.join(kind)} is left out: {error}")


def picture(study: Study, trainings: Sequence[Training]) -> Picture:
    """A column an image, the first test image of each class; a row a loss.

    Raises:
        FileNotFoundError: the data or a checkpoint are not here.
        ModuleNotFoundError: the framework is not here.
        ValueError: the data are not those of the study.
    """
    for training in trainings:  # before any image is decoded
        if not (folder := study.out(training) / "checkpoints").exists():
            raise FileNotFoundError(f"{folder} is not there")
    test = load_data(trainings[0].settings(), visible=False).test
    predictions = [predicted(study, training, test.ids) for training in trainings]
    result = study.result(trainings[0])
    names, counts = result["data"]["class_names"], np.array(result["data"]["class_counts"])
    classes = [c for c in np.argsort(-counts, kind="stable") if c in test.labels][:IMAGES]
    rows = np.array([np.flatnonzero(test.labels == c)[0] for c in classes])
    (images, _), *_ = test.batches(rows, len(rows))
    columns = len(rows)
    figure, all_axes = grid(columns * (1 + len(trainings)), 1.0, 1.2, columns=columns)
    show(all_axes[:columns], images, [names[c] for c in classes])
    beside = {"ha": "right", "va": "center", "fontsize": "small"}
    for row, (training, found) in enumerate(zip(trainings, predictions, strict=True), 1):
        axes = all_axes[row * columns : (row + 1) * columns]
        maps = grad_cam(load(study, training, images.shape[1]), images, found[rows])
        show_maps(axes, images, maps, [names[c] for c in found[rows]])
        axes[0].text(-0.1, 0.5, in_lines(training.loss), transform=axes[0].transAxes, **beside)
    kind = trainings[0].kind
    return Picture(
        f"grad-cam-{'-'.join(kind)}",
        f"Grad-CAM of the predicted class, {', '.join(kind)}: bright, and within the line "
        "of half the map's height, is where the network looked; above each map what it predicted, "
        "above the images of the first row what they show.",
        figure,
    )


def predicted(study: Study, training: Training, ids: np.ndarray) -> np.ndarray:
    """The class int64 (N,) of each test image; data that have changed since are refused."""
    with np.load(study.out(training) / "predictions.npz") as file:
        if not np.array_equal(file["ids"], ids):
            raise ValueError(
                f"the test images must be those that {training.name} predicted, "
                "but the data have changed since"
            )
        return file["logits"].argmax(1)


def grad_cam(network: Network, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Maps float32 (N, S, S), from 0 to 1, for classes (N,) of images uint8 (N, S, S, 3)."""
    targets = [ClassifierOutputTarget(c) for c in classes]
    with GradCAM(network.model, [network.layer]) as cam:
        return cam(network.prepare(torch.from_numpy(images)), targets)


def show(all_axes: Sequence[Axes], images: np.ndarray, titles: Sequence[str]) -> None:
    """Images uint8 (N, S, S, 3), one in each of the axes."""
    for axes, image, title in zip(all_axes, images, titles, strict=True):
        axes.imshow(image, interpolation="none")  # a page gets the pixels, not what a screen would
        axes.set_title(title, fontsize="x-small")
        axes.set_axis_off()


def show_maps(
    all_axes: Sequence[Axes], images: np.ndarray, maps: np.ndarray, titles: Sequence[str]
) -> None:
    """Images, bright where the maps (N, S, S) are high, with a line at half of their height."""
    lit = images * (0.2 + 0.8 * maps[..., None])
    show(all_axes, lit.astype(np.uint8), titles)
    for axes, heat in zip(all_axes, maps, strict=True):
        axes.contour(heat, [0.5], colors="black", linewidths=2)
        axes.contour(heat, [0.5], colors="white", linewidths=0.8)
