r"""Train an image classifier on imbalanced data with Keras, on TensorFlow, JAX or PyTorch.

    python -m examples.train_keras
    python -m examples.train_keras --data HAM10000 --image-size 64 --learning-rate 1e-3 \
        --epochs 30 --decay-epochs 10
    KERAS_BACKEND=jax python -m examples.train_keras --data HAM10000 --arch resnet50 --bf16

The second, for 6,308 training images of HAM10000, took 4 to 14 minutes in a thread of an AMD EPYC
that other work shared (November 2026): test macro-F1 0.593 and 0.561 for seeds 0 and 1; with
``--loss ce`` 0.601 and 0.541. On a GPU or TPU: not measured.

TensorFlow is the backend unless KERAS_BACKEND is another. All GPUs or TPU cores of the machine
share each batch, on TensorFlow and JAX. ``model.keras`` in the best epoch's folder of checkpoints
is a model from pixels to logits: after ``import lmf_multi.keras``, ``keras.models.load_model``
opens it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.data.datasets import Split
from examples.data.findings import UNKNOWN
from examples.training.quiet import stderr_kept_back
from examples.training.run import Run
from examples.training.settings import Settings, parse
from examples.training.start import claim, load_data, one_sentence
from lmf_multi import class_weights, deferred_weights

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with stderr_kept_back():
    import keras
    from keras import ops

    from examples.models import keras as models
    from examples.training import keras_devices
    from examples.training.losses_keras import CrossEntropy, FocalInParts, LMFInParts
    from examples.training.recipe_keras import (
        averaged,
        build_optimizer,
        check_devices,
        in_parts,
        rates,
    )
    from lmf_multi.keras import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss


def main(argv: Sequence[str] | None = None) -> int:
    """Train, choose the epoch, test; the exit status."""
    settings = parse("keras", argv, __doc__.split("\n")[0])

    # data
    with one_sentence():
        if not claim(settings):
            return 0
        dataset = load_data(settings)
        run = Run(settings, dataset)

    # model, loss, optimiser
    with one_sentence(), stderr_kept_back():
        keras.utils.set_random_seed(settings.seed)  # seeks TensorFlow whatever the backend
    # variables belong to the devices that are shared out where they are made
    with one_sentence(), keras_devices.shared(settings.batch_size, settings.accumulate):
        check_devices(settings)
        keras.mixed_precision.set_global_policy("mixed_bfloat16" if settings.bf16 else "float32")
        model = models.build(
            settings.arch,
            len(dataset.class_names),
            dataset.image_size,
            **settings.network_options(),
        )
        keras_devices.normalize_whole_batches(model)
        criterion = build_loss(settings, dataset.class_counts)
        folder = run.resume()
        training, state = begun(model, criterion, settings, run.head_alone)
        if folder:
            model.load_weights(folder / "model.keras")
            load(folder, state)

    # step: that of fit, which compiles it, of each part of a batch
    def class_weight() -> np.ndarray | None:
        if settings.drw is not None:  # which the loss may not have yet: batches are read ahead
            return deferred_weights(dataset.class_counts, run.epoch, settings.drw)
        return criterion.class_weight

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        return in_parts(run.train_batches(), settings.accumulate, class_weight)

    callbacks = [
        rates(run),
        Steps(run),
    ]
    if settings.drw is not None:
        callbacks.append(DeferredReweighting(dataset.class_counts, settings.drw))

    def predict(split: Split) -> np.ndarray:
        """Logits (N, C) of a split in its order."""
        batch, rows = settings.batch_size, split.whole_batches(settings.batch_size)
        batches = ((images,) for images, _ in split.batches(rows, batch))
        return training.predict(batches, steps=len(rows) // batch, verbose=0)[: len(split)]

    def write(folder: Path) -> None:
        with averaged(training):
            model.save(folder / "model.keras")
        np.savez(folder / "training.npz", *map(ops.convert_to_numpy, state))

    # loop
    with run:
        while not run.done:
            if run.head_is_next():
                model.load_weights(run.begin_head() / "model.keras")
                keras.utils.set_random_seed(settings.seed)
                draw_anew(model.layers[-1])
                with keras_devices.shared_with(model):
                    training, state = begun(model, criterion, settings, run.head_alone)
            # one epoch: validation, checkpoints and the choice of the best are the run's, as in the
            # other trainers
            training.fit(
                keras_devices.feed(
                    batches,
                    settings.batch_size // settings.accumulate,
                    dataset.image_size,
                    label=run.label(),
                    weighted=settings.accumulate > 1,
                ),
                steps_per_epoch=(run.steps - run.step) * settings.accumulate,
                initial_epoch=run.epoch,
                epochs=run.epoch + 1,
                shuffle=False,  # run.train_batches has
                callbacks=callbacks,
                verbose=0,  # the run shows it
            )
            if run.stopping and run.step < run.steps:
                run.save(write)
                return run.stop()
            with averaged(training):
                logits = predict(dataset.val)
            run.end_epoch(logits, float(criterion(dataset.val.labels, logits)))
            run.save(write)
            if run.stopping and not run.done:
                return run.stop()

        # the test images are seen once, by the model that the validation images chose
        model.load_weights(run.checkpoints.of_epoch(run.best_epoch) / "model.keras")
        run.finish(
            predict(dataset.test),
            predict(dataset.val),
            device=keras_devices.name(),
            peak_device_memory=keras_devices.peak_memory(),
        )
    return 0


def begun(
    model: keras.Model, criterion: keras.losses.Loss, settings: Settings, head_alone: bool
) -> tuple[keras.Model, list[keras.Variable]]:
    """The model as ``fit`` takes it, and what its optimiser and dropout have in a checkpoint.

    The same layers in a Model of its own, so that what is saved loads without this file.
    """
    logits = model.output
    if head_alone:
        head = model.layers[-1]
        features = keras.Model(model.input, head.input)
        features.trainable = False
        logits = head(features(model.input, training=False))  # nor does dropout change them
    training = keras.Model(model.input, logits)
    optimizer = build_optimizer(settings)
    # the loss with the weights of parts
    weighted = [StepLoss(criterion)]
    metrics = [] if settings.has_findings else [MacroF1(name="macro_f1")]
    training.compile(optimizer, criterion, metrics=metrics, weighted_metrics=weighted)
    optimizer.build(training.trainable_variables)  # or there were no moments yet to resume
    # which Keras counts on, so that what is drawn after a resume is what would have been
    dropout = [v for v in training.variables if v.name == "seed_generator_state"]
    # and where a checkpoint's model is the averaged one, the weights that are trained
    weights = training.trainable_variables if optimizer.use_ema else []
    return training, [*optimizer.variables, *dropout, *weights]


def draw_anew(layer: keras.layers.Layer) -> None:
    """Give a layer weights as it had them when it was made."""
    untrained = layer.from_config(layer.get_config())
    untrained.build(layer.input.shape)
    layer.set_weights(untrained.get_weights())


def build_loss(settings: Settings, counts: np.ndarray) -> keras.losses.Loss:
    """The loss that the settings name, of counts (C,) or (L, 2); its mean is the whole batch's."""
    if settings.has_findings:
        return SigmoidLMFLoss(**settings.loss_arguments(counts), ignore_class=UNKNOWN)
    if settings.loss in ("ce", "bwcce", "crt"):
        options = settings.loss_options
        weight = class_weights(counts, options.get("class_weight"))
        return CrossEntropy(weight, options.get("label_smoothing", 0.0))
    losses: dict[str, Callable[..., keras.losses.Loss]] = {
        "focal": FocalInParts if settings.accumulate > 1 else FocalLoss,
        "ldam": LDAMLoss,
        "lmf": LMFInParts if settings.accumulate > 1 else LMFLoss,
    }
    losses["la"] = losses["lmf"]
    return losses[settings.loss](**settings.loss_arguments(counts))


class StepLoss(keras.metrics.Metric):
    """The newest step's loss; the ``loss`` that Keras logs is a mean since the epoch began."""

    def __init__(self, criterion: keras.losses.Loss) -> None:
        super().__init__(name="step_loss")
        self.criterion = criterion
        self.newest = self.add_variable((), "zeros", name="newest")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Replace it by the loss of labels (N,) and logits (N, C), or a part's share of it.

        Each replica's is its share of the whole batch's mean; Keras reads their sum.
        """
        self.newest.assign(self.criterion(y_true, y_pred, sample_weight))

    def result(self) -> Any:
        """A scalar."""
        return ops.convert_to_tensor(self.newest)


class MacroF1(keras.metrics.F1Score):
    """Keras' macro-F1, which takes one-hot labels, of labels (N,) or the likeliest of (N, C)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(average="macro", **options)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count the answers of logits (N, C)."""
        labels = y_true if len(y_true.shape) == 1 else ops.argmax(y_true, -1)
        one_hot = ops.one_hot(ops.cast(labels, "int32"), y_pred.shape[-1])
        super().update_state(one_hot, y_pred, sample_weight)


class Steps(keras.callbacks.Callback):
    """Tell the run of each step, and end the epoch where the run is asked to stop."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.parts: list[float] = []  # the losses of those of a batch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Dropout on PyTorch draws from its one generator, which no checkpoint of Keras holds."""
        if keras_devices.BACKEND == "torch":
            keras.utils.set_random_seed(self.run.step_seed() % 2**32)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Each step's loss is a number by now: Keras waits for the device to call this."""
        self.parts.append(logs["step_loss"])
        if len(self.parts) < self.run.settings.accumulate:
            return
        self.run.took_step(sum(self.parts) / len(self.parts), logs.get("macro_f1"))
        self.parts = []
        if self.run.stopping:
            self.model.stop_training = True


def load(folder: Path, state: Sequence[keras.Variable]) -> None:
    """Restore the optimiser's and dropout's variables as ``write`` saved them."""
    with np.load(folder / "training.npz") as saved:
        for variable, name in zip(state, saved, strict=True):
            variable.assign(saved[name])


if __name__ == "__main__":
    sys.exit(main())
