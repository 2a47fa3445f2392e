"""The demo's PyTorch loop."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from examples.data.digits import Digits, Recipe
from lmf_multi import class_counts
from lmf_multi.torch import LMFLoss


def train(
    digits: Digits, loss: str, recipe: Recipe, on_epoch: Callable[[float], None]
) -> np.ndarray:
    """Train with cross-entropy or LMF; report each epoch's mean loss; predict the test images."""
    torch.set_num_threads(1)  # images this small gain nothing from a second thread
    torch.manual_seed(recipe.seed)
    shuffle = np.random.default_rng(recipe.seed)
    images = torch.from_numpy(digits.train_images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(digits.train_labels)
    test_images = torch.from_numpy(digits.test_images).permute(0, 3, 1, 2)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 32, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    if loss == "LMF":
        criterion = LMFLoss(class_counts(digits.train_labels))
    else:
        criterion = nn.CrossEntropyLoss()

    for _ in range(recipe.epochs):
        losses = []
        for batch in torch.from_numpy(shuffle.permutation(len(labels))).split(recipe.batch_size):
            value = criterion(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        on_epoch(float(np.mean(losses)))

    with torch.no_grad():
        return model(test_images).argmax(1).numpy()
