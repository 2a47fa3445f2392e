"""The frameworks' modules, each imported where a run is its own and its packages are there.

Each has ``network(run)``, from pixels uint8 (N, S, S, 3) to logits float32 (N, C), and
``EXPORTS``: by format, functions of a run and a file.
"""

import importlib
import os
from types import ModuleType

from examples.trained.finished import Finished
from examples.training.quiet import stderr_kept_back
from lmf_multi._extras import require

PACKAGES = {"torch": ("torch",), "flax": ("jax", "flax"), "keras": ("keras",)}
EXTRAS = {"torch": "torch", "flax": "jax", "keras": "keras"}
FORMATS = ("onnx", "savedmodel", "stablehlo")  # of all of them together
# What Keras does on one of its backends alone.
BACKENDS = {"--explain": "torch", "--export onnx": "torch", "--export savedmodel": "tensorflow"}


def module_of(run: Finished, explain: bool, export: str | None) -> ModuleType:
    """The module of the run's framework, and what maps and an export need besides is there.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: the framework has no such export, or Keras is on a backend without it.
    """
    framework = run.framework
    needs = [(name, f"a {framework} run", EXTRAS[framework]) for name in PACKAGES[framework]]
    if framework == "keras":
        backend = choose_backend(run, explain, export)
        extra = "keras" if backend == "tensorflow" else f"keras,{backend}"
        needs.insert(0, (backend, f"a keras run on {backend}", extra))  # which Keras imports
    if explain:
        needs += [(name, "--explain", "torch") for name in ("torch", "pytorch_grad_cam")]
    if export == "onnx":
        needs += [(name, "--export onnx", "torch,export") for name in ("torch", "onnxscript")]
    with stderr_kept_back():
        for package, user, extra in needs:
            require(package, user, f"'lmf-multi[{extra},examples]'")
        module = importlib.import_module(f"examples.trained.{framework}")
    if export and export not in module.EXPORTS:
        raise ValueError(
            f"--export of a {framework} run must be {' or '.join(module.EXPORTS)}, got {export}"
        )
    return module


def choose_backend(run: Finished, explain: bool, export: str | None) -> str:
    """Set KERAS_BACKEND, which Keras reads as it is imported; what it is set to already holds.

    Any backend opens what another has saved, so that it may be one that can do what is asked.

    Raises:
        ValueError: none can, or the one that is set cannot.
    """
    wishes = ["--explain"] * explain + [f"--export {export}"]
    needed = {BACKENDS[wish]: wish for wish in wishes if wish in BACKENDS}
    if len(needed) > 1:
        wants = " and ".join(f"{wish} needs {backend}" for backend, wish in needed.items())
        raise ValueError(f"Keras runs on one backend, but {wants}; give them in two commands")
    asked = os.environ.get("KERAS_BACKEND")
    for backend, wish in needed.items():
        if asked not in (None, backend):
            raise ValueError(
                f"{wish} of a keras run needs KERAS_BACKEND={backend}, got {asked}; "
                f"set it so, or leave it out"
            )
        asked = backend
    trained_on = [name for name in ("jax", "torch") if name in run.result.get("versions", ())]
    os.environ["KERAS_BACKEND"] = chosen = asked or (trained_on or ["tensorflow"])[0]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return chosen
