"""Other packages' losses beside ours and the exact numbers, written to docs/other-losses.md.

    nox -s peers

``AGREEMENTS`` are shared inputs on which the definitions coincide. ``ROWS`` are cases in which a
peer is off: each measures the exact number (``tests.exact``), ours and the peer's, in float32.
"""

import argparse
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path

import numpy as np

from tests.exact import exact_terms
from tests.frameworks import load

PAGE = Path(__file__).parents[2] / "docs" / "other-losses.md"
BEGIN = "<!-- measured and written by `nox -s peers` -->\n"
END = "<!-- end of what `nox -s peers` writes -->\n"
VERSIONS = "Measured with "
PACKAGES = ("torch", "torchvision", "kornia", "monai", "optax", "keras", "tensorflow")


# --- each framework: logits in, value and gradient out, as NumPy


def by_torch(loss, z, dtype="float32"):
    """Value of ``loss(logits)`` and gradient of its elements' weighted sum."""
    torch = load("torch")
    z = torch.tensor(z, dtype=getattr(torch, dtype), requires_grad=True)
    value = loss(z)
    (value * torch.tensor(upstream(value.shape))).sum().backward()
    return value.detach().numpy(), z.grad.numpy()


def by_jax(loss, z, dtype="float32"):
    """The same."""
    jax = load("jax")
    with jax.enable_x64(dtype == "float64"):
        z = jax.numpy.asarray(z, dtype)
        value = loss(z)
        grad = jax.grad(lambda z: (loss(z) * upstream(value.shape)).sum())(z)
        return np.asarray(value), np.asarray(grad)


def by_keras(loss, z, dtype="float32"):
    """The same, of ``loss(logits)`` on TensorFlow."""
    tf = load("tensorflow")
    z = tf.Variable(np.asarray(z, dtype))
    with tf.GradientTape() as tape:
        value = loss(z)
        total = tf.reduce_sum(value * upstream(tuple(value.shape)).astype(dtype))
    return value.numpy(), tape.gradient(total, z).numpy()


def values(run, z, *losses):
    """The value of each of these losses."""
    return [run(loss, z)[0] for loss in losses]


def upstream(shape):
    """Another weight for each element, so that no gradient can take another's place."""
    size = math.prod(shape)
    return (1 + np.arange(size) / size).reshape(shape)


# --- where the definitions coincide


RNG = np.random.default_rng(0)
Z, Y = RNG.normal(0, 1, (6, 3)), np.array([0, 1, 2, 2, 1, 0])
PIXELS, PIXEL_LABELS = RNG.normal(0, 1, (2, 3, 4, 5)), RNG.integers(0, 3, (2, 4, 5))
NO_MARGINS = np.zeros(3)
IGNORED = np.where(np.arange(6) % 3 == 1, -100, Y)
SOFT = RNG.dirichlet([1] * 3, 6)
X, T = RNG.normal(0, 2, (6, 3)), RNG.integers(0, 2, (6, 3)).astype(np.float64)
P = RNG.uniform(0, 1, (6, 3))
W = np.array([0.5, 1.0, 3.0])
GAMMAS = (0.0, 0.5, 2.0)
NONE = {"reduction": "none"}


@dataclass(frozen=True)
class Pair:
    """One call of a peer's loss and of ours, as functions of the logits, that must be equal."""

    case: str
    run: Callable
    logits: np.ndarray
    ours: Callable
    theirs: Callable


# Of value and gradient, relative to the largest entry; MONAI computes in float32 whatever comes.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
AGREEMENTS = {}


def agrees(package, loss, dtype="float64"):
    """Register a generator of pairs under the peer's names in the page."""

    def register(pairs):
        AGREEMENTS[package, loss] = pairs, dtype
        return pairs

    return register


def disagreement(pair, dtype):
    """The largest error of value or gradient, relative to the peer's largest entry."""
    ours, theirs = (pair.run(loss, pair.logits, dtype) for loss in (pair.ours, pair.theirs))
    assert [part.shape for part in ours] == [part.shape for part in theirs], pair.case
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@agrees("PyTorch", "cross_entropy")
def torch_cross_entropy():
    """LDAM without margins, at scale 1."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    inputs = {
        "labels": (Z, Y, {}),
        "ignored labels": (Z, IGNORED, {}),
        "pixels": (PIXELS, PIXEL_LABELS, {}),
        "smoothed": (Z, IGNORED, {"label_smoothing": 0.1}),
    }
    for (name, (z, y, options)), reduction, weight in product(
        inputs.items(), ("none", "sum", "mean"), (None, torch.tensor(W))
    ):
        options = options | {"target": torch.tensor(y), "reduction": reduction}
        yield Pair(
            f"{name}, {reduction}, weight {weight}",
            by_torch,
            z,
            partial(
                losses.ldam_loss, margins=NO_MARGINS, class_weight=weight, scale=1.0, **options
            ),
            partial(torch.nn.functional.cross_entropy, weight=weight, **options),
        )
    options = {"target": torch.tensor(SOFT), "label_smoothing": 0.1}
    yield Pair(
        "distributions",
        by_torch,
        Z,
        partial(losses.ldam_loss, margins=NO_MARGINS, scale=1.0, **options),
        partial(torch.nn.functional.cross_entropy, **options),
    )


@agrees("PyTorch", "nll_loss")
def torch_nll_loss():
    """Focal without focusing; its sums, since the focal term's mean is over N."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    for reduction, weight in product(("none", "sum"), (None, torch.tensor(W))):
        options = {"target": torch.tensor(IGNORED), "reduction": reduction}

        def theirs(z, weight=weight, options=options):
            return torch.nn.functional.nll_loss(z.log_softmax(1), weight=weight, **options)

        yield Pair(
            f"{reduction}, weight {weight}",
            by_torch,
            Z,
            partial(losses.focal_loss, class_weight=weight, gamma=0.0, **options),
            theirs,
        )


def sigmoid_focal(losses, gamma, alpha, **options):
    """Our sigmoid form without its LDAM term, alpha_t as class weights."""
    weight = None if alpha is None else [1 - alpha, alpha]
    return partial(
        losses.sigmoid_lmf_loss,
        margins=[0.0, 0.0],
        class_weight=weight,
        alpha=0.0,
        beta=1.0,
        gamma=gamma,
        **options,
    )


@agrees("torchvision", "sigmoid_focal_loss")
def torchvision_sigmoid_focal_loss():
    torch, losses, ops = load("torch"), load("lmf_multi.torch"), load("torchvision.ops")
    t = torch.tensor(T)
    for gamma, alpha, reduction in product(GAMMAS, (0.25, None), ("none", "sum", "mean")):
        yield Pair(
            f"gamma {gamma}, alpha {alpha}, {reduction}",
            by_torch,
            X,
            sigmoid_focal(losses, gamma, alpha, target=t, reduction=reduction),
            partial(
                ops.sigmoid_focal_loss,
                targets=t,
                gamma=gamma,
                alpha=-1 if alpha is None else alpha,
                reduction=reduction,
            ),
        )


@agrees("kornia", "focal_loss")
def kornia_focal_loss():
    torch, losses, kornia = load("torch"), load("lmf_multi.torch"), load("kornia.losses")
    y = torch.tensor(PIXEL_LABELS)
    for gamma, alpha in product(GAMMAS, (0.25, None)):
        alpha_t = torch.ones(3) if alpha is None else torch.tensor([1 - alpha, alpha, alpha])
        weight = torch.tensor(W)

        def theirs(z, gamma=gamma, alpha=alpha, weight=weight):
            return kornia.focal_loss(z, y, alpha, gamma, weight=weight).sum(1)

        yield Pair(
            f"gamma {gamma}, alpha {alpha}",
            by_torch,
            PIXELS,
            partial(
                losses.focal_loss, target=y, class_weight=alpha_t * weight, gamma=gamma, **NONE
            ),
            theirs,
        )


@agrees("kornia", "binary_focal_loss_with_logits")
def kornia_binary_focal_loss():
    torch, losses, kornia = load("torch"), load("lmf_multi.torch"), load("kornia.losses")
    for t, gamma, alpha in product((torch.tensor(T), torch.tensor(P)), GAMMAS, (0.25, None)):
        yield Pair(
            f"gamma {gamma}, alpha {alpha}",
            by_torch,
            X,
            sigmoid_focal(losses, gamma, alpha, target=t, **NONE),
            partial(kornia.binary_focal_loss_with_logits, target=t, alpha=alpha, gamma=gamma),
        )


def monai_softmax(gamma, y, **options):
    """MONAI's loss of integer labels, of the logits alone."""
    options = {"use_softmax": True, "to_onehot_y": True, **options}
    return partial(load("monai.losses").FocalLoss(gamma=gamma, **options), target=y[:, None])


@agrees("MONAI", "FocalLoss", "float32")
def monai_focal_loss():
    torch, losses, monai = load("torch"), load("lmf_multi.torch"), load("monai.losses")
    y, t = torch.tensor(PIXEL_LABELS), torch.tensor(T)
    for gamma, alpha in product(GAMMAS, (0.25, None)):
        alpha_t = torch.ones(3) if alpha is None else torch.tensor([1 - alpha, alpha, alpha])
        softmax = monai_softmax(gamma, y, alpha=alpha, weight=W, **NONE)

        def theirs(z, softmax=softmax):
            return softmax(z).sum(1)

        weight = alpha_t * torch.tensor(W)
        yield Pair(
            f"softmax, gamma {gamma}, alpha {alpha}",
            by_torch,
            PIXELS,
            partial(losses.focal_loss, target=y, class_weight=weight, gamma=gamma, **NONE),
            theirs,
        )
        yield Pair(
            f"sigmoid, gamma {gamma}, alpha {alpha}",
            by_torch,
            X,
            sigmoid_focal(losses, gamma, alpha, target=t, **NONE),
            partial(monai.FocalLoss(gamma=gamma, alpha=alpha, **NONE), target=t),
        )


@agrees("optax", "softmax_cross_entropy")
def optax_softmax_cross_entropy():
    optax, losses = load("optax"), load("lmf_multi.jax")
    for q in (SOFT, np.eye(3)[Y]):
        ours = partial(losses.focal_loss, labels=q, gamma=0.0)
        yield Pair("labels", by_jax, Z, ours, partial(optax.softmax_cross_entropy, labels=q))


@agrees("optax", "softmax_cross_entropy_with_integer_labels")
def optax_cross_entropy_with_integer_labels():
    optax, losses = load("optax"), load("lmf_multi.jax")
    for where in (None, np.arange(6) % 3 != 1):
        options = {"labels": Y, "where": where}
        theirs = partial(optax.softmax_cross_entropy_with_integer_labels, **options)
        ours = partial(losses.focal_loss, gamma=0.0, **options)
        yield Pair(f"where {where}", by_jax, Z, ours, theirs)


@agrees("optax", "sigmoid_focal_loss")
def optax_sigmoid_focal_loss():
    optax, losses = load("optax"), load("lmf_multi.jax")
    for gamma, alpha in product(GAMMAS, (0.25, None)):
        options = {"labels": T, "gamma": gamma, "alpha": alpha}
        yield Pair(
            f"gamma {gamma}, alpha {alpha}",
            by_jax,
            X,
            sigmoid_focal(losses, gamma, alpha, labels=T),
            partial(optax.sigmoid_focal_loss, **options),
        )


@agrees("Keras", "CategoricalFocalCrossentropy")
def keras_categorical_focal_crossentropy():
    keras, losses = load("keras"), load("lmf_multi.keras")
    options = {"reduction": "sum_over_batch_size", "dtype": "float64"}
    for gamma, smoothing in product(GAMMAS, (0.0, 0.1)):
        theirs = keras.losses.CategoricalFocalCrossentropy(
            list(W), gamma, from_logits=True, label_smoothing=smoothing, **options
        )
        ours = losses.FocalLoss(gamma=gamma, class_weight=W, label_smoothing=smoothing, **options)
        name, q = f"gamma {gamma}, smoothing {smoothing}", np.eye(3)[Y]
        yield Pair(name, by_keras, Z, partial(ours, q), partial(theirs, q))


@agrees("Keras", "SparseCategoricalCrossentropy")
def keras_sparse_categorical_crossentropy():
    keras, losses = load("keras"), load("lmf_multi.keras")
    for reduction, ignore_class in product(("none", "sum", "sum_over_batch_size"), (None, 2)):
        options = {"ignore_class": ignore_class, "reduction": reduction, "dtype": "float64"}
        theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)
        ours = losses.FocalLoss(gamma=0.0, **options)
        name = f"{reduction}, ignore_class {ignore_class}"
        yield Pair(name, by_keras, Z, partial(ours, Y), partial(theirs, Y))


# --- where they do not, or should not


@dataclass(frozen=True)
class Row:
    """One line of the page's table."""

    case: str
    peer: str
    symptom: str  # where the peer is off
    measure: Callable  # -> the exact number or None where there is none, ours, theirs


ROWS = []


def row(case, peer, symptom):
    """Register what measures the numbers of one line."""

    def register(measure):
        ROWS.append(Row(case, peer, symptom, measure))
        return measure

    return register


def exact_focal(z, j, gamma):
    """Value of one example's focal loss and its gradient; cross-entropy for gamma 0."""
    _, value, _, grad = exact_terms(z, j, 0.0, gamma, 1.0)
    return value, grad


@row(
    "An easy example: its logit 20 above those of two other classes, γ = 0.5; gradient for it",
    "MONAI `FocalLoss`, softmax",
    "one such example makes every weight of the model NaN",
)
def easy_example():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y = [[20.0, 0.0, 0.0]], torch.tensor([0])
    return (
        exact_focal(z[0], 0, 0.5)[1][0],
        by_torch(partial(losses.focal_loss, target=y, gamma=0.5), z)[1][0, 0],
        by_torch(monai_softmax(0.5, y, reduction="sum"), z)[1][0, 0],
    )


@row(
    "An easy positive of the sigmoid form, at logit 20, γ = 0.5; gradient",
    "torchvision `sigmoid_focal_loss`",
    "the same",
)
def easy_positive():
    torch, losses, ops = load("torch"), load("lmf_multi.torch"), load("torchvision.ops")
    x, t = [20.0], torch.ones(1)
    return (
        exact_focal([0.0, 20.0], 1, 0.5)[1][1],
        by_torch(sigmoid_focal(losses, 0.5, None, target=t), x)[1][0],
        by_torch(partial(ops.sigmoid_focal_loss, targets=t, alpha=-1, gamma=0.5), x)[1][0],
    )


@row(
    "A hard example: its logit 16 below those of two other classes, γ = 2; gradient for it",
    "Keras `CategoricalFocalCrossentropy`",
    "probabilities are clipped, so what is most wrong is not learned",
)
def hard_example():
    keras, losses = load("keras"), load("lmf_multi.keras")
    z, q = [[-16.0, 0.0, 0.0]], np.eye(3, dtype="float32")[[0]]
    theirs = keras.losses.CategoricalFocalCrossentropy(1.0, 2.0, from_logits=True)
    return (
        exact_focal(z[0], 0, 2.0)[1][0],
        by_keras(partial(losses.FocalLoss(gamma=2.0), q), z)[1][0, 0],
        by_keras(partial(theirs, q), z)[1][0, 0],
    )


@row(
    "Logits (1, 0), class 0, its weight 3, γ = 2; loss",
    "the common `(1 - exp(-ce))**2 * ce` with PyTorch's weighted `ce`",
    "p comes from the weighted `ce`: an easy example with a large weight looks hard",
)
def weighted_probability():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y, w = [[1.0, 0.0]], torch.tensor([0]), torch.tensor([3.0, 1.0])

    def theirs(z):
        ce = torch.nn.functional.cross_entropy(z, y, w, reduction="none")
        return (1 - torch.exp(-ce)) ** 2 * ce

    return (
        3 * exact_focal(z[0], 0, 2.0)[0],
        by_torch(partial(losses.focal_loss, target=y, class_weight=w, gamma=2.0), z)[0],
        by_torch(theirs, z)[0][0],
    )


@row(
    "Logits (4, 0) and (-4, 0), both of class 0, γ = 2; mean loss",
    "the same with PyTorch's mean `ce`",
    "one factor for the whole batch: the hard example is not told from the easy one",
)
def focal_of_the_mean():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y = [[4.0, 0.0], [-4.0, 0.0]], torch.tensor([0, 0])

    def theirs(z):
        ce = torch.nn.functional.cross_entropy(z, y)
        return (1 - torch.exp(-ce)) ** 2 * ce

    ours = partial(losses.focal_loss, target=y, gamma=2.0)
    exact = np.mean([exact_focal(row, 0, 2.0)[0] for row in z])
    return exact, *values(by_torch, z, ours, theirs)


@row(
    "Logits (1, 0) twice, classes 0 and 1 as one-hot, weights 1 and 9; weighted mean, γ = 0",
    "PyTorch `cross_entropy`",
    "divided by N, where the same labels as integers are divided by Σw",
)
def one_hot_mean():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, q, w = [[1.0, 0.0], [1.0, 0.0]], torch.eye(2), torch.tensor([1.0, 9.0])
    each = [exact_focal(z[j], j, 0.0)[0] for j in (0, 1)]
    ours = partial(losses.ldam_loss, target=q, margins=[0.0, 0.0], class_weight=w, scale=1.0)
    theirs = partial(torch.nn.functional.cross_entropy, target=q, weight=w)
    return (1 * each[0] + 9 * each[1]) / (1 + 9), *values(by_torch, z, ours, theirs)


@row(
    "Logits (2, 0, 0), class 1, γ = 0; mean loss",
    "MONAI `FocalLoss`, softmax",
    "divided by the number of classes too: no cross-entropy at γ = 0",
)
def mean_over_classes():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y = [[2.0, 0.0, 0.0]], torch.tensor([1])
    ours = partial(losses.focal_loss, target=y, gamma=0.0)
    return exact_focal(z[0], 1, 0.0)[0], *values(by_torch, z, ours, monai_softmax(0.0, y))


@row(
    "The same beside an ignored example; mean loss",
    "kornia `focal_loss`",
    "divided by classes and by ignored examples too",
)
def mean_over_ignored():
    torch, losses, kornia = load("torch"), load("lmf_multi.torch"), load("kornia.losses")
    z, y = [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], torch.tensor([1, -100])
    ours = partial(losses.focal_loss, target=y, gamma=0.0)
    theirs = partial(kornia.focal_loss, target=y, alpha=None, gamma=0.0, reduction="mean")
    return exact_focal(z[0], 1, 0.0)[0], *values(by_torch, z, ours, theirs)


@row(
    "All examples ignored, γ = 0; mean loss",
    "PyTorch `cross_entropy`",
    "one crop without labels ends the training",
)
def all_ignored():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y = [[2.0, 0.0]], torch.tensor([-100])
    ours = partial(losses.ldam_loss, target=y, margins=[0.0, 0.0], scale=1.0)
    theirs = partial(torch.nn.functional.cross_entropy, target=y)
    return 0.0, *values(by_torch, z, ours, theirs)


@row(
    "An ignored example whose logits are NaN; gradient for them",
    "PyTorch `cross_entropy`",
    "what is to be ignored reaches every weight",
)
def ignored_nan():
    torch, losses = load("torch"), load("lmf_multi.torch")
    z, y = [[2.0, 0.0], [np.nan, np.nan]], torch.tensor([0, -100])
    ours = partial(losses.ldam_loss, target=y, margins=[0.0, 0.0], scale=1.0)
    theirs = partial(torch.nn.functional.cross_entropy, target=y)
    return 0.0, by_torch(ours, z)[1][1, 0], by_torch(theirs, z)[1][1, 0]


@row(
    "Logits (1, 0, -∞), the third class ruled out, class 1 as one-hot, γ = 0; loss",
    "optax `softmax_cross_entropy`",
    "0 times ∞ is added",
)
def impossible_class():
    optax, losses = load("optax"), load("lmf_multi.jax")
    z, q = [[1.0, 0.0, -np.inf]], np.eye(3, dtype=np.float32)[[1]]
    return (
        exact_focal([1.0, 0.0], 1, 0.0)[0],
        by_jax(partial(losses.focal_loss, labels=q, gamma=0.0), z)[0][0],
        by_jax(partial(optax.softmax_cross_entropy, labels=q), z)[0][0],
    )


@row(
    "Label -1, a class that does not exist, under `jit`, γ = 0; loss",
    "optax `softmax_cross_entropy_with_integer_labels`",
    "taken for the last class, so padding is learned",
)
def no_such_class():
    jax, optax, losses = load("jax"), load("optax"), load("lmf_multi.jax")
    z, y = [[1.0, 0.0]], np.array([-1])
    ours = partial(losses.focal_loss, labels=y, gamma=0.0)
    theirs = partial(optax.softmax_cross_entropy_with_integer_labels, labels=y)
    return None, *(by_jax(jax.jit(loss), z)[0][0] for loss in (ours, theirs))


# --- the table


def number(x):
    """Three digits, which rounding in another version does not change."""
    if x is None:
        return "none"
    return "NaN" if np.isnan(x) else f"{float(x) + 0.0:.3g}"


def right(x, exact, rtol):
    """Whether a number is the exact one; NaN is where there is none."""
    return bool(np.isnan(x) if exact is None else np.isclose(x, exact, rtol=rtol, atol=0))


def table():
    """The lines that stand in the page between the markers."""
    lines = [
        "| case, in float32 | exact | here | there | what happens there |",
        "|---|---|---|---|---|",
    ]
    for each in ROWS:
        exact, ours, theirs = each.measure()
        meaning = "right in this version" if right(theirs, exact, 1e-3) else each.symptom
        lines.append(
            f"| {each.case} | {number(exact)} | {number(ours)} "
            f"| {each.peer}: **{number(theirs)}** | {meaning} |"
        )
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    agreeing = [
        names
        for names, (pairs, dtype) in AGREEMENTS.items()
        if all(disagreement(pair, dtype) <= TOLERANCES[dtype] for pair in pairs())
    ]
    equal = (
        f"{package} {', '.join(f'`{loss}`' for _, loss in names)}"
        for package, names in groupby(agreeing, key=lambda names: names[0])
    )
    return [
        f"Equal, value and gradient, where the definitions coincide: {'; '.join(equal)}.",
        "",
        *lines,
        "",
        f"{VERSIONS}{', '.join(versions)}.",
    ]


def in_page():
    """The lines that do stand there."""
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()


def without_versions(lines):
    """What must be reproduced with whichever versions are installed."""
    return [line for line in lines if not line.startswith(VERSIONS)]


def write(lines):
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the page's table")
    measured = table()
    print("\n".join(measured))
    if parser.parse_args().write:
        write(measured)
