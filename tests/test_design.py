"""The library's design, read from its sources: where calls go, what travels, and the names."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.frameworks import KERAS_BACKEND, load

ROOT = Path(importlib.util.find_spec("lmf_multi").origin).parent
PATHS = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
FRAMEWORKS = ("torch", "jax", "keras")


def imported(node):
    """The modules that an import names, as far as they are known: of packages their members."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    members = [f"{node.module}.{alias.name}" for alias in node.names]
    return [member if member in PATHS else node.module for member in members]


def imports(tree):
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in imported(node)
    ]


def own(names):
    return {name for name in names if name in PATHS}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]


def test_no_module_imports_what_imports_it():
    graph = {name: own(imports(tree)) for name, tree in TREES.items()}
    assert graph["lmf_multi.torch._mixture"] >= {"lmf_multi.torch._closed_form"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' imports '.join(reversed(error.args[1]))}")


def test_no_framework_imports_another():
    """But Keras, which is at home on JAX and on PyTorch."""

    def framework(name):
        return next((each for each in FRAMEWORKS if name.startswith(f"lmf_multi.{each}")), None)

    for name, tree in TREES.items():
        others = {framework(each) for each in own(imports(tree))} - {framework(name), None}
        allowed = {"jax", "torch"} if framework(name) == "keras" else set()
        assert others <= allowed, f"{name} imports {others}"


def test_functions_import_optional_packages_alone():
    """Of this package only what cannot be imported without such a one."""
    optional = ("torch", "jax", "keras", "tensorflow", "triton")
    for name, tree in TREES.items():
        for function in functions(tree):
            for each in imports(function):
                needs = imports(TREES[each]) if each in PATHS else [each]
                roots = {module.partition(".")[0] for module in needs}
                assert roots & set(optional), f"{name} imports {each} in a function"


# Whose order others decide: PyTorch's operators are flat, and clones' arguments stand as they do.
FLAT = {
    "lmf_multi.torch._cpu": {"operator"},
    "lmf_multi._constructors": {"from_legacy", "from_official"},
}


def test_no_list_of_more_than_six():
    """What belongs together is a named tuple; what has a name is said with it."""
    for name, tree in TREES.items():
        if name == "lmf_multi.torch._triton_kernels":
            continue  # the language of older Triton has no tuples with names
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                place = f"{name}:{node.lineno}"
                assert len(node.args) <= 6, f"{place} calls with {len(node.args)} by position"
            if isinstance(node, ast.FunctionDef) and node.name not in FLAT.get(name, ()):
                if is_public(node, name):
                    continue
                listed = [each.arg for each in node.args.posonlyargs + node.args.args]
                listed = [each for each in listed if each not in ("self", "cls")]
                assert len(listed) <= 6, f"{name}: {node.name} takes {listed} by position"


def is_public(function, module):
    """Whether users call it: then the interface decides."""
    return not function.name.startswith("_") and any(
        isinstance(node, ast.ImportFrom) and function.name in [alias.name for alias in node.names]
        for package in ("lmf_multi", "lmf_multi.spec", *(f"lmf_multi.{f}" for f in FRAMEWORKS))
        for node in ast.walk(TREES[package])
        if isinstance(node, ast.ImportFrom) and node.module == module
    )


# The stations of each framework, in the order of a call, and the reference, which is one file.
STATIONS = {
    "torch": ("_functional", "_preparation", "_mixture", "_closed_form"),
    "jax": ("_functional", "_preparation", "_mixture", "_closed_form"),
    "keras._tensorflow": ("_functional", "_preparation", "_mixture", "_closed_form"),
}
STEPS = [
    *("soft_targets", "targets", "sigmoid_targets", "by_label", "normalizers"),
    "mixture",
    *("value_and_grad", "one_class", "all_classes", "sigmoid", "weights", "sums_of_others"),
    *("chain", "log_odds", "difference", "adjusted", "ldam", "focal", "tail", "times"),
]


def names(module):
    return [
        node.name.lstrip("_") for node in TREES[module].body if isinstance(node, ast.FunctionDef)
    ]


@pytest.mark.parametrize("framework", STATIONS)
def test_the_same_steps_in_the_same_order(framework):
    modules = [f"lmf_multi.{framework}.{each}" for each in STATIONS[framework]]
    found = [name for module in modules if module in TREES for name in names(module)]
    assert [name for name in found if name in STEPS] == STEPS


def test_the_reference_has_the_same_steps():
    found = [name for name in names("lmf_multi.reference") if name in STEPS]
    assert found == [name for name in STEPS if name in found]
    assert {"targets", "normalizers", "all_classes", "sigmoid", "ldam", "focal"} <= set(found)


def torch_call():
    torch, losses = load("torch"), load("lmf_multi.torch")
    losses.lmf_loss(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]), [0.1] * 3)


def jax_call():
    jax, losses = load("jax"), load("lmf_multi.jax")
    labels = jax.numpy.array([0, 1, 2, 0])
    jax.grad(lambda z: losses.lmf_loss(z, labels, [0.1] * 3).sum())(jax.numpy.zeros((4, 3)))


def tensorflow_call():
    if KERAS_BACKEND != "tensorflow":
        pytest.skip("runs with Keras on tensorflow")
    tf, losses = load("tensorflow"), load("lmf_multi.keras")
    losses.lmf_loss(tf.zeros((4, 3)), tf.constant([0, 1, 2, 0]), [0.1] * 3)


@pytest.mark.parametrize("call", [torch_call, jax_call, tensorflow_call], ids=lambda f: f.__name__)
def test_a_call_is_at_most_six_deep(monkeypatch, call):
    """From the public function to the arithmetic, counted in frames of this package."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    call()  # what is imported and compiled once is no part of a call
    stacks = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_name == "one_class":
            stack = []
            while frame is not None:
                if Path(frame.f_code.co_filename).is_relative_to(ROOT):
                    stack.append(frame.f_code.co_name)
                frame = frame.f_back
            stacks.append(stack[::-1])

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert stacks and all(stack[0] == "lmf_loss" for stack in stacks)
    assert max(map(len, stacks)) <= 6, stacks


WITHOUT = """
import sys
import numpy as np
import torch
sys.modules[{missing!r}] = None  # as if an upgrade had moved it
from lmf_multi import reference
import lmf_multi.torch as losses

z, y = np.random.default_rng(0).normal(0, 3, (40, 3)).astype(np.float32), np.arange(40) % 3
for name, counts, options, labels in (
    ("LMFLoss", ([90, 10, 3],), {{}}, y),
    ("LMFLoss", ([90, 10, 3],), {{"label_smoothing": 0.1}}, y),
    ("SigmoidLMFLoss", ([9, 5, 4], [20, 9, 9]), {{}}, np.eye(3, dtype=int)[y]),
):
    loss, exact = (getattr(each, name)(*counts, **options) for each in (losses, reference))
    function = {{"LMFLoss": reference.lmf_loss_and_grad}}.get(
        name, reference.sigmoid_lmf_loss_and_grad
    )
    value, grad = function(z, labels, exact.margins, exact.class_weight, **options)
    x = torch.tensor(z, requires_grad=True)
    result = loss(x, torch.tensor(labels))
    np.testing.assert_allclose(result.item(), value, rtol=1e-5)
    (slope,) = torch.autograd.grad(result, x)
    np.testing.assert_allclose(slope, grad, rtol=1e-4, atol=1e-5 * abs(grad).max())
"""


@pytest.mark.parametrize("missing", ["torch._C._functorch", "torch._functorch.pyfunctorch"])
def test_torch_without_its_private_modules(missing):
    """An upgrade that moves one turns off what it served, and breaks no import."""
    pytest.importorskip("torch")
    code = WITHOUT.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
