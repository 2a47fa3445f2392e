"""The package: exports, what an import brings along, absent frameworks, doctests."""

import doctest
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import lmf_multi
from tests.frameworks import load

ROOT = Path(lmf_multi.__file__).parents[1]
FRAMEWORKS = ("torch", "jax", "keras")
LOADED = ("torch", "jax", "keras", "tensorflow", "flax", "optax", "sklearn")
LOADED += ("torch._dynamo", "triton")  # which take seconds, and abort after TensorFlow
FUNCTIONS = {"lmf_loss", "ldam_loss", "focal_loss", "sigmoid_lmf_loss"}
CLASSES = {"LMFLoss", "LDAMLoss", "FocalLoss", "SigmoidLMFLoss"}
EXPORTS = {
    "lmf_multi": {
        "LMFSpec",
        "adjust_logits",
        "class_counts",
        "class_margins",
        "class_weights",
        "deferred_weights",
        "log_priors",
        "tune_adjustment",
        "__version__",
    },
    "lmf_multi.reference": FUNCTIONS
    | CLASSES
    | {"cosine_logits", "lmf_loss_and_grad", "sigmoid_lmf_loss_and_grad"},
    "lmf_multi.torch": FUNCTIONS | CLASSES | {"CosineLinear"},
    "lmf_multi.jax": FUNCTIONS | CLASSES | {"CosineLinear", "stack_losses"},
    "lmf_multi.keras": FUNCTIONS | CLASSES | {"CosineLinear", "DeferredReweighting"},
}


def importing(name):
    """The module, or a skip where its framework is absent."""
    framework = [*name.split("."), ""][1]
    if framework in FRAMEWORKS:
        load(framework)
    return importlib.import_module(name)


def run(code, *path, **environment):
    """Run code in a process of its own, with folders put before everything else on its path."""
    path = os.pathsep.join(map(str, [*path, ROOT]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --- exports


@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name):
    if name == "lmf_multi.jax":  # for CosineLinear
        load("flax")
    module = importing(name)
    assert set(module.__all__) == EXPORTS[name]
    assert len(module.__all__) == len(EXPORTS[name])
    for export in module.__all__:
        public = getattr(module, export)
        assert export == "__version__" or inspect.getdoc(public)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_same_arguments_everywhere(framework):
    """The reference's arguments in its order, but for the framework's own options at the end."""
    module, reference = (
        importing(f"lmf_multi.{framework}"),
        importlib.import_module("lmf_multi.reference"),
    )
    own = {"axis", "where", "reduction", "ignore_index", "from_logits", "ignore_class"}
    own |= {"name", "dtype", "process_group", "axis_name"}
    names = {"input": "logits", "target": "labels"}
    for export in FUNCTIONS | CLASSES:
        actual, expected = (
            [
                (names.get(parameter.name, parameter.name), parameter.kind, parameter.default)
                for parameter in inspect.signature(getattr(each, export)).parameters.values()
                if parameter.name not in own
            ]
            for each in (module, reference)
        )
        assert actual == expected, export


def test_version_is_that_of_the_distribution():
    try:
        installed = importlib.metadata.version("lmf-multi")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lmf-multi is not installed, only importable")
    assert installed == lmf_multi.__version__


def test_types_are_shipped():
    assert (files("lmf_multi") / "py.typed").is_file()


# --- what an import brings along


def brought_by(code, *path):
    """Frameworks in sys.modules after some code has run."""
    report = f"import json, sys; print(json.dumps([m for m in {LOADED!r} if m in sys.modules]))"
    result = run(f"{code}\n{report}", *path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["lmf_multi", "lmf_multi.reference", "lmf_multi.spec"])
def test_light_import(name):
    assert brought_by(f"import {name}") == []


def test_light_import_can_fail(tmp_path):
    (tmp_path / "keras.py").write_text("import torch\n")
    (tmp_path / "torch.py").write_text("")
    assert brought_by("import lmf_multi, keras", tmp_path) == ["torch", "keras"]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_framework_brings_no_other(framework):
    load(framework)
    assert brought_by(f"import lmf_multi.{framework}") == [framework]


# --- absent frameworks


def error_of(code, *path, **environment):
    """The last line that a failing process writes."""
    result = run(code, *path, **environment)
    assert result.returncode == 1, result.stdout
    return result.stderr.splitlines()[-1]


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {framework!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import lmf_multi
import lmf_multi.{framework}
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_absent_framework_names_its_extra(framework):
    assert error_of(HIDE.format(framework=framework)) == (
        f"ModuleNotFoundError: lmf_multi.{framework} needs {framework}, which is not installed; "
        f"run: pip install 'lmf-multi[{framework}]'"
    )


WITHOUT_FLAX = "import sys; sys.modules['flax'] = None\n"


def test_jax_without_flax_lacks_the_head_alone():
    load("jax")
    code = """
import lmf_multi.jax
from lmf_multi.jax import *
assert LMFLoss is lmf_multi.jax.LMFLoss
print([("CosineLinear" in names) for names in (lmf_multi.jax.__all__, dir(lmf_multi.jax))])
"""
    for first, there in (("", True), (WITHOUT_FLAX, False)):
        if there:
            load("flax")
        result = run(first + code)
        assert result.stdout == f"[{there}, {there}]\n", result.stderr
    for use in ("from lmf_multi.jax import CosineLinear", "lmf_multi.jax.CosineLinear"):
        assert error_of(f"{WITHOUT_FLAX}import lmf_multi.jax\n{use}") == (
            "ModuleNotFoundError: lmf_multi.jax.CosineLinear needs flax, which is not installed; "
            "run: pip install flax"
        )
    assert error_of("import lmf_multi.jax; lmf_multi.jax.Nothing") == (
        "AttributeError: module 'lmf_multi.jax' has no attribute 'Nothing'"
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise ImportError('libfoo.so is broken')", "ImportError: libfoo.so is broken"),
    ],
)
def test_another_import_error_passes_unchanged(tmp_path, framework, source, error):
    (tmp_path / f"{framework}.py").write_text(source)
    assert error_of(f"import lmf_multi.{framework}", tmp_path) == error


def test_keras_on_another_backend():
    load("keras")
    assert error_of("import lmf_multi.keras", KERAS_BACKEND="numpy") == (
        "ImportError: lmf_multi.keras needs one of the backends tensorflow, jax, torch, "
        "got 'numpy'; "
        "set KERAS_BACKEND before importing keras"
    )


# --- doctests


MODULES = [
    "lmf_multi",
    *(
        module.name
        for folder in ("", *(f"{framework}." for framework in FRAMEWORKS))
        for module in pkgutil.iter_modules(
            [str(ROOT / "lmf_multi" / folder.strip("."))], f"lmf_multi.{folder}"
        )
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    for suffix, framework in (("_tensorflow", "tensorflow"), ("jax._heads", "flax")):
        if name.endswith(suffix):
            load(framework)
    module = importing(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0
    public = [v for k, v in vars(module).items() if k in FUNCTIONS | CLASSES]
    if any(getattr(each, "__module__", None) == name for each in public):
        assert results.attempted > 0, f"{name} shows no example"


def test_modules_are_found():
    assert {"lmf_multi.spec", "lmf_multi.torch", "lmf_multi.keras._losses"} <= set(MODULES)
