"""Use a trained network on new images: classes and probabilities, what it looked at, exports.

    python -m examples.predict runs/digits-small-lmf-torch-0 IMAGES --out predictions.csv
    python -m examples.predict RUN a.png b.png --explain maps
    python -m examples.predict RUN --export onnx network.onnx

RUN is the folder that a trainer of any framework has left behind. The network is that of its best
epoch, with which it was tested, and the τ that its validation images chose decides.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from examples.trained import decision, finished, frameworks, outputs
from examples.trained.decision import Rule
from examples.trained.finished import Finished
from examples.trained.images import NewImages, listed, read
from examples.training.quiet import stderr_kept_back
from examples.training.screen import bar
from examples.training.start import one_sentence

OUT = Path("predictions.csv")
INPUT = "uint8 (N, {0}, {0}, 3), RGB: the whole image squeezed to a square, bilinear, antialiased"
Network = Callable[[np.ndarray], np.ndarray]  # uint8 (N, S, S, 3) to logits float32 (N, C)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, explain and export as asked; the exit status."""
    args = parse(argv)

    # what can be refused is, before anything is computed
    with one_sentence():
        run = finished.read(args.run)
        rule = decision.of(run.result)
        paths = listed(args.images)
        check_outputs(args)
        module = frameworks.module_of(run, args.explain is not None, args.export)
        new = read(paths, run, args.skip_unreadable) if paths else None

    if new:
        with one_sentence(), stderr_kept_back():
            network = module.network(run)
        logits = predict(network, new)
        write_answers(args.out or OUT, new, logits, rule)
        if args.explain:
            explain(args.explain, run, new, logits, rule)
    if args.export:
        write = partial(module.EXPORTS[args.export], run)
        export(args.file, write, run, rule)
    return 0


# --- what is asked, and what there is


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad values end the program there."""
    usage = "python -m examples.predict RUN [IMAGES ...] [flags]; -h explains them"
    parser = argparse.ArgumentParser("python -m examples.predict", usage, description=ABOUT)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the --out folder of a trainer")
    add("images", type=Path, nargs="*", metavar="IMAGES", help="files, or folders at any depth")
    add("--out", type=Path, metavar="FILE", help=f"a row an image, as CSV ({OUT})")
    add("--explain", type=Path, metavar="DIR", help="Grad-CAM of the predicted classes, as PNG")
    add(
        "--export",
        nargs=2,
        metavar=("FORMAT", "FILE"),
        help="the network: onnx (of PyTorch, Keras), savedmodel (Keras), stablehlo (Flax)",
    )
    add("--skip-unreadable", action="store_true", help="leave out files that are no whole image")
    add("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_intermixed_args(argv)  # flags may stand between files
    args.export, file = args.export or (None, "")
    args.file = Path(file)
    if args.export not in (None, *frameworks.FORMATS):
        formats = ", ".join(frameworks.FORMATS)
        parser.error(f"--export must be one of {formats}, got {args.export}")
    if not args.images and (args.out or args.explain or not args.export):
        parser.error("IMAGES must be image files or folders of them, got none")
    return args


ABOUT = (
    "Predict new images with a finished run: the CSV has a row an image, its file, the class that "
    "the run decides for by the τ that it tuned on validation images, and the softmax of the "
    "network's logits for each class."
)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse to write over anything."""
    if args.images:
        outputs.check_new_file("--out", args.out or OUT, args.overwrite)
    if args.explain:
        outputs.check_new_folder("--explain", args.explain, args.overwrite)
    if args.export:
        if args.export == "savedmodel":
            outputs.check_new_folder("--export", args.file, overwrite=False)
        else:
            outputs.check_new_file("--export", args.file, args.overwrite)
        outputs.check_new_file("--export", outputs.beside(args.file), args.overwrite)


# --- what is done


def predict(network: Network, new: NewImages) -> np.ndarray:
    """Logits float32 (N, C)."""
    number, found = len(new.rows), []
    # the last again until it fills up the last batch, or a smaller one were compiled
    whole = np.pad(new.rows, (0, -number % new.batch_size), mode="edge")
    with bar("predicting") as move:
        for pixels in new.batches(whole):
            found.append(network(pixels))
            move(min(len(found) * new.batch_size, number), number)
    return np.concatenate(found)[:number]


def write_answers(file: Path, new: NewImages, logits: np.ndarray, rule: Rule) -> None:
    """The table, and what it says in short."""
    answers = rule.answers(logits)
    words = list(map("|".join, answers))
    outputs.write_table(file, new.paths, words, rule.probabilities(logits), rule.columns())
    counts = Counter(chain.from_iterable(answers))
    told = ", ".join(f"{name} {counts[name]}" for name in rule.class_names if counts[name])
    print(f"{len(answers)} images ({told}) in {file}")
    print(rule.sentence())


def explain(folder: Path, run: Finished, new: NewImages, logits: np.ndarray, rule: Rule) -> None:
    """A picture an image, numbered as the rows of the table."""
    from examples.trained import maps  # which imports PyTorch

    classes, number = rule.classes(logits), len(new.paths)
    titles = [rule.class_names[c] for c in classes]
    names = [f"{i:0{len(str(number))}}-{path.stem}" for i, path in enumerate(new.paths, 1)]
    with one_sentence(), stderr_kept_back():
        network = maps.network(run)
    with bar("explaining") as move:
        done = 0
        for images in new.batches(new.rows):
            part = slice(done, done + len(images))
            drawn = maps.pictures(network, images, classes[part], titles[part])
            maps.write(folder, names[part], drawn)
            done += len(images)
            move(done, number)
    print(f"{number} pictures in {folder}: Grad-CAM of the predicted class, by pytorch-grad-cam")


def export(file: Path, write: Callable[[Path], None], run: Finished, rule: Rule) -> None:
    """The network's file or folder, and beside it what goes in, what comes out, and the rule."""
    about = {
        "input": INPUT.format(run.image_size),
        "output": f"float32 (N, {run.num_classes}): logits",
        **rule.about(),
    }
    with stderr_kept_back():
        outputs.write_export(file, write, about)
    print(f"The network is in {file}, how it is used in {outputs.beside(file)}")


if __name__ == "__main__":
    sys.exit(main())
