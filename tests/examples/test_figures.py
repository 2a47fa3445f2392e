"""The figures of a study: what is drawn is what the result files say, in shades of grey."""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from tests.examples.networks import PIXELS, assert_same, models_of, predict
from tests.frameworks import KERAS_BACKEND, load

for package in ("matplotlib", "sklearn", "rich", "tensorboard"):
    load(package)

from examples.study import figures, prediction_figures  # noqa: E402
from tests.examples.studies import COUNTS, NAMES, made_up  # noqa: E402


def heights(axes):
    """Of the bars, left to right."""
    return [bar.get_height() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())]


def test_every_figure_is_written_and_readable_in_grey(tmp_path, capsys):
    data = ["digits", "other.npz"]
    made_up(tmp_path, ["ce", "lmf", "lmf:alpha=0.5"], data=data, frameworks=["flax", "torch"])
    assert figures.main([str(tmp_path)]) == 0
    names = {
        *(
            f"{what}-{data}"
            for what in ("macro-f1", "images-per-class")
            for data in ("digits", "other")
        ),
        "sweep-alpha",
        *(
            f"{what}-{data}-small-{framework}"
            for what in ("confusion", "precision-recall", "reliability")
            for data in ("digits", "other")
            for framework in ("flax", "torch")
        ),
    }
    files = list((tmp_path / "figures").iterdir())
    assert {file.stem for file in files} == names
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert len(np.unique(pixels)) > 10  # there is something to see
        np.testing.assert_array_equal(pixels.min(2), pixels.max(2))
    told = capsys.readouterr().out
    for framework in ("flax", "torch") if importlib.util.find_spec("torch") else ():
        assert (
            f"Grad-CAM of digits, small, {framework} is left out: the test images must be those "
            f"that digits-small-{framework}-ce-0 predicted, but the data have changed since" in told
        )
        assert f"Grad-CAM of other, small, {framework} is left out: data must be digits," in told


def test_bars_are_means_over_seeds_with_their_deviation(tmp_path):
    scores = {"ce": [0.5, 0.6, 0.7], "lmf": [0.7, 0.9, 0.8]}
    planned = made_up(tmp_path, list(scores), seeds=3, scores=scores, frameworks=["torch", "keras"])
    (axes,) = figures.scores(planned.results(), "digits").figure.axes
    np.testing.assert_allclose(heights(axes), [0.6, 0.6, 0.8, 0.8], rtol=1e-12)
    (segments, *_), _ = (bars.errorbar.lines[2] for bars in axes.containers[1::2])
    ends = np.array(segments.get_segments())[..., 1]
    np.testing.assert_allclose(ends, [[0.5, 0.7], [0.7, 0.9]], rtol=1e-12)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ce", "lmf"]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2  # told apart without colour


def test_classes_are_counted_on_a_logarithmic_scale(tmp_path):
    planned = made_up(tmp_path, ["ce"], seeds=1)
    (axes,) = figures.images_per_class(planned.results(), "digits").figure.axes
    assert axes.get_yscale() == "log"
    assert heights(axes) == sorted(COUNTS, reverse=True)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["mole", "vein", "wart"]


def test_a_sweep_has_plain_lmf_in_it_and_other_settings_apart(tmp_path):
    losses = ["ce", "lmf", "lmf:alpha=3", "lmf:alpha=0.5", "lmf:alpha=3:scale=5", "lmf:scale=5"]
    scores = {loss: [place, place + 0.5] for place, loss in enumerate(losses)}
    planned = made_up(tmp_path, losses, seeds=2, scores=scores)
    found = planned.results()
    (picture,) = figures.sweep(found, "alpha")
    lines = [ax.lines[0].get_xydata() for ax in picture.figure.axes]
    np.testing.assert_allclose(lines[0], [[0.5, 3.25], [1.5, 1.25], [3, 2.25]])
    np.testing.assert_allclose(lines[1], [[1.5, 5.25], [3, 4.25]])
    for axes in picture.figure.axes:
        np.testing.assert_allclose(axes.lines[-1].get_ydata(), [0.25, 0.25])  # cross-entropy
    assert list(figures.sweep(found, "gamma")) == []


def test_predictions_are_drawn_as_they_are(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=3)
    drawn = {p.name: p.figure for p in prediction_figures.pictures(planned)}
    lmf = [(t, r) for t, r in planned.results().items() if t.loss == "lmf"]
    files = [np.load(planned.out(training) / "predictions.npz") for training, _ in lmf]
    labels = np.concatenate([file["labels"] for file in files])
    logits = np.concatenate([file["logits"] for file in files])
    right = logits.argmax(1) == labels

    axes = drawn["confusion-digits-small-torch"].axes[1]
    share = np.mean(right[labels == 1])  # of the second class
    np.testing.assert_allclose(axes.images[0].get_array()[1, 1], 100 * share, rtol=1e-12)

    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for c, axes in enumerate(drawn["precision-recall-digits-small-torch"].axes):
        average = average_precision_score(labels == c, probabilities[:, c])
        assert axes.get_title() == NAMES[c]
        assert axes.get_legend().get_texts()[1].get_text() == f"lmf {average:.2f}"

    axes = drawn["reliability-digits-small-torch"].axes[1]
    confidence, shares = axes.lines[1].get_data()
    last = probabilities.max(1) > 0.9
    np.testing.assert_allclose(confidence[-1], probabilities.max(1)[last].mean(), rtol=1e-6)
    np.testing.assert_allclose(shares[-1], right[last].mean(), rtol=1e-12)


def test_result_files_alone_are_enough_for_what_they_say(tmp_path, capsys):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)
    for file in tmp_path.glob("runs/*/*"):
        if file.name != "result.json":
            file.unlink()
    names = {picture.name for picture in figures.pictures(planned)}
    assert names == {"macro-f1-digits", "images-per-class-digits", "confusion-digits-small-torch"}
    told = capsys.readouterr().out
    missing = tmp_path / "runs" / "digits-small-torch-ce-0" / "predictions.npz"
    for what in ("Precision, recall and reliability of digits, small, torch are", "Grad-CAM of"):
        line = next(line for line in told.splitlines() if line.startswith(what))
        assert "left out" in line and str(missing) in line


# --- Grad-CAM


@pytest.fixture(scope="module")
def gradcam():
    """The module, where PyTorch and the maps' library are."""
    for package in ("torch", "torchvision", "pytorch_grad_cam"):
        load(package)
    from examples.study import gradcam

    return gradcam


@pytest.fixture(scope="module")
def networks(gradcam):
    """The module that it has its networks from."""
    return load("examples.study.gradcam_networks")


def test_maps_are_bright_where_the_evidence_is(gradcam, networks):
    """A network that adds up the red of an image for class 1, and has nothing for the others."""
    torch = load("torch")
    network = torch.nn.Sequential()
    blind = [torch.nn.Identity() for _ in range(3)]
    network.features = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), *blind)
    network.pool, network.flatten = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    network.head = torch.nn.Linear(1, 3)
    with torch.no_grad():
        network.features[0].weight[:] = torch.tensor([1.0, 0, 0])[None, :, None, None]
        network.features[0].bias[:] = 2.2  # black is 0, after ImageNet's normalisation
        network.head.weight[:] = torch.tensor([[0.0], [1], [0]])
        network.head.bias[:] = 0
    images = np.zeros((2, 12, 12, 3), np.uint8)
    images[0, 2:5, 6:9, 0] = 255
    images[1, 9:, :3, 0] = 255
    images[..., 2] = 128
    network = networks.torch_network(network, "small", 12)
    maps = gradcam.grad_cam(network, images, np.array([1, 1]))
    np.testing.assert_allclose(maps, images[..., 0] / 255, atol=0.05)


@pytest.mark.parametrize(
    ("arch", "pixels", "layer"),
    [
        ("small", 64, "features.3"),
        ("small", 28, "features.1"),
        ("resnet50", 64, "layer3"),
        ("efficientnet_v2_s", 64, "features.5"),
        ("densenet121", 64, "features.denseblock3"),
        ("densenet121", 96, "features"),
    ],
)
def test_maps_have_pixels_at_any_size(networks, arch, pixels, layer):
    model = load("examples.models.torch").build(arch, 3)
    assert networks.torch_network(model, arch, pixels).layer is model.get_submodule(layer)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_flax_networks_are_drawn_by_pytorch_with_their_logits(networks, head, tmp_path):
    models, train_flax = models_of("flax"), load("examples.train_flax")
    nnx, models_torch = load("flax.nnx"), load("examples.models.torch")
    model = models.build("small", 3, head=head, rngs=nnx.Rngs(0))
    logits = model(models.normalize(PIXELS))  # in training: the running statistics change
    train_flax.save(nnx.state({"model": model}), tmp_path)
    model.eval()
    logits = model(models.normalize(PIXELS))
    twin = models_torch.build("small", 3, head=head)
    networks.load_flax(twin, tmp_path / "state")
    network = networks.torch_network(twin, "small", PIXELS.shape[1])
    assert_same(logits_of(network), logits, "float32")


KERAS_LAYERS = [
    ("small", 64, "re_lu", 4),
    ("small", 28, "re_lu", 3),
    ("resnet50", 64, "conv4_block6_out", 4),
    ("efficientnet_v2_s", 64, "block6a_expand_activation", 4),
    ("densenet121", 64, "pool4_conv", 4),
    ("densenet121", 96, "relu", 3),
]


@pytest.mark.parametrize(("arch", "pixels", "layer", "side"), KERAS_LAYERS)
def test_keras_networks_are_drawn_on_pytorch(
    gradcam, networks, arch, pixels, layer, side, tmp_path
):
    models = models_of("keras")
    if KERAS_BACKEND != "torch":
        pytest.skip(f"Keras is on {KERAS_BACKEND}")
    model = models.build(arch, 3, pixels, head="cosine")
    model.save(tmp_path / "model.keras")
    network = networks.keras_network(tmp_path / "model.keras")
    images = np.resize(PIXELS, (2, pixels, pixels, 3))
    assert_same(logits_of(network, images), predict(model, images), "float32")
    last = network.layer.part.layers[-1]
    assert last.name.startswith(layer) and last.output.shape[1:3] == (side, side)
    maps = gradcam.grad_cam(network, images, np.array([0, 2]))
    assert maps.shape == images.shape[:3] and maps.max() > 0.9


def test_keras_networks_in_bfloat16_are_drawn(gradcam, networks, tmp_path):
    models, keras = models_of("keras"), load("keras")
    if KERAS_BACKEND != "torch":
        pytest.skip(f"Keras is on {KERAS_BACKEND}")
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        models.build("small", 3, 64).save(tmp_path / "model.keras")
    finally:
        keras.mixed_precision.set_global_policy(before)
    network = networks.keras_network(tmp_path / "model.keras")
    assert gradcam.grad_cam(network, PIXELS, np.array([0, 2])).max() > 0.9


def test_keras_on_another_backend_is_one_sentence(networks, tmp_path):
    load("keras")
    if KERAS_BACKEND == "torch":
        pytest.skip("Keras is on PyTorch")
    with pytest.raises(ValueError, match=f"but it was imported on {KERAS_BACKEND} before"):
        networks.keras_network(tmp_path / "model.keras")


def logits_of(network, images=PIXELS):
    """Of images (N, S, S, 3), in NumPy."""
    torch = load("torch")
    return network.model(network.prepare(torch.from_numpy(images))).detach()
