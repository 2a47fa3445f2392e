"""The demo's Keras `compile` and `fit`; TensorFlow is the backend unless KERAS_BACKEND differs."""

import os
from collections.abc import Callable

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
from keras import layers

from examples.data.digits import Digits, Recipe
from lmf_multi import class_counts
from lmf_multi.keras import LMFLoss


def train(
    digits: Digits, loss: str, recipe: Recipe, on_epoch: Callable[[float], None]
) -> np.ndarray:
    """Train with cross-entropy or LMF; report each epoch's mean loss; predict the test images."""
    keras.utils.set_random_seed(recipe.seed)
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    if loss == "LMF":
        criterion = LMFLoss(class_counts(digits.train_labels))
    else:
        criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(recipe.learning_rate), loss=criterion)
    report = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: on_epoch(logs["loss"]))
    model.fit(
        digits.train_images,
        digits.train_labels,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        verbose=0,
        callbacks=[report],
    )
    return model.predict(digits.test_images, verbose=0).argmax(-1)
