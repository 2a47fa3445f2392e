"""Grad-CAM pictures of new images: what the network looked at for the class that it predicted."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.study.gradcam import grad_cam, show, show_maps
from examples.study.gradcam_networks import Network, from_checkpoint
from examples.study.picture import Picture, grid
from examples.trained.finished import Finished


def network(run: Finished) -> Network:
    """The run's network in PyTorch on the CPU, of any framework, for its maps."""
    return from_checkpoint(
        run.checkpoint,
        framework=run.framework,
        arch=run.arch,
        head=run.head,
        num_classes=run.num_classes,
        image_size=run.image_size,
    )


def pictures(
    network: Network, images: np.ndarray, classes: np.ndarray, titles: Sequence[str]
) -> Iterator[Picture]:
    """One of each image uint8 (N, S, S, 3): itself, and beside it where its class (N,) is seen."""
    for image, heat, title in zip(images, grad_cam(network, images, classes), titles, strict=True):
        figure, (left, right) = grid(2, 2.6, 2.8)
        show([left], image[None], ["as the network sees it"])
        show_maps([right], image[None], heat[None], [f"Grad-CAM of {title}"])
        yield Picture("grad-cam", title, figure)


def write(folder: Path, names: Sequence[str], drawn: Iterator[Picture]) -> None:
    """PNG files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, drawn, strict=True):
        (folder / f"{name}.png").write_bytes(picture.png())
