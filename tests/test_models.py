"""The trainers' networks: the same in every framework, torchvision's weights and files of them."""

import numpy as np
import pytest

from examples import models
from examples.settings import ARCHS, MEAN, STD
from tests.frameworks import load

# float64 through 50 to 120 layers; float32 through five
RTOL = {"float64": 1e-10, "float32": 1e-5}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)


def assert_same(ours, theirs, dtype):
    """Compare relative to the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=RTOL[dtype] * np.abs(theirs).max())


@pytest.fixture
def models_torch():
    load("torch")
    return load("examples.models_torch")


@pytest.fixture
def models_flax():
    load("jax")
    load("flax")
    return load("examples.models_flax")


@pytest.fixture
def models_keras():
    load("keras")
    return load("examples.models_keras")


def randomized(model):
    """A PyTorch model none of whose parameters and statistics is as it was initialized."""
    torch = load("torch")
    generator = torch.Generator().manual_seed(0)
    for name, values in model.state_dict().items():
        noise = torch.rand(values.shape, generator=generator)
        if name.endswith("running_var"):
            values.copy_(0.5 + noise)
        elif values.ndim == 1:  # scales, biases, means
            values.add_(noise - 0.5)
    return model


def without_chance(torch_model, flax_model):
    """No dropout and no stochastic depth, which every framework draws in its own way."""
    from flax import nnx

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
def test_torch_heads_have_the_classes(models_torch, arch, head):
    if arch != "small":
        load("torchvision")
    torch = load("torch")
    model = models_torch.build(arch, 7, head=head).eval()
    layer = model.get_submodule(models.HEADS[arch])
    assert type(layer).__name__ == {"linear": "Linear", "cosine": "CosineLinear"}[head]
    with torch.no_grad():
        logits = model(models_torch.normalize(torch.from_numpy(PIXELS)))
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    assert head == "linear" or logits.abs().max() <= 1 + 1e-6


def test_torch_small_works_for_28_pixels_and_up(models_torch):
    torch = load("torch")
    model = models_torch.build("small", 7)
    for size in (models.MIN_IMAGE_SIZE["small"], 28, 64, 97):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, models.MIN_IMAGE_SIZE["small"] - 1, 97))


def test_torch_normalizes_as_imagenet_does_and_keeps_the_order_in_memory(models_torch):
    torch = load("torch")
    images = models_torch.normalize(torch.from_numpy(PIXELS))
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (PIXELS / 255 - MEAN) / STD
    assert images.dtype == torch.float32
    assert_same(images.permute(0, 2, 3, 1), expected, "float32")


# --- Flax, of PyTorch's weights


@pytest.mark.parametrize("arch", ARCHS)
def test_flax_logits_are_torchvisions_in_eval_and_train(models_torch, models_flax, arch):
    """In float64, where nothing but another network can differ."""
    if arch != "small":
        load("torchvision")
    import jax
    import jax.numpy as jnp
    import torch
    from flax import nnx

    theirs = models_torch.build(arch, 5)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    with jax.enable_x64(True):
        ours = models_flax.build(arch, 5, rngs=nnx.Rngs(0), dtype=jnp.float64)
        assert_drawn_alike(ours, theirs)
        rates = [m.rate for _, m in nnx.iter_modules(ours) if isinstance(m, nnx.Dropout)]
        np.testing.assert_allclose(sorted(rates), sorted(drop_rates(theirs)), rtol=1e-12)

        without_chance(randomized(theirs).double(), ours)
        state = nnx.state(ours, (nnx.Param, nnx.BatchStat))
        nnx.update(ours, jax.tree.map(lambda values: values.astype(jnp.float64), state))
        models_flax.load_torchvision(ours, theirs.state_dict())
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
            assert_same(variable[...], expected[models_flax.torch_name(path)], "float64")


def run(model, images):
    """Logits, and new statistics in the model; compiled, but in no hurry for fast code."""
    import jax
    from flax import nnx

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
    from flax import nnx

    from examples.models_flax import torch_name

    theirs, compared = torch_model.state_dict(), 0
    for path, variable in nnx.to_flat_state(nnx.state(flax_model, nnx.Param)):
        drawn = theirs[torch_name(path)].numpy()
        if drawn.ndim > 1:
            allowed = 5 / np.sqrt(drawn.size)  # standard errors
            spread = np.asarray(variable[...]).std() / drawn.std()
            np.testing.assert_allclose(spread, 1, atol=allowed, err_msg=torch_name(path))
            compared += 1
    assert compared >= 5


def test_flax_keeps_weights_that_pytorch_trains_on(models_torch, models_flax):
    import jax
    from flax import nnx

    theirs = models_torch.build("small", 5)
    ours = models_flax.build("small", 5, rngs=nnx.Rngs(0))
    models_flax.load_torchvision(ours, theirs.state_dict())
    before = jax.tree.map(np.array, nnx.state(ours))
    for values in theirs.state_dict().values():
        values.zero_()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), before)


def test_flax_computes_in_bfloat16_and_keeps_the_rest_in_float32(models_flax):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    images = models_flax.normalize(PIXELS)
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models_flax.build("small", 5, rngs=nnx.Rngs(0), dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        logits[dtype] = np.asarray(model(images))
        assert logits[dtype].dtype == np.float32
        assert model.features(images).dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    error = np.abs(logits[jnp.bfloat16] - logits[jnp.float32]).max()
    assert 0 < error < 0.05 * np.abs(logits[jnp.float32]).max()


def test_flax_drops_blocks_and_features_in_training_alone(models_flax):
    """Stochastic depth leaves a block out of some whole images and of others not."""
    import jax.numpy as jnp
    from flax import nnx

    from examples.flax_networks import Layers, MBConv

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


def test_flax_cosine_head(models_flax):
    from flax import nnx

    model = models_flax.build("small", 7, rngs=nnx.Rngs(0), head="cosine")
    logits = np.asarray(model(models_flax.normalize(PIXELS)))
    assert logits.shape == (2, 7) and np.abs(logits).max() <= 1 + 1e-6
    assert type(model.head).__name__ == "CosineLinear"


def test_flax_normalizes_as_imagenet_does(models_flax):
    images = models_flax.normalize(PIXELS)
    assert images.dtype == np.float32
    assert_same(images, (PIXELS / 255 - MEAN) / STD, "float32")


def test_flax_refuses_to_train_on_one_value_a_feature(models_flax):
    from flax import nnx

    from examples.flax_networks import BatchNorm

    sentence = (
        r"batch norm must train on more than one value a feature, got shape \(1, 1, 1, 4\); "
        "use a larger batch or larger images"
    )
    with pytest.raises(ValueError, match=sentence):
        BatchNorm(4, rngs=nnx.Rngs(0))(np.zeros((1, 1, 1, 4), np.float32))


# --- weights files of PyTorch


@pytest.fixture
def build(request, models_torch):
    """The build of PyTorch or Flax, which take the same files, and a model's state dict."""
    if request.param == "torch":
        return models_torch.build, lambda model: {
            k: v.numpy() for k, v in model.state_dict().items()
        }
    models_flax = request.getfixturevalue("models_flax")
    from flax import nnx

    def state_dict(model):
        flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        # back from Flax's layout: the reversal undoes itself for matrices
        back = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
        return {
            models_flax.torch_name(path): np.transpose(v[...], back[v.ndim]) for path, v in flat
        }

    return lambda *args, **kwargs: models_flax.build(*args, rngs=nnx.Rngs(1), **kwargs), state_dict


both = pytest.mark.parametrize("build", ["torch", "flax"], indirect=True)


@pytest.fixture
def saved(models_torch, tmp_path):
    """A small network of five classes, and the file of its weights."""
    import torch

    model = randomized(models_torch.build("small", 5))
    torch.save(model.state_dict(), tmp_path / "small.pth")
    return model.state_dict(), tmp_path / "small.pth"


@both
@pytest.mark.parametrize("options", [{}, {"head": "cosine"}, {"num_classes": 7}])
def test_weights_of_a_file_are_taken_and_a_head_only_if_it_fits(build, saved, options):
    build, state_dict = build
    expected, file = saved
    found = state_dict(build("small", weights=file, **{"num_classes": 5} | options))
    for name, values in expected.items():
        if name.startswith("head.") and options:
            assert name not in found or not np.array_equal(found[name], values)
        elif name in found:
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert found.keys() >= {"features.3.1.running_var", "head.weight"}


@both
def test_weights_of_a_checkpoint_are_its_models(build, saved, tmp_path):
    import torch

    build, state_dict = build
    expected, _ = saved
    torch.save({"model": expected, "epoch": 3}, tmp_path / "checkpoint.pth")
    found = state_dict(build("small", 5, weights=tmp_path / "checkpoint.pth"))
    np.testing.assert_array_equal(found["head.weight"], expected["head.weight"])


def damaged(state_dict, damage):
    """A state dict with one thing wrong."""
    import torch

    changed = dict(state_dict)
    if damage == "missing":
        del changed["features.1.0.weight"]
    elif damage == "unexpected":
        changed["features.9.0.weight"] = torch.zeros(3)
    elif damage == "shape":
        changed["features.2.1.running_mean"] = torch.zeros(3)
    return changed


@both
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("missing", r"got features\.1\.0\.weight of no shape: it is missing where the model has "),
        ("unexpected", r"got features\.9\.0\.weight of \(3,\) where the model has none"),
        (
            "shape",
            r"got features\.2\.1\.running_mean of \(3,\) where the model has \(128,\); "
            r"are they another arch's\?",
        ),
    ],
)
def test_weights_of_another_network_are_one_sentence(build, saved, tmp_path, damage, sentence):
    import torch

    torch.save(damaged(saved[0], damage), tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=sentence):
        build[0]("small", 5, weights=tmp_path / "damaged.pth")


@both
def test_weights_that_are_no_state_dict_are_one_sentence(build, tmp_path):
    import torch

    file = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights must name a file, got .*weights\.pth"):
        build[0]("small", 5, weights=file)
    file.write_bytes(b"not a file of torch.save")
    with pytest.raises(ValueError, match=r"must be a file of torch\.save, got .*weights\.pth"):
        build[0]("small", 5, weights=file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="weights must hold a state dict, names and tensors; "):
        build[0]("small", 5, weights=file)


def test_densenets_published_names_are_read(models_torch):
    old = "features.denseblock1.denselayer12.norm.1.running_mean"
    new = "features.denseblock1.denselayer12.norm1.running_mean"
    assert list(models.as_torchvision_names({old: 0, "features.conv0.weight": 0})) == [
        new,
        "features.conv0.weight",
    ]
    load("torchvision")
    assert new.replace("12", "2") in models_torch.build("densenet121", 2).state_dict()


@both
def test_imagenet_weights_that_cannot_be_downloaded_are_one_sentence(build, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    load("torchvision")
    sentence = (
        r"the ImageNet weights of resnet50 could not be downloaded \(.*no network.*\); "
        "--weights FILE takes a local file"
    )
    with pytest.raises(ConnectionError, match=sentence):
        build[0]("resnet50", 5, pretrained=True)


def offline(monkeypatch, cache):
    """No network and nothing downloaded before."""
    from urllib import request
    from urllib.error import URLError

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(request.OpenerDirector, "open", refuse)
    monkeypatch.setenv("TORCH_HOME", str(cache))


@both
def test_imagenet_weights_are_taken_with_a_new_head(build, monkeypatch):
    load("torchvision")
    from torchvision.models import resnet50
    from torchvision.models._api import WeightsEnum

    published = randomized(resnet50()).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: published)
    found = build[1](build[0]("resnet50", 5, pretrained=True))
    assert found["fc.weight"].shape == (5, 2048)
    for name in ("conv1.weight", "layer4.2.bn3.running_var", "layer2.0.downsample.0.weight"):
        np.testing.assert_array_equal(found[name], published[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("vgg", "linear", False, None), "arch must be one of small, resnet50, .*, got 'vgg'"),
        (("small", "arc", False, None), "head must be linear or cosine, got 'arc'"),
        (("small", "linear", True, None), "pretrained weights exist for resnet50, .*, got small"),
        (
            ("resnet50", "linear", True, "a.pth"),
            r"pretrained and weights exclude each other, got weights a\.pth",
        ),
    ],
)
def test_what_cannot_be_built_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.check(*arguments)


def test_images_too_small_for_a_network_are_one_sentence():
    models.check_image_size("small", 28)
    with pytest.raises(ValueError, match="image_size must be at least 32 for resnet50, got 28"):
        models.check_image_size("resnet50", 28)


# --- Keras, on the backend of KERAS_BACKEND


def predict(model, images):
    """Logits in NumPy, without a compiled function for each model."""
    import keras

    return keras.ops.convert_to_numpy(model(images, training=False))


@pytest.mark.parametrize("arch", ARCHS)
def test_keras_takes_raw_pixels_and_a_saved_model_needs_no_code(models_keras, arch, tmp_path):
    import keras

    model = models_keras.build(arch, 5, 64)
    logits = predict(model, PIXELS)
    assert logits.shape == (2, 5) and logits.dtype == np.float32
    np.testing.assert_array_equal(predict(model, PIXELS.astype(np.float32)), logits)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, PIXELS), logits)


@pytest.mark.parametrize("arch", ["resnet50", "densenet121"])
def test_keras_prepares_pixels_as_the_weights_expect_them(models_keras, arch):
    import keras

    pixels = keras.Input((64, 64, 3))
    prepared = predict(keras.Model(pixels, models_keras.prepared(arch, pixels)), PIXELS)
    family = {"resnet50": "resnet", "densenet121": "densenet"}[arch]
    preprocess = getattr(keras.applications, family).preprocess_input
    assert_same(prepared, preprocess(PIXELS.astype(np.float32)), "float32")


def test_keras_small_is_the_same_network(models_keras, models_torch):
    """With PyTorch's weights it has PyTorch's logits; Flax has them too, as shown above."""
    import torch

    theirs = randomized(models_torch.build("small", 5)).eval()
    ours = models_keras.build("small", 5, 64)
    ours.set_weights(keras_weights(theirs))
    with torch.no_grad():
        logits = theirs(models_torch.normalize(torch.from_numpy(PIXELS)))
    assert_same(predict(ours, PIXELS), logits, "float32")


def keras_weights(model):
    """The arrays of a small PyTorch network in Keras' order and layout."""
    arrays = [v.numpy() for k, v in model.state_dict().items() if "num_batches" not in k]
    layouts = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    return [array.transpose(layouts[array.ndim]) for array in arrays]


def test_keras_logits_stay_float32_under_mixed_precision(models_keras):
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models_keras.build("small", 5, 64)
        assert predict(model, PIXELS).dtype == np.float32
        assert model.layers[-2].compute_dtype == "bfloat16"
        assert {weight.dtype for weight in model.weights} == {"float32"}
    finally:
        keras.config.set_dtype_policy(before)


def test_keras_cosine_head(models_keras):
    logits = predict(models_keras.build("small", 7, 64, head="cosine"), PIXELS)
    assert logits.shape == (2, 7) and np.abs(logits).max() <= 1 + 1e-6


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_keras_weights_of_a_file_are_taken_and_a_head_only_if_it_fits(
    models_keras, tmp_path, suffix
):
    file = tmp_path / f"small{suffix}"
    saved = models_keras.build("small", 5, 64)
    saved.set_weights([np.random.default_rng(0).uniform(size=w.shape) for w in saved.weights])
    saved.save(file) if suffix == ".keras" else saved.save_weights(file)
    expected = saved.get_weights()

    for found, want in zip(
        models_keras.build("small", 5, 64, weights=file).get_weights(), expected, strict=True
    ):
        np.testing.assert_array_equal(found, want)
    for head, num_classes in (("linear", 7), ("cosine", 5)):
        found = models_keras.build("small", num_classes, 64, head=head, weights=file).get_weights()
        for ours, want in zip(found[:20], expected[:20], strict=True):
            np.testing.assert_array_equal(ours, want)
        assert found[20].shape == (256, num_classes)
        assert not np.array_equal(found[20], expected[20])


def test_keras_weights_of_another_network_are_one_sentence(models_keras, tmp_path):
    import keras

    file = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(file)
    sentence = r"weights must be a \.weights\.h5 or \.keras file of small, got .*"
    with pytest.raises(ValueError, match=sentence + r"other\.weights\.h5: "):
        models_keras.build("small", 5, 64, weights=file)
    for name in ("no.weights.h5", "no.keras", "no.pth"):
        (tmp_path / name).write_bytes(b"no such file")
        with pytest.raises(ValueError, match=sentence + name):
            models_keras.build("small", 5, 64, weights=tmp_path / name)


def test_keras_imagenet_weights_that_cannot_be_downloaded_are_one_sentence(
    models_keras, tmp_path, monkeypatch
):
    offline(monkeypatch, tmp_path)
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"weights of resnet50 could not .*\(.*no network"):
        models_keras.build("resnet50", 5, 64, pretrained=True)


def test_keras_small_images_are_one_sentence(models_keras):
    with pytest.raises(ValueError, match="image_size must be at least 32 for resnet50, got 28"):
        models_keras.build("resnet50", 5, 28)
