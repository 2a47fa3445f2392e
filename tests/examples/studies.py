"""Studies that were never trained: plans with result files of known scores."""

import numpy as np

from examples.study import planning
from examples.training import results

NAMES, COUNTS = ("vein", "mole", "wart"), (30, 600, 5)
TEST = 60  # images


def logits_with(labels, accuracy, rng):
    """Logits float32 (N, C) of which a share has its largest value at the label."""
    logits = rng.normal(size=(len(labels), len(NAMES)))
    best = np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(0, 3, len(labels)))
    logits[np.arange(len(labels)), best] += 4
    return logits.astype(np.float32)


def write(folder, training, test, logits=None, labels=None, val_logits=None):
    """What a trainer leaves behind of one training; without logits what an old one kept in git."""
    out = folder / "runs" / training.name
    out.mkdir(parents=True)
    settings = training.settings()
    about = settings.trained_alike()
    loss = {"name": about.pop("loss"), **about.pop("loss_options"), "drw": about.pop("drw")}
    tuned = {}
    if logits is not None:
        (out / "checkpoints").mkdir()
        ids = np.array([f"test-{i}" for i in range(len(labels))])
        kept = {"val_labels": labels, "val_logits": val_logits}
        results.write_predictions(out / "predictions.npz", ids, labels, logits, **kept)
        tuned = {"tuned": results.tuned(labels, logits, class_counts=COUNTS, **kept)}
    data = {"name": training.data, "image_size": 28, "class_names": NAMES, "class_counts": COUNTS}
    content = {
        "data": data | {"train": 635, "val": 60, "test": TEST},
        "loss": loss,
        "epochs": settings.epochs,
        **about,
        "best_validation": {"macro_f1": 0.5, "epoch": 2},
        "test": test,
        **tuned,
        "measured": {"images_per_second": 50.0, "peak_memory_bytes": 2**30},
        "device": "a made-up CPU, 2 cores",
        "versions": {"python": "3.11.7", training.framework: "1.2.3"},
    }
    results.write_json(out / "result.json", content)
    (out / "seconds.json").write_text("75.0")


def made_up(folder, losses, *, seeds=5, data=("digits",), frameworks=("torch",), scores=None):
    """A finished study.

    Args:
        scores: macro-F1 of each loss, one value a seed, which have no predictions; by default they
            come from logits that find more of the labels the later the loss is listed.
    """
    trainings = planning.plan(data, ["small"], frameworks, losses, seeds, ["--epochs", "3"])
    planned = planning.remember(folder, "python -m examples.compare", trainings)
    labels = np.arange(TEST) % len(NAMES)
    for training in trainings:
        place = losses.index(training.loss)
        rng = np.random.default_rng([training.seed, place, len(training.name)])
        logits = logits_with(labels, 0.4 + 0.1 * place, rng)
        test = results.scores(labels, logits)
        if scores:
            test["macro_f1"] = scores[training.loss][training.seed]
            write(folder, training, test)
        else:
            val_logits = logits_with(labels, 0.4 + 0.1 * place, rng)
            write(folder, training, test, logits, labels, val_logits)
    return planned
