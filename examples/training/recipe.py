"""How a network is trained, the same in three frameworks: the flags, and the rate of each epoch."""

import argparse
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from examples.training.flags import at_least, not_negative, positive, share, switch

OPTIMIZERS = ("adam", "adamw", "sgd")
MOMENTUM = 0.9  # sgd's, Nesterov's
SCHEDULES = ("step", "cosine", "constant")
HEAD_SHARE = 1 / 9  # of crt's epochs, in which the head is trained: there, 10 after 90
STEPS = {"decay_epochs": 30, "decay_factor": 0.1}  # of the step decay, where not given


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the flags of the same names say."""

    epochs: int
    head_epochs: int  # after the others, crt's alone
    batch_size: int
    learning_rate: float
    weight_decay: float
    decay_epochs: int
    decay_factor: float
    bf16: bool
    # with the values of runs that are older than these
    optimizer: str = "adam"
    schedule: str = "step"
    warmup: int = 0
    early_stopping: int | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    mixup: float | None = None
    ema: float | None = None

    @property
    def all_epochs(self) -> int:
        """Those of the whole network, and then of the head alone."""
        return self.epochs + self.head_epochs

    def stage(self, head_alone: bool) -> tuple[int, int]:
        """How many epochs the whole network or the head is trained, and how many warm it up.

        The head, which is one layer, needs no warm-up.
        """
        return (self.head_epochs, 0) if head_alone else (self.epochs, self.warmup)

    def learning_rate_at(self, epoch: int, head_from: int | None = None) -> float:
        """The rate of an epoch, counted from 0; the schedule begins anew for the head.

        Args:
            epoch: of the whole network's and the head's together.
            head_from: the head's first one, where early stopping has it begin before its time.
        """
        head_from = self.epochs if head_from is None else head_from
        if epoch < head_from:
            return self._rate(epoch, head_alone=False)
        return self._rate(epoch - head_from, head_alone=True)

    def _rate(self, epoch: int, head_alone: bool) -> float:
        """The rate of an epoch of a stage, which the frameworks' own schedules have too."""
        epochs, warmup = self.stage(head_alone)
        if epoch < warmup:
            return self.learning_rate * (epoch + 1) / (warmup + 1)
        epoch -= warmup
        if self.schedule == "step":
            return self.learning_rate * self.decay_factor ** (epoch // self.decay_epochs)
        if self.schedule == "cosine":
            share = epoch / (epochs - warmup)
            return self.learning_rate * (1 + math.cos(math.pi * share)) / 2
        return self.learning_rate


# What runs had before there was a flag for it.
EARLIER = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The recipe's flags, in a group of their own."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), default=100)
    add("--head-epochs", type=at_least(1), metavar="N", help="of crt, then (a ninth of --epochs)")
    add("--batch-size", type=at_least(1), default=32, help="over all devices (32)")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="sgd: Nesterov's momentum (adam)")
    add("--learning-rate", type=positive, default=1e-4, help="sgd's should be larger (1e-4)")
    add(
        "--weight-decay",
        type=not_negative,
        default=5e-4,
        help="as an L2 penalty; of adamw apart from the gradient (5e-4)",
    )
    add("--schedule", choices=SCHEDULES, default="step", help="of the rate, by the epoch (step)")
    add("--decay-epochs", type=at_least(1), metavar="N", help="between the rate's steps (30)")
    add("--decay-factor", type=positive, metavar="X", help="of each step (0.1)")
    add(
        "--warmup",
        type=at_least(0),
        default=0,
        metavar="EPOCHS",
        help="in which the rate rises to --learning-rate (0)",
    )
    add(
        "--early-stopping",
        type=at_least(1),
        metavar="N",
        help="after N epochs without a better validation macro-F1",
    )
    add("--clip-norm", type=positive, metavar="X", help="longest gradient, over all weights")
    add(
        "--accumulate",
        type=at_least(1),
        default=1,
        metavar="N",
        help="parts of a batch, one after another: the same step with less memory (1)",
    )
    add(
        "--mixup",
        type=positive,
        metavar="ALPHA",
        help="train on means of two images, in proportions of Beta(ALPHA, ALPHA)",
    )
    add(
        "--ema",
        type=share,
        metavar="DECAY",
        help="validate and test by the weights' moving average, such as 0.999",
    )
    add("--bf16", **switch, help="compute in bfloat16; weights and loss stay float32")


def pieces(number: int) -> list[slice]:
    """The rows of each part of a batch; every device has its share of each."""
    return [slice(part, None, number) for part in range(number)]


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments leave to be filled in, or say which do not fit.

    Raises:
        ValueError: two of them exclude each other.
    """
    head_epochs = args.head_epochs or 0
    if args.loss == "crt":
        head_epochs = head_epochs or max(1, round(HEAD_SHARE * args.epochs))
    elif head_epochs:
        raise ValueError(f"--head-epochs belongs to crt, got --loss {args.loss}")
    if args.warmup >= args.epochs:
        raise ValueError(
            f"--warmup must be less than --epochs {args.epochs}, got {args.warmup}; "
            "train for more epochs"
        )
    if args.batch_size % args.accumulate:
        raise ValueError(
            f"--batch-size must be a multiple of the {args.accumulate} parts of --accumulate, "
            f"got {args.batch_size}"
        )
    filled = {"head_epochs": head_epochs}
    for name, default in STEPS.items():
        value = getattr(args, name)
        if value is not None and args.schedule != "step":
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} belongs to --schedule step, got --schedule {args.schedule}")
        filled[name] = default if value is None else value
    return filled
