"""The trainers' networks: the same logits in every framework, torchvision's where it has them."""

import numpy as np
import pytest

from examples.models.common import HEADS, MIN_IMAGE_SIZE
from examples.training.settings import ARCHS, MEAN, STD
from tests.examples.networks import PIXELS, assert_same, models_of, predict, randomized
from tests.frameworks import load


def without_chance(torch_model, flax_model):
    """No dropout and no stochastic depth, which every framework draws in its own way."""
    nnx = load("flax.nnx")
    for module in torch_model.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0
    for _, module in nnx.iter_modules(flax_model):
        if isinstance(module, nnx.Dropout):
            module.rate = 0.0


def drop_rates(model):
    """Probabilities of dropout and stochastic depth, in order."""
    return [m.p for m in model.modules() if type(m).__name__ in ("Dropout", "StochasticDepth")]


# --- PyTorch and torchvision


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("arch", ARCHS)
def test_torch_heads_have_the_classes(arch, head):
    if arch != "small":
        load("torchvision")
    torch = load("torch")
    model = models_of("torch").build(arch, 7, head=head).eval()
    layer = model.get_submodule(HEADS[arch])
    assert type(layer).__name__ == {"linear": "Linear", "cosine": "CosineLinear"}[head]
    with torch.no_grad():
        logits = model(models_of("torch").normalize(torch.from_numpy(PIXELS)))
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    assert head == "linear" or logits.abs().max() <= 1 + 1e-6


def test_torch_small_works_for_28_pixels_and_up():
    torch = load("torch")
    model = models_of("torch").build("small", 7)
    for size in (MIN_IMAGE_SIZE["small"], 28, 64, 97):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, MIN_IMAGE_SIZE["small"] - 1, 97))


def test_torch_normalizes_as_imagenet_does_and_keeps_the_order_in_memory():
    torch = load("torch")
    images = models_of("torch").normalize(torch.from_numpy(PIXELS))
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (PIXELS / 255 - MEAN) / STD
    assert images.dtype == torch.float32
    assert_same(images.permute(0, 2, 3, 1), expected, "float32")


# --- Flax, of PyTorch's weights


@pytest.mark.parametrize("arch", ARCHS)
def test_flax_logits_are_torchvisions_in_eval_and_train(arch):
    """In float64, where nothing but another network can differ."""
    if arch != "small":
        load("torchvision")
    jax = load("jax")
    jnp = load("jax.numpy")
    torch = load("torch")
    nnx = load("flax.nnx")

    torch.manual_seed(0)
    theirs = models_of("torch").build(arch, 5)
    # 36, 18, 9, 5, 3, 2: odd sizes too, where paddings differ. DenseNet ends in one pixel, and
    # batch norms of two values each multiply rounding errors wherever the two are nearly equal.
    images = np.random.default_rng(0).normal(size=(4, 36, 36, 3))
    with jax.enable_x64(True):
        ours = models_of("flax").build(arch, 5, rngs=nnx.Rngs(0), dtype=jnp.float64)
        assert_drawn_alike(ours, theirs)
        rates = [m.rate for _, m in nnx.iter_modules(ours) if isinstance(m, nnx.Dropout)]
        np.testing.assert_allclose(sorted(rates), sorted(drop_rates(theirs)), rtol=1e-12)

        without_chance(randomized(theirs).double(), ours)
        state = nnx.state(ours, (nnx.Param, nnx.BatchStat))
        nnx.update(ours, jax.tree.map(lambda values: values.astype(jnp.float64), state))
        models_of("flax").load_torchvision(ours, theirs.state_dict())
        for mode in ("eval", "train"):
            getattr(theirs, mode)()
            getattr(ours, mode)()
            with torch.no_grad():
                logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
            assert_same(run(ours, images), logits, "float64")
        # which training has moved on
        expected = theirs.state_dict()
        statistics = nnx.to_flat_state(nnx.state(ours, nnx.BatchStat))
        assert len(statistics) == sum("running_" in name for name in expected)
        for path, variable in statistics:
            assert_same(variable[...], expected[models_of("flax").torch_name(path)], "float64")


def run(model, images):
    """Logits, and new statistics in the model; compiled, but in no hurry for fast code."""
    jax = load("jax")
    nnx = load("flax.nnx")
    graph, state = nnx.split(model)

    def apply(state, images):
        model = nnx.merge(graph, state)
        return model(images), nnx.state(model)

    compiled = jax.jit(apply, compiler_options={"xla_backend_optimization_level": "0"})
    logits, state = compiled(state, images)
    nnx.update(model, state)
    return logits


def assert_drawn_alike(flax_model, torch_model):
    """Random weights have the spread of PyTorch's, as far as a layer has enough of them to tell."""
    nnx = load("flax.nnx")
    from examples.models.flax import torch_name

    theirs, compared = torch_model.state_dict(), 0
    for path, variable in nnx.to_flat_state(nnx.state(flax_model, nnx.Param)):
        drawn = theirs[torch_name(path)].numpy()
        if drawn.ndim > 1:
            allowed = 5 / np.sqrt(drawn.size)  # standard errors
            spread = np.asarray(variable[...]).std() / drawn.std()
            np.testing.assert_allclose(spread, 1, atol=allowed, err_msg=torch_name(path))
            compared += 1
    assert compared >= 5


def test_flax_keeps_weights_that_pytorch_trains_on():
    jax = load("jax")
    nnx = load("flax.nnx")
    theirs = models_of("torch").build("small", 5)
    ours = models_of("flax").build("small", 5, rngs=nnx.Rngs(0))
    models_of("flax").load_torchvision(ours, theirs.state_dict())
    before = jax.tree.map(np.array, nnx.state(ours))
    for values in theirs.state_dict().values():
        values.zero_()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), before)


def test_flax_computes_in_bfloat16_and_keeps_the_rest_in_float32():
    jax = load("jax")
    jnp = load("jax.numpy")
    nnx = load("flax.nnx")
    images = models_of("flax").normalize(PIXELS)
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models_of("flax").build("small", 5, rngs=nnx.Rngs(0), dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        logits[dtype] = np.asarray(model(images))
        assert logits[dtype].dtype == np.float32
        assert model.features(images).dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    error = np.abs(logits[jnp.bfloat16] - logits[jnp.float32]).max()
    assert 0 < error < 0.05 * np.abs(logits[jnp.float32]).max()


def test_flax_drops_blocks_and_features_in_training_alone():
    """Stochastic depth leaves a block out of some whole images and of others not."""
    jnp = load("jax.numpy")
    nnx = load("flax.nnx")
    from examples.models.flax_networks import Layers, MBConv

    options = {"stride": 1, "expand": 1, "fused": True, "drop_rate": 0.5}
    block = MBConv(Layers(nnx.Rngs(0), jnp.float32), 4, 4, **options)
    x = np.random.default_rng(0).normal(size=(64, 3, 3, 4)).astype(np.float32)
    added = np.asarray(block(x)) - x
    kept = np.abs(added).max((1, 2, 3)) > 0
    assert 16 < kept.sum() < 48
    block.drop.rate = 0.0
    np.testing.assert_allclose(added[kept], 2 * (np.asarray(block(x)) - x)[kept], atol=1e-5)
    block.drop.rate = 0.5
    block.eval()
    assert (np.abs(np.asarray(block(x)) - x).max((1, 2, 3)) > 0).all()


def test_flax_cosine_head():
    nnx = load("flax.nnx")
    model = models_of("flax").build("small", 7, rngs=nnx.Rngs(0), head="cosine")
    logits = np.asarray(model(models_of("flax").normalize(PIXELS)))
    assert logits.shape == (2, 7) and np.abs(logits).max() <= 1 + 1e-6
    assert type(model.head).__name__ == "CosineLinear"


def test_flax_normalizes_as_imagenet_does():
    images = models_of("flax").normalize(PIXELS)
    assert images.dtype == np.float32
    assert_same(images, (PIXELS / 255 - MEAN) / STD, "float32")


def test_flax_refuses_to_train_on_one_value_a_feature():
    nnx = load("flax.nnx")
    from examples.models.flax_networks import BatchNorm

    sentence = (
        r"batch norm must train on more than one value a feature, got shape \(1, 1, 1, 4\); "
        "use a larger batch or larger images"
    )
    with pytest.raises(ValueError, match=sentence):
        BatchNorm(4, rngs=nnx.Rngs(0))(np.zeros((1, 1, 1, 4), np.float32))


# --- Keras, on the backend of KERAS_BACKEND


@pytest.mark.parametrize("arch", ARCHS)
def test_keras_takes_raw_pixels_and_a_saved_model_needs_no_code(arch, tmp_path):
    keras = load("keras")
    model = models_of("keras").build(arch, 5, 64)
    logits = predict(model, PIXELS)
    assert logits.shape == (2, 5) and logits.dtype == np.float32
    np.testing.assert_array_equal(predict(model, PIXELS.astype(np.float32)), logits)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, PIXELS), logits)


@pytest.mark.parametrize("arch", ["resnet50", "densenet121"])
def test_keras_prepares_pixels_as_the_weights_expect_them(arch):
    keras = load("keras")
    pixels = keras.Input((64, 64, 3))
    prepared = predict(keras.Model(pixels, models_of("keras").prepared(arch, pixels)), PIXELS)
    family = {"resnet50": "resnet", "densenet121": "densenet"}[arch]
    preprocess = getattr(keras.applications, family).preprocess_input
    assert_same(prepared, preprocess(PIXELS.astype(np.float32)), "float32")


def test_keras_small_is_the_same_network():
    """With PyTorch's weights it has PyTorch's logits; Flax has them too, as shown above."""
    torch = load("torch")
    theirs = randomized(models_of("torch").build("small", 5)).eval()
    ours = models_of("keras").build("small", 5, 64)
    ours.set_weights(keras_weights(theirs))
    with torch.no_grad():
        logits = theirs(models_of("torch").normalize(torch.from_numpy(PIXELS)))
    assert_same(predict(ours, PIXELS), logits, "float32")


def keras_weights(model):
    """The arrays of a small PyTorch network in Keras' order and layout."""
    arrays = [v.numpy() for k, v in model.state_dict().items() if "num_batches" not in k]
    layouts = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    return [array.transpose(layouts[array.ndim]) for array in arrays]


def test_keras_logits_stay_float32_under_mixed_precision():
    keras = load("keras")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models_of("keras").build("small", 5, 64)
        assert predict(model, PIXELS).dtype == np.float32
        assert model.layers[-2].compute_dtype == "bfloat16"
        assert {weight.dtype for weight in model.weights} == {"float32"}
    finally:
        keras.config.set_dtype_policy(before)


def test_keras_cosine_head():
    logits = predict(models_of("keras").build("small", 7, 64, head="cosine"), PIXELS)
    assert logits.shape == (2, 7) and np.abs(logits).max() <= 1 + 1e-6
