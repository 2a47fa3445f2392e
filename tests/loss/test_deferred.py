"""Deferred re-weighting: the weights of each epoch, without a recompile, right after a resume."""

import numpy as np
import pytest

from lmf_multi import class_weights, deferred_weights
from tests.checks import refuses
from tests.frameworks import load

COUNTS, START, EPOCHS = (900, 100, 10), 2, 4
RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (32, 5)).astype("float32")
Y = RNG.choice(3, 32)
KERNEL = RNG.normal(0, 0.3, (5, 3)).astype("float32")


def test_ones_then_effective():
    effective = class_weights(COUNTS, "effective", effective_beta=0.99)
    for epoch in range(EPOCHS):
        weights = deferred_weights(COUNTS, epoch, START, effective_beta=0.99)
        np.testing.assert_array_equal(weights, effective if epoch >= START else np.ones(3))
    assert np.ptp(effective) > 1


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ((COUNTS, -1, 2), ValueError, "epoch must be at least 0, got -1; epochs count from 0"),
        ((COUNTS, 1, 2.5), TypeError, "start must be a whole number, got 2.5"),
        ((COUNTS, True, 2), TypeError, "epoch must be a whole number, got True"),
        (([5, 0], 1, 2), ValueError, "class_counts must be at least 1 for every class, got 0 for "
         "class 1; drop the class or merge it with another"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, kind, sentence):
    with refuses(kind, sentence):
        deferred_weights(*arguments)


# --- PyTorch


def torch_training(torch, losses, epochs, state=None, weights=deferred_weights, compiled=False):
    """Train from a checkpoint, or from the start; the checkpoint and the number of graphs."""
    model = torch.nn.Linear(5, 3, bias=False)
    model.weight.data = torch.tensor(KERNEL.T.copy())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    criterion, graphs = losses.LDAMLoss(COUNTS, scale=2.0), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x, y):
        return criterion(model(x), y)

    step = torch.compile(step, backend=counting, fullgraph=True) if compiled else step
    for epoch in epochs:
        criterion.set_class_weight(weights(COUNTS, epoch, START))
        for part in (slice(0, 16), slice(16, 32)):
            optimizer.zero_grad()
            step(torch.tensor(X[part]), torch.tensor(Y[part])).backward()
            optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return state, len(graphs)


def kernel_of(state):
    return state["model"]["weight"].numpy().copy()


def by_hand(torch, losses, epochs=range(EPOCHS)):
    """The same training with a new loss in each epoch."""
    kernel = torch.tensor(KERNEL.T.copy(), requires_grad=True)
    optimizer = torch.optim.SGD([kernel], 0.1, momentum=0.9)
    for epoch in epochs:
        weight = None if epoch < START else "effective"
        criterion = losses.LDAMLoss(COUNTS, scale=2.0, class_weight=weight)
        for part in (slice(0, 16), slice(16, 32)):
            optimizer.zero_grad()
            criterion(torch.tensor(X[part]) @ kernel.T, torch.tensor(Y[part])).backward()
            optimizer.step()
    return kernel.detach().numpy()


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_swaps_without_a_recompile(compiled):
    torch, losses = load("torch"), load("lmf_multi.torch")
    state, graphs = torch_training(torch, losses, range(EPOCHS), compiled=compiled)
    assert graphs == (1 if compiled else 0)
    np.testing.assert_allclose(kernel_of(state), by_hand(torch, losses), rtol=1e-5, atol=1e-7)
    never = torch_training(torch, losses, range(EPOCHS), weights=lambda *_: np.ones(3))[0]
    assert np.abs(kernel_of(never) - kernel_of(state)).max() > 1e-3


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_torch_resume(kill, tmp_path):
    """Stopped before, at and after ``start``, and continued from the file: bit for bit the same."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    whole, _ = torch_training(torch, losses, range(EPOCHS))
    state, _ = torch_training(torch, losses, range(kill))
    torch.save(state, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state, _ = torch_training(torch, losses, range(kill, EPOCHS), state)
    np.testing.assert_array_equal(kernel_of(state), kernel_of(whole))


def test_torch_set_class_weight_in_place():
    torch, losses = load("torch"), load("lmf_multi.torch")
    loss = losses.LMFLoss(COUNTS)
    buffer = loss.class_weight
    for weight in ([1.0, 2.0, 3.0], "balanced", None):
        loss.set_class_weight(weight)
        assert loss.class_weight is buffer
        expected = losses.LMFLoss(COUNTS, class_weight=weight)
        z, y = torch.tensor(X @ KERNEL), torch.tensor(Y)
        torch.testing.assert_close(loss(z, y), expected(z, y))
    sentence = "class_weight must have shape (3,), one number for each class, got (2,)"
    with refuses(ValueError, sentence):
        loss.set_class_weight([1.0, 2.0])
    assert buffer.tolist() == [1.0, 1.0, 1.0]


# --- JAX


def test_jax_replaces_a_leaf():
    jax, losses = load("jax"), load("lmf_multi.jax")
    torch_losses = load("lmf_multi.torch")
    traces = []

    @jax.jit
    def step(kernel, momentum, loss, x, y):
        traces.append(1)
        grad = jax.grad(lambda kernel: loss(x @ kernel, y))(kernel)
        momentum = 0.9 * momentum + grad
        return kernel - 0.1 * momentum, momentum

    def train(epochs, kernel, momentum):
        loss = losses.LDAMLoss(COUNTS, scale=2.0)
        for epoch in epochs:
            loss = loss.replace(class_weight=deferred_weights(COUNTS, epoch, START))
            for part in (slice(0, 16), slice(16, 32)):
                kernel, momentum = step(kernel, momentum, loss, X[part], Y[part])
        return np.asarray(kernel), np.asarray(momentum)

    whole, _ = train(range(EPOCHS), KERNEL, np.zeros_like(KERNEL))
    assert len(traces) == 1
    expected = by_hand(load("torch"), torch_losses).T
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-6)
    for kill in (1, 2, 3):
        state = train(range(kill), KERNEL, np.zeros_like(KERNEL))
        np.testing.assert_array_equal(train(range(kill, EPOCHS), *state)[0], whole)
    assert len(traces) == 1


# --- Keras


def keras_model(keras, losses):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, use_bias=False)])
    model.layers[-1].set_weights([KERNEL])
    return model


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": False},
                                 {"jit_compile": True}], ids=["eager", "graph", "jit"])  # fmt: skip
def test_keras_callback(how, tmp_path):
    """The weights change at ``start``; a saved model that is trained on gives the same numbers."""
    keras, losses = load("keras"), load("lmf_multi.keras")

    def compiled(loss):
        model = keras_model(keras, losses)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss=loss, **how)
        return model

    def fit(model, epochs, first=0, callbacks=()):
        history = model.fit(
            X, Y, batch_size=16, shuffle=False, verbose=0, validation_data=(X, Y),
            initial_epoch=first, epochs=epochs, callbacks=list(callbacks),
        )  # fmt: skip
        return history.history

    def callback():
        return losses.DeferredReweighting(COUNTS, START)

    deferred = compiled(losses.LDAMLoss(COUNTS, scale=2.0))
    history = fit(deferred, EPOCHS, callbacks=[callback()])
    expected = by_hand(load("torch"), load("lmf_multi.torch")).T
    np.testing.assert_allclose(deferred.get_weights()[0], expected, rtol=1e-4, atol=1e-5)
    # validation takes the epoch's weights too
    last = losses.LDAMLoss(COUNTS, scale=2.0, class_weight="effective")
    logits = X @ expected
    of_batches = [float(last(Y[p], logits[p])) for p in (slice(0, 16), slice(16, 32))]
    np.testing.assert_allclose(history["val_loss"][-1], np.mean(of_batches), rtol=1e-3)

    kills = (START,) if how.get("run_eagerly") else (1, START, 3)
    if keras.backend.backend() == "torch" and how.get("jit_compile"):
        kills = ()  # a compilation takes half a minute
    for kill in kills:
        model = compiled(losses.LDAMLoss(COUNTS, scale=2.0))
        fit(model, kill, callbacks=[callback()])
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
        fit(model, EPOCHS, first=kill, callbacks=[callback()])
        np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4, atol=1e-5)


def fit_jitted(loss, *callbacks, **options):
    """Weights after ``EPOCHS``, and how often Python has been through the loss."""
    keras, losses = load("keras"), load("lmf_multi.keras")
    model, passes = keras_model(keras, losses), []

    class Counting(type(loss)):
        def __call__(self, *arguments, **named):
            passes.append(1)
            return super().__call__(*arguments, **named)

    loss.__class__ = Counting
    compiled = keras.backend.backend() != "torch"  # where that takes half a minute
    model.compile(keras.optimizers.SGD(0.1), loss=loss, jit_compile=compiled)
    options = {"batch_size": 16, "epochs": EPOCHS, "shuffle": False, "verbose": 0} | options
    model.fit(X, Y, callbacks=list(callbacks), **options)
    return model.get_weights()[0], len(passes)


def test_keras_traces_again_only_at_the_start():
    keras, losses = load("keras"), load("lmf_multi.keras")
    plain, passes = fit_jitted(losses.LDAMLoss(COUNTS, scale=2.0))
    never, passes_never = fit_jitted(
        losses.LDAMLoss(COUNTS, scale=2.0), losses.DeferredReweighting(COUNTS, EPOCHS)
    )
    np.testing.assert_allclose(never, plain, rtol=1e-5, atol=1e-6)
    assert passes_never == passes
    deferred, passes_deferred = fit_jitted(
        losses.LDAMLoss(COUNTS, scale=2.0), losses.DeferredReweighting(COUNTS, START)
    )
    assert np.abs(deferred - plain).max() > 1e-2
    if keras.backend.backend() != "torch":
        assert passes < passes_deferred <= 2 * passes
        assert passes < 2 * EPOCHS  # not once a batch


def test_keras_old_steps_that_live_on_do_not_bring_old_weights_back():
    """JAX finds traces by the traced method, as long as anything holds the function."""
    keras, losses = load("keras"), load("lmf_multi.keras")

    class Holding(keras.callbacks.Callback):
        held: list = []  # noqa: RUF012

        def on_epoch_end(self, epoch, logs=None):
            self.held.append((self.model.train_function, self.model.test_function))

    callbacks = [losses.DeferredReweighting(COUNTS, START)]
    expected, _ = fit_jitted(losses.LDAMLoss(COUNTS, scale=2.0), *callbacks)
    actual, _ = fit_jitted(losses.LDAMLoss(COUNTS, scale=2.0), *callbacks, Holding())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_keras_weights_of_the_loss_are_replaced_and_saved():
    """LMFLoss weights by margins until the callback does; its config says which weights it has."""
    keras, losses = load("keras"), load("lmf_multi.keras")
    loss = losses.LMFLoss(COUNTS, scale=2.0)
    assert loss.get_config()["class_weight"] == "margin"
    callback = losses.DeferredReweighting(COUNTS, START, effective_beta=0.99)
    for epochs, first, expected in ((1, 0, np.ones(3)), (3, 2, class_weights_of(0.99))):
        model = keras_model(keras, losses)
        model.compile("sgd", loss=loss)
        model.fit(X, Y, epochs=epochs, initial_epoch=first, verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(loss.class_weight, expected)
        assert loss.get_config()["class_weight"] == expected.tolist()


def class_weights_of(effective_beta):
    return class_weights(COUNTS, "effective", effective_beta=effective_beta)


def test_keras_one_loss_of_several():
    """``loss=`` names it where a model has several; the others stay as they are."""
    keras, losses = load("keras"), load("lmf_multi.keras")
    inputs = keras.Input((5,))
    heads = {name: keras.layers.Dense(3, name=name)(inputs) for name in ("a", "b")}
    model = keras.Model(inputs, heads)
    both = {name: losses.LDAMLoss(COUNTS) for name in heads}
    model.compile("sgd", loss=both)
    labels = {"a": Y, "b": Y}
    sentence = (
        "DeferredReweighting needs LMFLoss, LDAMLoss or FocalLoss, got dict; name it with loss="
    )
    with refuses(TypeError, sentence):
        model.fit(X, labels, verbose=0, callbacks=[losses.DeferredReweighting(COUNTS, 0)])
    callback = losses.DeferredReweighting(COUNTS, 0, loss=both["a"])
    model.fit(X, labels, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(both["a"].class_weight, class_weights(COUNTS, "effective"))
    assert both["b"].class_weight is None
    sentence = (
        "loss must be one that the model is compiled with, got another ldam_loss; "
        "take it from model.loss, also after loading"
    )
    with refuses(ValueError, sentence):
        callback = losses.DeferredReweighting(COUNTS, 0, loss=losses.LDAMLoss(COUNTS))
        model.fit(X, labels, verbose=0, callbacks=[callback])


def test_keras_callback_names_what_it_needs():
    keras, losses = load("keras"), load("lmf_multi.keras")
    model = keras_model(keras, losses)
    model.compile("sgd", loss="mse")
    sentence = (
        "DeferredReweighting needs LMFLoss, LDAMLoss or FocalLoss, got str; name it with loss="
    )
    with refuses(TypeError, sentence):
        model.fit(X, X @ KERNEL, verbose=0, callbacks=[losses.DeferredReweighting(COUNTS, 1)])
    with refuses(ValueError, "start must be at least 0, got -1; epochs count from 0"):
        losses.DeferredReweighting(COUNTS, -1)
