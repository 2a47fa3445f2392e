"""Where a network starts: ImageNet's weights, files, and what of them does not fit."""

from functools import partial

import numpy as np
import pytest

from examples.models import common
from tests.examples.networks import models_of, randomized
from tests.frameworks import load

# --- PyTorch's, which Flax takes too


@pytest.fixture
def build(request):
    """The build of PyTorch or Flax, which take the same files, and a model's state dict."""
    load("torch")  # reads the file
    if request.param == "torch":
        return models_of("torch").build, lambda model: model.state_dict()
    models_flax = models_of("flax")
    nnx = load("flax.nnx")

    def state_dict(model):
        flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        return models_flax.as_torchvision((path, variable[...]) for path, variable in flat)

    return partial(models_flax.build, rngs=nnx.Rngs(1)), state_dict


both = pytest.mark.parametrize("build", ["torch", "flax"], indirect=True)


@pytest.fixture
def saved(tmp_path):
    """A small network of five classes, and the file of its weights."""
    torch = load("torch")
    model = randomized(models_of("torch").build("small", 5))
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
    torch = load("torch")
    build, state_dict = build
    expected, _ = saved
    torch.save({"model": expected, "epoch": 3}, tmp_path / "checkpoint.pth")
    found = state_dict(build("small", 5, weights=tmp_path / "checkpoint.pth"))
    np.testing.assert_array_equal(found["head.weight"], expected["head.weight"])


def damaged(state_dict, damage):
    """A state dict with one thing wrong."""
    torch = load("torch")
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
    torch = load("torch")
    torch.save(damaged(saved[0], damage), tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=sentence):
        build[0]("small", 5, weights=tmp_path / "damaged.pth")


@both
def test_weights_that_are_no_state_dict_are_one_sentence(build, tmp_path):
    torch = load("torch")
    file = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights must name a file, got .*weights\.pth"):
        build[0]("small", 5, weights=file)
    file.write_bytes(b"not a file of torch.save")
    with pytest.raises(ValueError, match=r"must be a file of torch\.save, got .*weights\.pth"):
        build[0]("small", 5, weights=file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="weights must hold a state dict, names and tensors; "):
        build[0]("small", 5, weights=file)


def test_densenets_published_names_are_read():
    old = "features.denseblock1.denselayer12.norm.1.running_mean"
    new = "features.denseblock1.denselayer12.norm1.running_mean"
    assert list(common.as_torchvision_names({old: 0, "features.conv0.weight": 0})) == [
        new,
        "features.conv0.weight",
    ]
    load("torchvision")
    assert new.replace("12", "2") in models_of("torch").build("densenet121", 2).state_dict()


def offline(monkeypatch, cache):
    """No network and nothing downloaded before."""
    from urllib import request
    from urllib.error import URLError

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(request.OpenerDirector, "open", refuse)
    monkeypatch.setenv("TORCH_HOME", str(cache))


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


def test_imagenet_weights_are_taken_with_a_new_head(monkeypatch):
    load("torchvision")
    from torchvision.models import resnet50
    from torchvision.models._api import WeightsEnum

    published = randomized(resnet50()).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: published)
    found = models_of("torch").build("resnet50", 5, pretrained=True).state_dict()
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
        common.check(*arguments)


def test_images_too_small_for_a_network_are_one_sentence():
    common.check_image_size("small", 28)
    with pytest.raises(ValueError, match="image_size must be at least 32 for resnet50, got 28"):
        common.check_image_size("resnet50", 28)


# --- Keras


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_keras_weights_of_a_file_are_taken_and_a_head_only_if_it_fits(tmp_path, suffix):
    build, file = models_of("keras").build, tmp_path / f"small{suffix}"
    saved = build("small", 5, 64)
    saved.set_weights([np.random.default_rng(0).uniform(size=w.shape) for w in saved.weights])
    saved.save(file) if suffix == ".keras" else saved.save_weights(file)
    expected = saved.get_weights()

    found = build("small", 5, 64, weights=file).get_weights()
    for ours, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, want)
    for head, num_classes in (("linear", 7), ("cosine", 5)):
        found = build("small", num_classes, 64, head=head, weights=file).get_weights()
        for ours, want in zip(found[:20], expected[:20], strict=True):
            np.testing.assert_array_equal(ours, want)
        assert found[20].shape == (256, num_classes)
        assert not np.array_equal(found[20], expected[20])


def test_keras_weights_of_another_network_are_one_sentence(tmp_path):
    keras = load("keras")
    file = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(file)
    sentence = r"weights must be a \.weights\.h5 or \.keras file of small, got .*"
    with pytest.raises(ValueError, match=sentence + r"other\.weights\.h5: "):
        models_of("keras").build("small", 5, 64, weights=file)
    for name in ("no.weights.h5", "no.keras", "no.pth"):
        (tmp_path / name).write_bytes(b"no such file")
        with pytest.raises(ValueError, match=sentence + name):
            models_of("keras").build("small", 5, 64, weights=tmp_path / name)


def test_keras_imagenet_weights_that_cannot_be_downloaded_are_one_sentence(tmp_path, monkeypatch):
    models_keras = models_of("keras")
    offline(monkeypatch, tmp_path)
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"weights of resnet50 could not .*\(.*no network"):
        models_keras.build("resnet50", 5, 64, pretrained=True)


def test_keras_small_images_are_one_sentence():
    with pytest.raises(ValueError, match="image_size must be at least 32 for resnet50, got 28"):
        models_of("keras").build("resnet50", 5, 28)
