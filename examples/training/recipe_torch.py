"""The recipe in PyTorch."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from examples.training.recipe import MOMENTUM, Recipe, pieces


def build_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own; adam and sgd add the weight decay to the gradient, adamw shrinks by it."""
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, nesterov=True, **options)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.Adam(parameters, **options)  # the paper's


def backward(
    loss_of: Callable[..., Tensor],
    criterion: nn.Module,
    batch: tuple[Tensor, Tensor],
    replica: nn.Module,
    accumulate: int,
) -> Tensor:
    """Add a batch's gradients to the weights', part by part; returns its loss, ().

    Args:
        loss_of: of images, labels and what the whole batch's mean divides by, or None.
        criterion: knows that by its ``normalizers``.
        batch: images and labels.
        replica: brings processes into accord, once a batch.
        accumulate: the number of parts.
    """
    images, labels = batch
    totals = criterion.normalizers(labels) if accumulate > 1 else None
    losses = []
    for rows in pieces(accumulate):
        alone = len(losses) < accumulate - 1 and isinstance(replica, DistributedDataParallel)
        with replica.no_sync() if alone else nullcontext():
            loss = loss_of(images[rows], labels[rows], totals)
            loss.backward()
        losses.append(loss.detach())  # it waits for the next look, without its graph
    return torch.stack(losses).sum() if accumulate > 1 else losses[0]


def step(recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
    """Move the weights by their gradients, shortened where they are too long together."""
    if recipe.clip_norm is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, recipe.clip_norm)
    optimizer.step()


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
