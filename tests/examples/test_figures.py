"""The figures of a study: what is drawn is what the result files say, for every eye and page."""

import importlib.util
import re
from itertools import chain

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from tests.examples.networks import PIXELS, assert_same, models_of, predict
from tests.frameworks import KERAS_BACKEND, load

for package in ("matplotlib", "sklearn", "rich", "tensorboard"):
    load(package)

from matplotlib import colormaps  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402

from examples.study import comparisons, figures, picture, prediction_figures  # noqa: E402
from tests.examples.studies import COUNTS, NAMES, made_up  # noqa: E402


def heights(axes):
    """Of the bars, left to right."""
    return [bar.get_height() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())]


def test_every_figure_is_written(tmp_path, capsys):
    data = ["digits", "other.npz"]
    made_up(tmp_path, ["ce", "lmf", "lmf:alpha=0.5"], data=data, frameworks=["flax", "torch"])
    assert figures.main([str(tmp_path)]) == 0
    names = {
        *(
            f"{what}-{data}"
            for what in ("against-ce", "macro-f1", "images-per-class")
            for data in ("digits", "other")
        ),
        "sweep-alpha",
        *(
            f"{what}-{data}-small-{framework}"
            for what in ("f1", "confusion", "precision-recall", "reliability")
            for data in ("digits", "other")
            for framework in ("flax", "torch")
        ),
    }
    files = list((tmp_path / "figures").iterdir())
    assert {file.stem for file in files} == names
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert len(np.unique(pixels)) > 10  # there is something to see
    told = capsys.readouterr().out
    for framework in ("flax", "torch") if importlib.util.find_spec("torch") else ():
        assert (
            f"Grad-CAM of digits, small, {framework} is left out: the test images must be those "
            f"that digits-small-{framework}-ce-0 predicted, but the data have changed since" in told
        )
        assert f"Grad-CAM of other, small, {framework} is left out: data must be digits," in told


def luminance(rgb):
    """Of sRGB (…, 3), as the Web's contrast guidelines have it."""
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_differences_are_drawn_with_their_intervals(tmp_path):
    planned = made_up(tmp_path, ["ce", "ldam", "lmf"], frameworks=["flax", "torch"])
    compared = comparisons.against_baseline(planned, planned.results())
    figure = figures.forest(compared, "digits").figure
    assert [axes.get_title() for axes in figure.axes] == [
        "digits, small, flax",
        "digits, small, torch",
    ]
    for axes in figure.axes:
        kind = tuple(axes.get_title().split(", "))
        mine = [each for each in compared if each.kind == kind]
        drawn = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 1]
        lines = [line for line in axes.lines[1:] if len(line.get_xydata()) == 2]
        assert {line.get_linestyle() for line in lines} == {"-"}
        assert sorted(x for ((x, _),) in drawn) == sorted(each.mean for each in mine)
        ends = sorted(tuple(line.get_xdata()) for line in lines)
        assert ends == sorted((each.low, each.high) for each in mine)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["ce", "ldam", "lmf"]
        places = {(x, round(y)) for ((x, y),) in drawn}
        assert places == {(each.mean, ["ce", "ldam", "lmf"].index(each.loss)) for each in mine}
    shapes = {marker for marker, *_ in figures.RULES.values()}
    assert len(shapes) == len(figures.RULES)  # told apart without colour


def test_intervals_over_seeds_alone_are_dotted(tmp_path):
    scores = {"ce": [0.5, 0.6, 0.7], "lmf": [0.7, 0.9, 0.8]}
    planned = made_up(tmp_path, list(scores), seeds=3, scores=scores)
    compared = comparisons.against_baseline(planned, planned.results())
    (axes,) = figures.forest(compared, "digits").figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", ":", "None"]


def test_the_heat_map_has_the_commonest_class_first_and_is_legible(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=3)
    ((kind, losses),) = comparisons.by_kind(planned.results()).items()
    figure = figures.heat_map(planned.results(), kind, losses).figure
    assert [axes.get_title() for axes in figure.axes] == ["argmax", "τ tuned"]
    for axes in figure.axes:
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["mole 600", "vein 30", "wart 5"]
        shown = axes.images[0].get_array()
        for row, seeds in enumerate(losses.values()):
            tests = [comparisons.scored(r, axes.get_title()) for r in seeds.values()]
            expected = np.mean([test["f1"] for test in tests], axis=0)[[1, 0, 2]]
            np.testing.assert_allclose(shown[row], expected, rtol=1e-12)
        assert axes.texts[0].get_text() == f"{shown[0, 0]:.2f}"
    values = np.linspace(0, 1, 201)
    shades = luminance(colormaps[figures.SHADES](values)[:, :3])
    assert np.all(np.diff(shades) >= 0)  # so that grey says the same
    ink = luminance([to_rgb(figures.ink_on(value)) for value in values])
    contrast = (np.maximum(ink, shades) + 0.05) / (np.minimum(ink, shades) + 0.05)
    assert contrast.min() > 4.5


def test_lines_and_bars_are_told_apart_without_colour():
    for styles, keys in (
        (picture.line_styles(), ["linestyle", "marker"]),
        (picture.bar_styles(), ["hatch"]),
    ):
        first = [
            tuple(style[key] for key in keys) for style, _ in zip(styles, range(8), strict=False)
        ]
        assert len(set(first)) == 8


def test_a_page_gives_a_figure_its_ground_and_its_ink(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)
    drawn = [p.svg() for p in chain(figures.findings(planned), figures.details(planned))]
    ids = []
    for element in drawn:
        assert element.startswith("<svg") and "currentColor" in element
        assert picture.INK not in element and "http" not in element
        named = set(re.findall(r' id="(p\w{10})"', element))  # what clips, of each figure its own
        assert set(re.findall(r"url\(#(\w+)\)", element)) <= named
        ids += named
        width = float(re.search(r'width="([\d.]+)pt"', element)[1])
        assert width / 72 <= picture.WIDTH
    assert len(ids) == len(set(ids)) > 0


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
    tuned = {t: r | {"settings_tried": 12} for t, r in found.items()}  # each by itself
    assert list(figures.sweep(tuned, "alpha")) == []


def test_long_names_leave_room(tmp_path):
    """For axes, which matplotlib's layout would give up with a warning."""
    losses = [
        f"ldam:scale={i}:max-margin=2:logit-adjustment=1:class-weight=none" for i in range(1, 10)
    ]
    planned = made_up(tmp_path, ["ce", *losses], seeds=2)
    drawn = [*figures.findings(planned), *prediction_figures.pictures(planned)]
    assert len(drawn) == 5
    for each in drawn:
        assert len(each.png()) > 10_000
        labels = [text for axes in each.figure.axes for text in axes.get_yticklabels()]
        assert max(len(text.get_text().split("\n")[0]) for text in labels) <= 36


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
    axes_of_class = drawn["precision-recall-digits-small-torch"].axes
    for c, axes in enumerate(axes_of_class[: len(NAMES)]):
        average = average_precision_score(labels == c, probabilities[:, c])
        assert axes.get_title() == NAMES[c]
        recall, precision = axes.lines[1].get_data()
        np.testing.assert_allclose(-np.diff(recall) @ precision[:-1], average, rtol=1e-6)
    (legend,) = drawn["precision-recall-digits-small-torch"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["ce", "lmf"]

    axes = drawn["reliability-digits-small-torch"].axes[1]
    confidence, shares = axes.lines[1].get_data()
    last = probabilities.max(1) > 0.9
    np.testing.assert_allclose(confidence[-1], probabilities.max(1)[last].mean(), rtol=1e-6)
    np.testing.assert_allclose(shares[-1], right[last].mean(), rtol=1e-12)


def test_result_files_alone_are_enough_for_what_they_say(tmp_path, capsys):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)
    for file in tmp_path.glob("runs/*/*"):
        if file.name == "checkpoints":
            file.rmdir()
        elif file.name != "result.json":
            file.unlink()
    drawn = [p.name for p in chain(figures.findings(planned), figures.details(planned))]
    assert drawn == [
        "against-ce-digits",
        "f1-digits-small-torch",
        "macro-f1-digits",
        "images-per-class-digits",
        "confusion-digits-small-torch",
    ]
    told = capsys.readouterr().out
    missing = {"Precision, recall and reliability of": "predictions.npz", "Grad-CAM": "checkpoints"}
    for what, name in missing.items():
        line = next(line for line in told.splitlines() if line.startswith(what))
        file = tmp_path / "runs" / "digits-small-torch-ce-0" / name
        assert "left out" in line and str(file) in line


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
    models, checkpoints = models_of("flax"), load("examples.training.checkpoints_flax")
    nnx, models_torch = load("flax.nnx"), load("examples.models.torch")
    model = models.build("small", 3, head=head, rngs=nnx.Rngs(0))
    logits = model(models.normalize(PIXELS))  # in training: the running statistics change
    checkpoints.save(nnx.state({"model": model}), tmp_path)
    model.eval()
    logits = model(models.normalize(PIXELS))
    twin = models_torch.build("small", 3, head=head)
    networks.load_flax(twin, tmp_path)
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
