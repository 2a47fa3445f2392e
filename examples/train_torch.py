r"""Train an image classifier on imbalanced data with PyTorch: a CPU, a GPU, or several machines.

    python -m examples.train_torch
    python -m examples.train_torch --data HAM10000 --image-size 64 --learning-rate 1e-3 \
        --epochs 30 --decay-epochs 10
    torchrun --nproc-per-node 4 -m examples.train_torch --data HAM10000 --arch resnet50 \
        --pretrained --bf16 --compile

The second, for 6,308 training images of HAM10000, takes 3 minutes in one thread of an AMD EPYC
(November 2026): test macro-F1 0.543 and 0.538 for seeds 0 and 1; with ``--loss ce`` 0.541 and
0.530. On a GPU: not measured.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.data.datasets import Split
from examples.data.findings import UNKNOWN
from examples.models import torch as models
from examples.models.common import HEADS, check_image_size
from examples.training.losses_torch import CrossEntropy
from examples.training.recipe_torch import backward, begin
from examples.training.run import Processes, Run
from examples.training.settings import Settings, parse
from examples.training.start import claim, load_data, one_sentence
from lmf_multi import class_weights, deferred_weights
from lmf_multi.torch import FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss

SYNC_EVERY = 20  # steps between looks at a GPU's losses: each look waits for the GPU


def main(argv: Sequence[str] | None = None) -> int:
    """Train, choose the epoch, test; the exit status."""
    settings = parse("torch", argv, __doc__.split("\n")[0])
    rank, world, device = processes(settings)

    # data
    with one_sentence():
        if not claim(settings):
            return 0
        dataset = load_data(settings, visible=rank == 0)
        group = Processes(rank, world, agree=partial(any_process, device=device))
        run = Run(settings, dataset, group, sync_every=1 if device.type == "cpu" else SYNC_EVERY)

    # model, loss, optimiser
    torch.manual_seed(settings.seed)  # every process draws the same weights
    with one_sentence():
        check_image_size(settings.arch, dataset.image_size)
        model = models.build(
            settings.arch,
            len(dataset.class_names),
            **settings.network_options(),
        )
        if device.type == "cuda" and world > 1:
            # a process's share of a batch is too small to take moments of, and depends on how many
            # processes there are
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # what a GPU's convolutions read; from the other layout cuDNN would copy for each of them
        model.to(device, memory_format=torch.channels_last)
        criterion = build_loss(settings, dataset.class_counts, world).to(device)
        folder = run.resume()
        training = begin(settings, model, run.head_alone)
        if folder:
            for name, saved in load(folder, device).items():
                training.parts[name].load_state_dict(saved)
        if run.head_alone:
            freeze_features(model, settings.arch)

    # step
    # to train with alone: checkpoints get the model's names without DDP's "module.", and a process
    # that predicts waits for no other
    replica = replicated(model, world)

    def logits_of(network: nn.Module, images: Tensor) -> Tensor:
        # no GradScaler: bfloat16 has float32's range, so that gradients do not vanish
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            # here, so that a GPU is sent uint8, a quarter of float32's bytes
            return network(models.normalize(images))

    def loss_of(images: Tensor, labels: Tensor, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        return criterion(logits_of(replica, images), labels, normalizers=totals)

    if settings.compile:
        # functions, not the module, which would save its weights as "_orig_mod."…
        logits_of, loss_of = torch.compile(logits_of), torch.compile(loss_of)

    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(run.step_seed())  # dropout goes on as it would have after a resume
        training.optimizer.zero_grad(set_to_none=True)
        loss = backward(loss_of, criterion, (images, labels), replica, settings.accumulate)
        training.step()
        if world > 1:  # its mean over the processes is the whole batch's
            dist.all_reduce(loss)
        return loss / world

    @torch.no_grad()
    def predict(split: Split) -> Tensor:
        """Logits (N, C) of a split in its order, on the CPU of every process."""
        network = training.network.eval()
        # rows of 0 but for this process's own: their sum over the processes is whole
        logits = torch.zeros(len(split), len(dataset.class_names), device=device)
        mine = np.arange(len(split))[rank::world]
        done = 0
        for images, labels in split.batches(mine, settings.batch_size // world):
            rows = mine[done : done + len(labels)]
            logits[rows] = logits_of(network, on_device(images, device)).float()
            done += len(labels)
        if world > 1:
            dist.all_reduce(logits)
        return logits.cpu()

    def write(folder: Path) -> None:
        state = {name: part.state_dict() for name, part in training.parts.items()}
        torch.save(state, folder / "checkpoint.pt")

    def save() -> None:
        run.save(write)
        if world > 1:
            dist.barrier()  # torchrun ends process 0 where another has left

    # loop
    with run:
        while not run.done:
            if run.head_is_next():
                model.load_state_dict(load(run.begin_head(), device)["model"])
                torch.manual_seed(settings.seed)
                freeze_features(model, settings.arch).reset_parameters()
                training = begin(settings, model, head_alone=True)
                replica = replicated(model, world)
            if settings.drw is not None:
                weights = deferred_weights(dataset.class_counts, run.epoch, settings.drw)
                criterion.set_class_weight(weights)
            model.train(not run.head_alone)  # batch norm and dropout leave its features alone
            for images, labels in run.train_batches():
                loss = train_step(on_device(images, device), on_device(labels, device))
                run.took_step(loss)
            if run.stopping and run.step < run.steps:
                save()
                return run.stop()
            training.scheduler.step()  # before the checkpoint, from which the next epoch may begin
            logits = predict(dataset.val)
            val_labels = torch.from_numpy(dataset.val.labels)
            # on every process, since its mean is over all of them
            run.end_epoch(
                logits.numpy(), criterion(logits.to(device), val_labels.to(device)).item()
            )
            save()
            if run.stopping and not run.done:
                return run.stop()

        # the test images are seen once, by the model that the validation images chose
        best = load(run.checkpoints.of_epoch(run.best_epoch), device)
        training.network.load_state_dict(best["model"])
        cuda = device.type == "cuda"
        run.finish(
            predict(dataset.test).numpy(),
            predict(dataset.val).numpy(),
            device=torch.cuda.get_device_name(device) if cuda else device.type,
            peak_device_memory=torch.cuda.max_memory_allocated(device) if cuda else None,
        )
    return 0


def processes(settings: Settings) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device; joins the others where torchrun started several."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = settings.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    with one_sentence():
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} is not to be had: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # worth its trials: training has one shape
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def any_process(flag: bool, *, device: torch.device) -> bool:
    """True where any process says so, on all of them at the same step."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def build_loss(settings: Settings, counts: np.ndarray, world: int = 1) -> nn.Module:
    """The loss that the settings name, of counts (C,) or (L, 2); its mean is the whole batch's."""
    group = "world" if world > 1 else None
    if settings.has_findings:
        arguments = settings.loss_arguments(counts)
        return SigmoidLMFLoss(**arguments, ignore_index=UNKNOWN, process_group=group)
    if settings.loss in ("ce", "bwcce", "crt"):
        options = settings.loss_options
        weight = class_weights(counts, options.get("class_weight"))
        return CrossEntropy(weight, options.get("label_smoothing", 0.0))
    losses: dict[str, Callable[..., nn.Module]] = {
        "focal": FocalLoss,
        "ldam": LDAMLoss,
        "lmf": LMFLoss,
        "la": LMFLoss,
    }
    return losses[settings.loss](**settings.loss_arguments(counts), process_group=group)


def freeze_features(model: nn.Module, arch: str) -> nn.Module:
    """The head, which alone is trained from here on."""
    model.requires_grad_(False)
    return model.get_submodule(HEADS[arch]).requires_grad_(True)


def replicated(model: nn.Module, world: int) -> nn.Module:
    """The model, which several processes bring into accord after each step."""
    return nn.parallel.DistributedDataParallel(model) if world > 1 else model


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; a GPU copies it while the program goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def load(folder: Path, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """What ``write`` put into a checkpoint."""
    # weights_only: a pickle could run code, and checkpoints are passed around
    return torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        # a thread of gloo may hold the last tensors a moment longer, and aborts where Python ends
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(status)
