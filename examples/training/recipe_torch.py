"""The recipe in PyTorch."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from examples.training.recipe import MOMENTUM, Recipe


def build_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own; adam and sgd add the weight decay to the gradient, adamw shrinks by it."""
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, nesterov=True, **options)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.Adam(parameters, **options)  # the paper's


def build_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, head_alone: bool = False
) -> LRScheduler:
    """PyTorch's schedules, with a step an epoch: the rates of ``recipe.learning_rate_at``."""
    epochs, warmup = recipe.stage(head_alone)
    main: LRScheduler
    if recipe.schedule == "step":
        main = StepLR(optimizer, recipe.decay_epochs, recipe.decay_factor)
    elif recipe.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, epochs - warmup)
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], [warmup])
