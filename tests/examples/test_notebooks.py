"""The notebooks, which Jupyter runs from the first cell to the last, as their readers do."""

import base64
import io
import json
import os
import re
import shlex
from functools import cache

import numpy as np
import pytest

from tests.frameworks import KERAS_BACKEND, load

for package in ("nbclient", "ipykernel", "sklearn", "scipy", "rich", "PIL", "matplotlib", "optuna"):
    load(package)

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from examples import compare  # noqa: E402
from examples.data import datasets  # noqa: E402
from examples.study.planning import plan  # noqa: E402
from examples.training import results  # noqa: E402
from examples.training.settings import parse  # noqa: E402
from lmf_multi import LMFSpec, reference  # noqa: E402
from tests.pages import ROOT, page, snippets  # noqa: E402

FOLDER = ROOT / "examples" / "notebooks"
README = page("README.md")
NEEDS = {
    "pytorch": ["torch"],
    "flax": ["jax", "flax", "optax"],
    "keras": ["keras", KERAS_BACKEND],
}
MODULES = {"pytorch": "torch", "flax": "jax", "keras": "keras"}  # of lmf_multi
TRAINERS = {"pytorch": "torch", "flax": "flax", "keras": "keras"}
LOSSES = ("cross-entropy", "recommended")

# run after the last cell, to score the same logits here
LOGITS = """
import json
print(json.dumps({loss: [each.tolist() for each in pair] for loss, pair in logits.items()}))
"""


@cache
def text(name):
    return (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")


def read(name):
    return nbformat.reads(text(name), as_version=nbformat.NO_CONVERT)


def sources(name, kind):
    return "\n".join(cell.source for cell in read(name).cells if cell.cell_type == kind)


# --- run


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    """Start a notebook's kernel in a folder, with what a user's environment has; the cells run."""
    ours = ("PYTHONPATH", "PYTHONWARNINGS", "TF_CPP_MIN_LOG_LEVEL", "MPLBACKEND")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["IPYTHONDIR"] = str(tmp_path / "ipython")  # nobody's start-up files
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))

    def run(notebook, folder):
        # no kernel_name: the notebook's own
        client = NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": str(folder)}}
        )
        client.execute(env=env)
        return {cell.id: cell for cell in notebook.cells}

    return run


def with_data(notebook, source):
    """The one line changed that the notebook asks its reader to change."""
    line = 'DATA = "digits"'
    (cell,) = (cell for cell in notebook.cells if line in cell.source.splitlines())
    cell.source = cell.source.replace(line, f"DATA = {str(source)!r}")
    return notebook


def folder_of_digits(root):
    """Three digits as class folders of PNG files, in training 64, 24 and 8 of them."""
    digits = load_digits()
    for digit, (name, count) in enumerate({"a_nought": 64, "a_one": 24, "a_two": 8}.items()):
        rows = iter(np.flatnonzero(digits.target == digit))
        for split, size in (("train", count), ("val", 20), ("test", 40)):
            for _ in range(size):
                row = next(rows)
                file = root / split / name / f"{row}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((255 / 16 * digits.images[row]).astype(np.uint8)).save(file)
    return root


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("data", ["digits", "folder"])
def test_a_notebook_runs_and_its_table_is_true(name, data, jupyter, tmp_path):
    """The digits from the checkout, a folder of images from beside the notebook."""
    for package in NEEDS[name]:
        load(package)
    notebook, source, start = read(name), "digits", ROOT
    if data == "folder":
        source, start = folder_of_digits(tmp_path / "images"), FOLDER
        notebook = with_data(notebook, source)
    notebook.cells.append(nbformat.v4.new_code_cell(LOGITS, id="logits"))
    cells = jupyter(notebook, start)

    warned = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr"
    ]
    assert not warned, "".join(warned)

    dataset = datasets.load(source, 28)
    logits = json.loads(printed(cells["logits"]))
    expected = columns(dataset, logits)
    rows = table(cells["table"])
    assert rows.pop("test images") == list(expected)
    assert list(rows) == ["macro-F1", "balanced accuracy", *class_rows(dataset)]
    shown = np.array(list(rows.values()), dtype=float)
    np.testing.assert_allclose(shown, np.transpose(list(expected.values())), atol=0.00051)
    # calling every image the same has a balanced accuracy of 0.33 at most
    assert shown[:2].min() > 0.7, rows

    falls = [float(loss) for loss in re.findall(r"mean loss (\S+)", printed(cells["run"]))]
    for losses in np.reshape(falls, (len(LOSSES), -1)):
        assert len(losses) > 1 and losses[-1] < losses[0]
    assert f"{len(dataset.train)} images to train" in printed(cells["load"])
    assert pixels(cells["show"]).any()
    drawn = pixels(cells["draw"])
    for colour in ("#0072b2", "#d55e00"):  # Okabe and Ito's blue and vermillion
        assert (drawn == np.array(list(bytes.fromhex(colour[1:])))).all(-1).sum() > 20, colour


def columns(dataset, logits):
    """What the table has to show, by its heads: macro-F1, balanced accuracy, F1 of each class."""
    found = {}
    assert list(logits) == list(LOSSES)
    for loss, (val, test) in logits.items():
        kept = {"val_labels": dataset.val.labels, "val_logits": np.array(val)}
        kept["class_counts"] = dataset.class_counts
        tuned = results.tuned(dataset.test.labels, np.array(test), **kept)
        plain = results.scores(dataset.test.labels, np.array(test))
        for rule, scores in (("argmax", plain), (f"τ = {tuned['tau']:.2f}", tuned["test"])):
            found[f"{loss} {rule}"] = [
                scores["macro_f1"],
                scores["balanced_accuracy"],
                *scores["f1"],
            ]
    return found


def class_rows(dataset):
    return [
        f"F1 of {name} ({count})"
        for name, count in zip(dataset.class_names, dataset.class_counts, strict=True)
    ]


def table(cell):
    """By the first cell of each row, the others, of a table in box characters."""
    (output,) = cell.outputs
    assert "<pre" in output.data["text/html"]
    plain = re.sub(r"\x1b\[[\d;]*m", "", output.data["text/plain"])
    lines = [re.split("[│┃]", line)[1:-1] for line in plain.splitlines()]
    lines = [[cell.strip() for cell in line] for line in lines if line]
    upper, lower, *rows = lines  # the head has two lines
    head = [" ".join(filter(None, pair)) for pair in zip(upper, lower, strict=True)]
    return {first: others for first, *others in [head, *rows]}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def pixels(cell):
    """Of the figure under a cell, which has one: uint8 (H, W, 3)."""
    (output,) = cell.outputs
    png = io.BytesIO(base64.b64decode(output.data["image/png"]))
    return np.asarray(Image.open(png).convert("RGB"))


# --- read


@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_is_valid_and_holds_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert len(text(name)) < 20_000


@pytest.mark.parametrize("name", NEEDS)
def test_the_loss_is_the_one_that_readme_recommends(name):
    (loss,) = re.findall(r"^criterion = (\S+)", README, re.M)
    assert loss == "LMFLoss.from_spec(LMFSpec.recommended(class_counts))"
    code = sources(name, "code")
    assert f'"recommended": {loss},' in code
    assert f"from lmf_multi.{MODULES[name]} import LMFLoss" in code
    (start,) = (
        each
        for each in snippets(page("docs/get-started.md"))
        if f"lmf_multi.{MODULES[name]}" in each
    )
    for function in ("adjust_logits", "tune_adjustment"):
        assert f"{function}(" in start and f"{function}(" in code


@pytest.mark.parametrize("name", NEEDS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)]+)\)", sources(name, "markdown"))
    assert "../../README.md#which-loss" in links
    for link in links:
        path, _, heading = link.partition("#")
        assert (FOLDER / path).exists(), link
        if heading:
            text = (FOLDER / path).read_text(encoding="utf-8")
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", text, re.M)), link
    assert f"(examples/notebooks/{name}.ipynb)" in README


def anchor(heading):
    """What GitHub makes of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NEEDS)
def test_commands_train_with_the_same_loss(name):
    prose = sources(name, "markdown")
    assert "one seed tells nothing about which loss is better" in prose
    block = re.search(r"```console\n(.*?)```", prose, re.S)[1].replace("\\\n", " ")
    trainer, study = map(shlex.split, block.splitlines())
    assert trainer[:3] == ["python", "-m", f"examples.train_{TRAINERS[name]}"]
    assert study[:3] == ["python", "-m", "examples.compare"]

    args, flags = compare.parse(study[3:])
    assert args.frameworks == [TRAINERS[name]] and args.seeds == 5 and args.losses[0] == "ce"
    trainings = plan(args.data, args.archs, args.frameworks, args.losses, args.seeds, flags)
    compared = trainings[len(args.losses) - 1].settings()  # its seed 0
    counts = [100, 10, 2]
    recommended = reference.LMFLoss.from_spec(LMFSpec.recommended(counts))
    logits = np.random.default_rng(0).normal(size=(8, 3))
    for settings in (parse(TRAINERS[name], trainer[3:], ""), compared):
        assert settings.loss == "ldam"
        loss = reference.LDAMLoss(**settings.loss_arguments(counts))
        labels = np.arange(8) % 3
        assert float(loss(logits, labels)) == pytest.approx(float(recommended(logits, labels)))
