"""Where the networks of a study look: Grad-CAM on test images, side by side for each loss.

The maps are of pytorch-grad-cam (Gildenblat et al.), so they are those of the PyTorch trainings.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from examples import models_torch
from examples.checkpoints import Checkpoints
from examples.picture import Picture, grid
from examples.run import load_data
from examples.study import Study, Training
from examples.tables import by_kind

IMAGES = 8  # at most, of as many classes
FEWEST_PIXELS = 3  # a side of a map, of which the deepest layer that has them is taken
# By their names in PyTorch, each with half the pixels of the next.
LAYERS = {
    "small": ("features.3", "features.2", "features.1", "features.0"),
    "resnet50": ("layer4", "layer3", "layer2", "layer1"),
    "efficientnet_v2_s": ("features.7", "features.5", "features.3", "features.2"),
    "densenet121": ("features", "features.denseblock3", "features.denseblock2"),
}


def pictures(study: Study) -> Iterator[Picture]:
    """One for each data source and architecture, of the first seed that each loss has.

    What cannot be drawn, since data or checkpoints are not here, is told in a sentence.
    """
    for kind, losses in by_kind(study.results()).items():
        if kind[2] == "torch":
            first = [study.training(kind, loss, min(seeds)) for loss, seeds in losses.items()]
            try:
                yield picture(study, first)
            except (OSError, ValueError) as error:
                print(f"Grad-CAM of {', '.join(kind)} is left out: {error}")


def picture(study: Study, trainings: Sequence[Training]) -> Picture:
    """A row an image, the first test image of each class; a column a loss.

    Raises:
        FileNotFoundError: the data or a checkpoint are not here.
        ValueError: the data are not those of the study.
    """
    test = load_data(trainings[0].settings(), visible=False).test
    check_same_images(study, trainings, test.ids)
    result = study.result(trainings[0])
    names, counts = result["data"]["class_names"], np.array(result["data"]["class_counts"])
    classes = [c for c in np.argsort(-counts, kind="stable") if c in test.labels][:IMAGES]
    rows = np.array([np.flatnonzero(test.labels == c)[0] for c in classes])
    (images, _), *_ = test.batches(rows, len(rows))
    columns = 1 + len(trainings)
    figure, all_axes = grid(columns * len(rows), 1.6, 1.8, columns=columns)
    show(all_axes[::columns], images, [f"true: {names[c]}" for c in classes])
    for column, training in enumerate(trainings, 1):
        axes = all_axes[column::columns]
        maps, predicted = grad_cam(load(study, training), training.arch, images)
        lit = images * (0.2 + 0.8 * maps[..., None])
        show(axes, lit.astype(np.uint8), [names[p] for p in predicted])
        for ax, heat in zip(axes, maps, strict=True):
            ax.contour(heat, [0.5], colors="black", linewidths=2)
            ax.contour(heat, [0.5], colors="white", linewidths=0.8)
        axes[0].set_title(f"{training.loss}\n{axes[0].get_title()}", fontsize="small")
    kind = f"{trainings[0].data}-{trainings[0].arch}"
    return Picture(
        f"grad-cam-{kind}",
        f"Grad-CAM of the predicted class, {kind}, PyTorch: bright, and within the line "
        "of half the map's height, is where the network looked; above each map what it predicted.",
        figure,
    )


def check_same_images(study: Study, trainings: Sequence[Training], ids: np.ndarray) -> None:
    """Refuse data that have changed since."""
    for training in trainings:
        tested = np.load(study.out(training) / "predictions.npz")["ids"]
        if not np.array_equal(tested, ids):
            raise ValueError(
                f"the test images must be those that {training.name} predicted, "
                "but the data have changed since"
            )


def load(study: Study, training: Training) -> nn.Module:
    """The network of the best epoch, on the CPU."""
    result, settings = study.result(training), training.settings()
    checkpoints = Checkpoints(study.out(training) / "checkpoints", print)
    file: Path = checkpoints.of_epoch(result["best_validation"]["epoch"]) / "checkpoint.pt"
    classes = len(result["data"]["class_names"])
    return models_torch.build(training.arch, classes, head=settings.head, weights=file).eval()


def grad_cam(model: nn.Module, arch: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 (N, S, S) from 0 to 1 of images uint8 (N, S, S, 3), and the classes (N,)."""
    pixels = models_torch.normalize(torch.from_numpy(images))
    layer, predicted = layer_and_classes(model, LAYERS[arch], pixels)
    targets = [ClassifierOutputTarget(c) for c in predicted]
    with GradCAM(model, [layer]) as cam:
        return cam(pixels, targets), predicted


@torch.no_grad()
def layer_and_classes(
    model: nn.Module, names: Sequence[str], pixels: Tensor
) -> tuple[nn.Module, np.ndarray]:
    """The deepest of the layers whose output is no mere point, and the predicted classes (N,)."""
    large: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if min(output.shape[2:]) >= FEWEST_PIXELS:
            large.append(layer)  # in the order of the pass, so the deepest comes last

    hooks = [model.get_submodule(name).register_forward_hook(look) for name in names]
    predicted = model(pixels).argmax(1).numpy()
    for hook in hooks:
        hook.remove()
    return large[-1], predicted


def show(all_axes: Sequence[Axes], images: np.ndarray, titles: Sequence[str]) -> None:
    """Images uint8 (N, S, S, 3), one in each of the axes."""
    for axes, image, title in zip(all_axes, images, titles, strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
