"""The menu: `nox -s demo` to see it work, `nox` to check everything, `nox -l` for the list."""

import sys

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests", "interop", "lint", "types", "doctests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")

# Quiet and CPU-only; one thread a process, since the tests already run one process a core.
TEST_ENV = {
    "JAX_PLATFORMS": "cpu",
    # what is missing fails its tests instead of skipping them
    "LMF_MULTI_REQUIRE": "torch,jax,keras,flax,optax,rich,sklearn,pandas,PIL,tensorboard,"
    + "torchvision,orbax,matplotlib,pytorch_grad_cam"
    + (",triton,libtpu" if sys.platform == "linux" else ""),
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # the many short processes share what one has compiled
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def install(session: nox.Session, extras: str, *groups: str) -> None:
    """Install this checkout (editable, so what runs is what you edit) and groups of tools."""
    session.install("-e", f".{extras}", *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session
def demo(session: nox.Session) -> None:
    """Train on digits in three frameworks, then compare losses on a page; `-- --quick`: a taste."""
    install(session, "[all]")
    session.run("python", "-m", "examples.demo", *session.posargs)
    quick = "--quick" in session.posargs
    size = "--losses ce,lmf --seeds 1 --epochs 3" if quick else "--seeds 5 --epochs 30"
    recipe = f"{size} --learning-rate 1e-3 --decay-epochs 15"
    out = "runs/demo-quick" if quick else "runs/demo"
    session.run(*f"python -m examples.compare {recipe} --jobs 2 --out {out}".split())


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure time and memory beside cross-entropy, in each framework; `-- --quick` for a taste."""
    install(session, "[all,tpu]")
    frameworks = ("torch", "jax", "keras") if "--framework" not in session.posargs else (None,)
    for framework in frameworks:
        chosen = () if framework is None else ("--framework", framework)
        session.run("python", "-m", "examples.bench_loss", *chosen, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite, then its Keras part on the other two backends; `-- ARGS` for pytest."""
    install(session, "[all,tpu]", "test")
    pytest = ("pytest", "-n", "2", "--ignore=tests/interop")
    if session.posargs:
        session.run(*pytest, *session.posargs, env=TEST_ENV)
        return
    session.run(*pytest, env=TEST_ENV | {"KERAS_BACKEND": "tensorflow"})
    for backend in ("jax", "torch"):  # Keras fixes its backend at import: one process a backend
        session.run(*pytest, "-k", "keras", env=TEST_ENV | {"KERAS_BACKEND": backend})


@nox.session
def interop(session: nox.Session) -> None:
    """Train inside other packages, and compare with their losses; `-- ARGS` for pytest."""
    install(session, "[all]", "test", "interop")
    packages = "accelerate,kornia,lightning,monai,tensorflow,torchvision,transformers"
    required = f"{TEST_ENV['LMF_MULTI_REQUIRE']},{packages}"
    env = {"HF_HUB_OFFLINE": "1", "KERAS_BACKEND": "tensorflow", "LMF_MULTI_REQUIRE": required}
    session.run("pytest", *(session.posargs or ["tests/interop"]), env=TEST_ENV | env)


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Measure other packages' losses again, and write README's table of them."""
    install(session, "[all]", "test", "interop")
    env = TEST_ENV | {"KERAS_BACKEND": "tensorflow"}
    session.run("python", "-m", "tests.interop.peers", "--write", env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and likely mistakes with ruff; `-- --fix` mends what it can."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the library's types with mypy, strictly, against the real frameworks."""
    install(session, "[all]", "types")
    session.run("mypy", *session.posargs)


@nox.session
def doctests(session: nox.Session) -> None:
    """Run the examples in the library's docstrings."""
    install(session, "[all]", "test")
    env = TEST_ENV | {"KERAS_BACKEND": "tensorflow"}
    # which has none, and Triton cannot be imported after TensorFlow
    kernels = "--ignore=lmf_multi/torch/_triton_kernels.py"
    arguments = session.posargs or ["lmf_multi"]
    session.run("pytest", "--doctest-modules", kernels, *arguments, env=env)


# The oldest release that is promised of each framework, and what of the suite runs with it.
MINIMUMS = {
    "numpy": ([], ["tests/loss/test_spec.py", "tests/loss/test_reference.py"]),
    "jax": (["jax==0.4.36"], ["tests/loss/test_edges.py", "-k", "jax-jit or jax-operations"]),
    "torch": (
        ["torch==2.4"],
        [
            *("tests/loss/test_edges.py", "-k"),
            "torch-eager or torch-vmap or torch-compile and weights_of_0",
            "-W",  # its compiler causes this one itself
            "ignore:<class 'torch.autograd.function.Function'> should not:DeprecationWarning",
        ],
    ),
    "keras": (
        ["keras==3.6", "tensorflow==2.18"],
        ["tests/loss/test_edges.py", "-k", "keras-tensorflow-eager"],
    ),
    "flax": (["flax==0.12"], ["tests/loss/test_heads.py", "-k", "flax"]),
}


@nox.session(default=False, python="3.11")
@nox.parametrize("framework", list(MINIMUMS), ids=list(MINIMUMS))
def minimums(session: nox.Session, framework: str) -> None:
    """Run a part of the suite with the oldest supported NumPy and release of a framework."""
    packages, part = MINIMUMS[framework]
    # at once, or the tools' own dependencies would raise NumPy again
    groups = nox.project.dependency_groups(PYPROJECT, "test")
    session.install("-e", ".", "numpy==1.26.0", *packages, *groups)
    session.run("python", "-c", "import numpy; print('NumPy', numpy.__version__)")
    required = ",".join(package.partition("==")[0] for package in packages)
    env = {"KERAS_BACKEND": "tensorflow", "LMF_MULTI_REQUIRE": required}
    session.run("pytest", *(session.posargs or part), env=TEST_ENV | env)
