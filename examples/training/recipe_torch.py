"""The recipe in PyTorch."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


@dataclass
class Training:
    """A model, what moves its weights, and their average."""

    recipe: Recipe
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    average: AveragedModel | None

    @property
    def network(self) -> nn.Module:
        """What is validated: the model, or one of averaged weights."""
        return self.model if self.average is None else self.average.module

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint needs: images and dropout follow from seed and step."""
        found = {"model": self.network, "optimizer": self.optimizer, "scheduler": self.scheduler}
        if self.average is not None:  # which shares its memory, and bytes, with the network
            found |= {"average": self.average, "trained": self.model}
        return found

    def step(self) -> None:
        """Move the weights by their gradients, shortened where they are too long together."""
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)


def begin(recipe: Recipe, model: nn.Module, head_alone: bool = False) -> Training:
    """Before the first step of the whole network, or of the head, whose average begins anew."""
    optimizer = build_optimizer(recipe, model.parameters())
    average = None
    if recipe.ema is not None:  # of the weights; batch norm's moments are the newest
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    scheduler = build_scheduler(recipe, optimizer, head_alone)
    return Training(recipe, model, optimizer, scheduler, average)
