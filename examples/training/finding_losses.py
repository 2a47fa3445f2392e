"""The losses of several findings an image, each of them told for itself."""

import argparse
from typing import Any

import numpy as np

BINARY_CROSS_ENTROPY = {"alpha": 0.0, "gamma": 0.0, "class_weight": None}
# each as a member of the family of SigmoidLMFLoss
MEMBERS: dict[str, dict[str, Any]] = {
    "ce": BINARY_CROSS_ENTROPY,
    "bwcce": BINARY_CROSS_ENTROPY,
    "focal": {"alpha": 0.0},
    "ldam": {"alpha": 1.0, "beta": 0.0},
    "lmf": {},
    "la": BINARY_CROSS_ENTROPY,
}


def arguments(loss: str, counts: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """What SigmoidLMFLoss takes.

    Args:
        loss: one of `MEMBERS`.
        counts: images without and with each finding, int (L, 2).
        options: the loss's own, which may be given.
    """
    negative, positive = counts.T
    counted = {"negative_counts": negative, "positive_counts": positive}
    return counted | MEMBERS[loss] | options


def refuse_what_goes_by_classes(args: argparse.Namespace) -> None:
    """Raise ValueError for what takes one class an image, where there may be several findings."""
    if not (args.findings or args.findings_column):
        return
    if args.loss not in MEMBERS:
        raise ValueError(f"findings are trained with --loss {', '.join(MEMBERS)}, got {args.loss}")
    by_classes = {"sampler": "shuffle", "drw": None, "mixup": None, "accumulate": 1}
    for name, usual in by_classes.items():
        if (value := getattr(args, name)) != usual:
            raise ValueError(
                f"--{name} {value} goes by an image's one class, but it may have several findings; "
                "leave it out"
            )
