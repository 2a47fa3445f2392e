"""What the trainers are asked for: one set of flags for three frameworks, with published defaults.

The recipe is that of Sadi et al., arXiv 2212.12741: Adam, a step decay, the best epoch by macro-F1.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from examples.data import tables
from examples.data.augment import AUGMENTATIONS, Augmentation
from examples.training import config, finding_losses
from examples.training.flags import at_least, switch
from examples.training.recipe import STEPS, Recipe, add_flags, recipe_of
from lmf_multi import LMFSpec
from lmf_multi.spec import check_parameters

ARCHS = ("small", "resnet50", "efficientnet_v2_s", "densenet121")
TORCH_ARCHS = (*ARCHS, "efficientnet_lite0")  # which PyTorch has
# of red, green and blue on [0, 1]: ImageNet's, for which pretrained weights were made
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The paper's values, which are the library's defaults.
PUBLISHED = {field.name: field.default for field in fields(LMFSpec) if field.name != "class_counts"}
# Each loss with the paper's values, which flags of the same name replace.
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {},
    "bwcce": {"class_weight": "complement"},
    "focal": {
        "gamma": 1.5,
        "max_margin": 0.5,
        "class_weight": "margin",
        "label_smoothing": 0.0,
        "logit_adjustment": 0.0,
    },
    "ldam": {
        "max_margin": 0.5,
        "scale": 30.0,
        "class_weight": "margin",
        "label_smoothing": 0.0,
        "logit_adjustment": 0.0,
    },
    "lmf": PUBLISHED,
    # cross-entropy of adjusted logits (Menon et al., arXiv 2007.07314)
    "la": {"logit_adjustment": 1.0},
    # cross-entropy, then the head anew with balanced batches (Kang et al., arXiv 1910.09217)
    "crt": {},
}
SMOOTHING = "label_smoothing"  # which every loss takes, those without it above where it is given
DEFERRABLE = ("focal", "ldam", "lmf")  # whose class weights --drw can defer
SAMPLERS = ("shuffle", "balanced")
WEIGHTS = ("none", "margin", "complement", "balanced", "effective")


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """One training; what the flags of the same names say."""

    framework: str
    data: str
    image_size: int | None
    imbalance: float
    split_seed: int
    skip_unreadable: bool
    workers: int
    arch: str
    head: str
    pretrained: bool
    weights: str | None
    loss: str
    loss_options: dict[str, Any]  # the loss's arguments beside the class counts
    drw: int | None
    sampler: str
    seed: int
    out: Path
    resume: bool
    # one framework's own
    device: str | None = None
    compile: bool = False
    distributed: bool = False
    aot: str | None = None
    # of a table, where they are not those of `tables.Columns`
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    findings: tuple[str, ...] | None = None
    findings_column: str | None = None
    augment: str | None = None  # what is done to training images

    @property
    def has_findings(self) -> bool:
        """Whether an image may have several, or none, instead of one class."""
        return bool(self.findings or self.findings_column)

    def augmentation(self, epoch: int) -> Augmentation | None:
        """What changes the training images of an epoch, which is counted from 0."""
        if self.augment is None:
            return None
        return Augmentation(self.augment, self.seed, epoch, self.workers)

    @property
    def columns(self) -> tables.Columns:
        """What a table's columns are called."""
        return tables.columns(self)

    def loss_arguments(self, class_counts: Any) -> dict[str, Any]:
        """The loss's arguments, counts (C,) too; focal takes them where they have an effect.

        Of findings, whose counts are (L, 2), they are those of SigmoidLMFLoss.
        """
        options = self.loss_options
        if self.has_findings:
            return finding_losses.arguments(self.loss, class_counts, options)
        if self.loss == "la":
            options = {"alpha": 0.0, "gamma": 0.0, "class_weight": None, **options}
        unused = not (isinstance(options["class_weight"], str) or options["logit_adjustment"])
        return {
            "class_counts": None if self.loss == "focal" and unused else class_counts,
            **options,
        }

    def network_options(self) -> dict[str, Any]:
        """What every framework's networks are built with, beside their sizes."""
        return {"head": self.head, "pretrained": self.pretrained, "weights": self.weights}

    def flags(self) -> dict[str, Any]:
        """The flags that say this, but where the run is and what this machine has."""
        found = asdict(self) | self.loss_options
        if "class_weight" in self.loss_options:
            found["class_weight"] = self.loss_options["class_weight"] or "none"
        own = {"framework", "loss_options", "out", "resume", "workers"}
        if self.drw is not None:  # which sets them
            own.add("class_weight")
        if self.schedule != "step":
            own |= STEPS.keys()
        if not self.head_epochs:
            own.add("head_epochs")
        if self.findings is not None:
            found["findings"] = ",".join(self.findings)
        # None and False are what they are where not given
        return {k: v for k, v in found.items() if k not in own and v not in (None, False)}

    def trained_alike(self) -> dict[str, Any]:
        """What decides the numbers of each epoch; the rest may change when a run is resumed.

        The data are told by what they hold at which size, not by where they are.
        """
        free = ["data", "image_size", "workers", "out", "resume"]
        free += ["device", "compile", "distributed", "aot"]
        # which nothing follows on, and no rate depends on
        if not self.head_epochs and self.schedule != "cosine":
            free.append("epochs")
        values = {k: v for k, v in asdict(self).items() if k not in free}
        return json.loads(json.dumps(values))


def parse(framework: str, argv: Sequence[str] | None, summary: str) -> Settings:
    """Read the command line of ``examples.train_<framework>``; bad values end the program there."""
    program = f"python -m examples.train_{framework}"
    usage = f"{program} [flags]; -h explains them"  # all of them would hide the error's sentence
    parser = argparse.ArgumentParser(program, usage, description=summary)
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        default="digits",
        help="digits, a MedMNIST .npz, a .csv table or a folder (digits)",
    )
    add(
        "--image-size",
        type=at_least(8),
        metavar="S",
        help="images become S by S pixels (224 for files)",
    )
    add("--imbalance", type=float, default=50.0, help="digits: commonest to rarest class (50)")
    add("--split-seed", type=int, default=0, help="where the data are split here (0)")
    add("--skip-unreadable", **switch, help="leave out files that are no whole image")
    add("--workers", type=at_least(1), default=os.cpu_count(), help="threads that decode")
    add(
        "--augment",
        choices=("none", *AUGMENTATIONS),
        default="none",
        help="training images: flip, left and right (not chest X-rays, whose heart is on the "
        "left); standard, also quarter turns, small shifts and scales, brightness and contrast "
        "(for what has no up or down: skin, tissue) (none)",
    )
    tables.add_flags(parser.add_argument_group("columns of a table").add_argument)

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=TORCH_ARCHS, default="small")
    add("--head", choices=("linear", "cosine"), default="linear")
    add("--pretrained", **switch, help="start from the library's ImageNet weights")
    add("--weights", metavar="FILE", help="start from these weights")

    add = parser.add_argument_group("loss", "the paper's values where not given").add_argument
    add("--loss", choices=LOSSES, default="lmf")
    for name in (
        "alpha",
        "beta",
        "gamma",
        "max-margin",
        "scale",
        "label-smoothing",
        "logit-adjustment",
    ):
        add(f"--{name}", type=float, metavar="X", help=f"of {losses_with(name)}")
    add("--class-weight", choices=WEIGHTS, help=f"of {losses_with('class-weight')}")
    add(
        "--sampler", choices=SAMPLERS, default="shuffle", help="balanced: each class equally likely"
    )
    add("--drw", type=at_least(0), metavar="EPOCH", help="no class weights before, effective from")

    add_flags(parser)

    add = parser.add_argument_group("run").add_argument
    add("--config", type=Path, metavar="FILE", help="TOML with flags, which those here replace")
    add("--out", type=Path, metavar="DIR", help="results and checkpoints (runs/DATA-ARCH-LOSS-…)")
    add("--seed", type=at_least(0), default=0)
    add("--resume", action="store_true", help="go on where the run in DIR stopped, if there is one")
    if framework == "torch":
        add("--device", help="such as cpu, cuda, cuda:1 or mps (a GPU if there is one)")
        add("--compile", **switch, help="torch.compile the model and the loss")
    if framework == "flax":
        add("--distributed", action="store_true", help="one of several hosts: jax.distributed")
        add("--aot", metavar="TOPOLOGY", help="only compile the step for a TPU such as v5e:2x4")

    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    try:
        if args.config is not None:
            known = vars(args).keys() - {"config"}
            # those of the command line come last, and replace the file's
            args = parser.parse_args([*config.arguments(args.config, known), *argv])
        return settings_of(framework, args)
    except ValueError as error:
        parser.error(str(error))


def settings_of(framework: str, args: argparse.Namespace) -> Settings:
    """Bring the arguments together, or say which do not fit."""
    if args.pretrained and args.weights:
        raise ValueError("--pretrained and --weights exclude each other; give one of them")
    if getattr(args, "aot", None) and (args.resume or args.distributed):
        raise ValueError("--aot only compiles; leave --resume and --distributed out")
    if framework in ("flax", "keras") and args.arch not in ARCHS:
        raise ValueError(
            f"--arch must be one of {', '.join(ARCHS)}, got {args.arch}; train_torch has it"
        )
    tables.refuse_names_of_no_table(args)
    finding_losses.refuse_what_goes_by_classes(args)
    options = loss_options(args)
    recipe = recipe_of(args)
    out = args.out or Path(
        "runs", f"{Path(args.data).stem}-{args.arch}-{args.loss}-{framework}-{args.seed}"
    )
    known = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in vars(args).items() if name in known}
    chosen |= {"framework": framework, "loss_options": options, "out": out}
    chosen |= {"augment": None if args.augment == "none" else args.augment}
    return Settings(**chosen | recipe)


def loss_options(args: argparse.Namespace) -> dict[str, Any]:
    """The loss's own arguments; a flag that it has no use for is refused, not ignored."""
    options = dict(LOSSES[args.loss])
    for name in LOSSES["lmf"]:
        value = getattr(args, name)
        if value is None:
            continue
        if name not in options and name != SMOOTHING:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} belongs to {losses_with(name)}, got --loss {args.loss}")
        options[name] = None if value == "none" else value
    if args.drw is not None:
        if args.loss not in DEFERRABLE:
            raise ValueError(f"--drw belongs to {', '.join(DEFERRABLE)}, got --loss {args.loss}")
        if args.class_weight is not None:
            raise ValueError("--drw sets the class weights itself; leave --class-weight out")
        options["class_weight"] = None
    check_parameters(**{k: v for k, v in options.items() if k != "class_weight"})
    return options


def losses_with(option: str) -> str:
    """The names of the losses that have an option."""
    option = option.replace("-", "_")
    return ", ".join(name for name, has in LOSSES.items() if option in (SMOOTHING, *has))
