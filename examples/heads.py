"""Compare losses on frozen features: losses × settings × seeds of a head, in one compiled program.

    python -m examples.heads --data HAM10000 --seeds 20 --out runs/heads
    python -m examples.heads --data FEATURES.npz --losses ce,la,lmf,lmf:scale=1 --head cosine

The features are those of EfficientNet-Lite0 with ImageNet's weights, or of another ``--arch`` with
``--weights FILE``; they are computed once and kept in ``--cache``. Or they are read from a file of
``X`` (N, D), ``y`` (N,) and ``split`` (N,), of train, val and test.

Each loss gets the same number of random settings: Adam's rate and penalty, the same ones for all,
and the loss's own hyper-parameters, but for those that are given. The setting with the best
validation macro-F1 after τ was tuned, as the mean over seeds of each head's best epoch, is reported
with all seeds, which differ in first weights and batches. ``DIR`` gets what `examples.compare`
leaves, and ``settings-DATA-HEAD.csv``, a line a setting; several datasets and heads may share it.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from examples import html_report
from examples.compare import names
from examples.data import features
from examples.data.features import Features
from examples.study import head_results, planning
from examples.study.head_results import Row
from examples.training import config
from examples.training.flags import at_least
from examples.training.heads import HEADS, Arrays, Recipe, Trained, orders, stack, train
from examples.training.screen import bar
from examples.training.search import draw
from examples.training.settings import LOSSES, Settings, parse
from examples.training.start import STOPPED, load_data, one_sentence

DEFAULTS = (
    "--image-size 224 --arch efficientnet_lite0 --epochs 30 --batch-size 128 --decay-epochs 10"
)
# The trainers' flags that mean something here, and those that stand beside a loss's name.
FREE = ("data", "image_size", "imbalance", "split_seed", "skip_unreadable", "workers", "arch")
FREE += ("weights", "epochs", "batch_size", "decay_epochs", "decay_factor")
FREE += ("path_column", "label_column", "split_column", "group_column")
OF_A_LOSS = ("loss", "loss_options", "sampler", "head_epochs")
FEATURE_BATCH = 32  # images
RECOMMENDED = "ldam:scale=1:logit-adjustment=1:class-weight=none"  # of LMFSpec
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Features, heads, results, page; the exit status."""
    args, flags = parsed(argv)
    with one_sentence():
        arguments = ["--data", args.data, *DEFAULTS.split(), *flags]
        settings = checked(arguments, ())
        rows = [row(text, arguments, args) for text in args.losses]
        refuse_a_study_of_these(args.out, rows)
        found = load(settings, args.cache)
        check_batches(settings, found)
        tell(found, rows, args.seeds)
        X = {name: jnp.asarray(part) for name, part in found.standardized().items()}
        begun = time.perf_counter()
        trained = train_all(found, X, rows, args.seeds)
        seconds = time.perf_counter() - begun
        print(f"Trained in {seconds:.0f} s.")
        command = shlex.join(["python", "-m", "examples.heads", *words(args), *flags])
        study = head_results.write(
            args.out, command, found, X, list(zip(rows, trained, strict=True)), seconds
        )
        html_report.tell(study)
    return 0


# --- what is asked for


def parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the trainers'."""
    parser = argparse.ArgumentParser(
        "python -m examples.heads",
        "python -m examples.heads [flags] [flags of the trainers]; -h explains them",
        description=__doc__.split("\n")[0],
        epilog=f"Flags of python -m examples.train_torch: {', '.join(map(flag, FREE[1:]))}. "
        f"Where not given: {DEFAULTS}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", default="digits", help="as the trainers', or FEATURES.npz (digits)")
    add(
        "--losses",
        type=names("loss", LOSSES, options=True),
        default=[*LOSSES, RECOMMENDED],
        metavar="L,L:FLAG=VALUE,…",
        help=f"of {','.join(LOSSES)} (all, and {RECOMMENDED}); what is given is not tuned",
    )
    add("--seeds", type=at_least(1), default=20, metavar="N", help="from 0 to N-1 (20)")
    add("--settings", type=at_least(1), default=12, metavar="N", help="of each loss (12)")
    add("--head", choices=HEADS, default="linear", help="(linear); mlp has a hidden layer of 64")
    add("--cache", type=Path, default=Path("runs/features"), metavar="DIR", help="of features")
    add("--out", type=Path, default=Path("runs/heads"), metavar="DIR", help="(runs/heads)")
    args, flags = parser.parse_known_args(argv)
    config.refuse(parser, flags)
    return args, flags


def flag(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def checked(arguments: Sequence[str], allowed: Sequence[str]) -> Settings:
    """The trainers' settings; a flag that has no use here is refused, not ignored."""
    settings, default = parse("torch", arguments, ""), parse("torch", (), "")
    for name in (field.name for field in fields(Settings)):
        value = getattr(settings, name)
        if name not in (*FREE, *allowed, "out") and value != getattr(default, name):
            raise ValueError(
                f"heads take of the trainers' flags {', '.join(map(flag, FREE))}, and of a loss's "
                f"those beside its name, as lmf:scale=1, got {flag(name)} {value}"
            )
    return settings


def row(text: str, arguments: Sequence[str], args: argparse.Namespace) -> Row:
    """A loss, and so many settings of it."""
    name, *options = text.split(":")
    flags = [f"--{option}" for option in options]
    settings = checked([*arguments, "--loss", name, *flags], OF_A_LOSS)
    base = checked([*arguments, "--loss", name], OF_A_LOSS)
    if replace(settings, **{k: getattr(base, k) for k in OF_A_LOSS}) != base:
        raise ValueError(
            f"a loss may have hyper-parameters and a sampler of its own, got {text}; "
            "give the rest for all losses"
        )
    fixed = [option.partition("=")[0].replace("-", "_") for option in options]
    arch = "features" if features.is_features(settings.data) else settings.arch
    tried = draw(name, fixed, args.settings)
    return Row(text, (*arguments, *flags), settings, arch, args.head, tuple(tried))


def words(args: argparse.Namespace) -> list[str]:
    """The command's own flags, as they are typed."""
    chosen = vars(args) | {"losses": ",".join(args.losses)}
    return [word for name, value in chosen.items() for word in (flag(name), str(value))]


def refuse_a_study_of_these(folder: Path, rows: Sequence[Row]) -> None:
    """Results are not written over.

    Raises:
        FileExistsError: the folder holds one of these heads.
    """
    if not (folder / "study.json").exists():
        return
    held = {training.name for training in planning.read(folder).trainings}
    for each in rows:
        if (name := each.training({}, seed=0).name) in held:
            raise FileExistsError(f"{folder} holds {name} already; another --out keeps it")


def load(settings: Settings, cache: Path) -> Features:
    """The features that ``--data`` names, or those of its images."""
    if features.is_features(settings.data):
        return features.read(Path(settings.data))
    from examples.models.frozen import feature_network  # PyTorch's, which a file does without

    network, about = feature_network(settings.arch, settings.image_size, settings.weights)
    dataset = load_data(settings)
    for note in dataset.notes:
        print(note)
    with bar("features") as move:
        return features.of_images(
            dataset, network, about, cache, batch_size=FEATURE_BATCH, on_progress=move
        )


def check_batches(settings: Settings, found: Features) -> None:
    """Raise ValueError for batches that are larger than the training split."""
    if settings.batch_size > (examples := len(found.labels("train"))):
        raise ValueError(
            f"batch_size must be at most the {examples} training examples, "
            f"got {settings.batch_size}"
        )


def tell(found: Features, rows: Sequence[Row], seeds: int) -> None:
    """Say what is trained on what."""
    sizes = zip(found.class_names, found.class_counts, strict=True)
    counts = ", ".join(f"{name} {count}" for name, count in sizes)
    size = {name: len(found.labels(name)) for name in ("train", "val", "test")}
    print(f"{found.name}: {size['train']} × {found.X.shape[1]} training features ({counts})")
    print(f"{size['val']} to choose settings and epochs, {size['test']} to test")
    settings = len(rows[0].tried)
    print(
        f"{len(rows) * settings * seeds} {rows[0].head} heads: {len(rows)} losses, "
        f"{settings} settings of each, {seeds} seeds"
    )


# --- training


def train_all(
    found: Features, X: dict[str, Array], rows: Sequence[Row], seeds: int
) -> list[Trained]:
    """Every loss's heads, in its settings' order, under a bar."""
    settings, labels = rows[0].settings, {name: jnp.asarray(found.labels(name)) for name in X}
    arrays = Arrays(X["train"], labels["train"], X["val"], labels["val"])
    places: dict[str, list[int]] = {}  # of the losses by sampler, since batches are shared
    for place, each in enumerate(rows):
        places.setdefault(each.sampler, []).append(place)
    groups, counts = [], found.class_counts
    for sampler, members in places.items():
        losses = [loss for i in members for loss in rows[i].losses(counts)]
        tried = [setting for i in members for setting in rows[i].tried]
        size = {"epochs": settings.epochs, "batch_size": settings.batch_size}
        order = orders(found.labels("train"), seeds, sampler=sampler, **size)
        groups.append((stack(losses, tried), order))
    rates = [settings.learning_rate_at(epoch) for epoch in range(settings.epochs)]
    total, done = len(groups) * seeds * settings.epochs, count(1)
    try:
        with bar(f"{rows[0].head} heads") as move:
            recipe = Recipe(
                rows[0].head,
                len(counts),
                tuple(rate / rates[0] for rate in rates),
                on_epoch=lambda: move(next(done), total),
            )
            trained = interruptible(lambda: jax.block_until_ready(train(arrays, groups, recipe)))
    except KeyboardInterrupt:
        print("Stopped; the features are kept, the heads begin anew.", flush=True)
        os._exit(STOPPED)  # the compiled code runs on, and aborts a Python that ends in good order
    found_of = {}
    for members, heads in zip(places.values(), trained, strict=True):
        for i, place in enumerate(members):
            mine = slice(i * len(rows[0].tried), (i + 1) * len(rows[0].tried))
            found_of[place] = jax.tree.map(lambda leaf, mine=mine: leaf[:, mine], heads)
    return [found_of[place] for place in range(len(rows))]


def interruptible(function: Callable[[], T]) -> T:
    """What a function returns; Ctrl-C is heard at once, though compiled code runs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result()


if __name__ == "__main__":
    sys.exit(main())
