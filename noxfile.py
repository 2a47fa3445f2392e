"""The menu: `nox -s demo` to see it work, `nox` to check everything, `nox -l` for the list."""

import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

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
    + "torchvision,matplotlib,pytorch_grad_cam,optuna,timm,nbclient,ipykernel,"
    + "onnxscript,onnxruntime,ray"
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
    size = "--seeds 1 --epochs 3" if quick else "--seeds 5 --epochs 30"
    losses = "ce,lmf" if quick else "ce,la,focal,ldam,lmf"
    recipe = f"--losses {losses} {size} --learning-rate 1e-3 --decay-epochs 15"
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
    """Run the test suite, its Keras part on each of Keras' backends; `-- ARGS` for pytest."""
    install(session, "[all,tpu,cluster]", "test")
    pytest = ("pytest", "-n", "2", "--ignore=tests/interop")
    if session.posargs:
        session.run(*pytest, *session.posargs, env=TEST_ENV)
        return
    # Processes of their own: Keras fixes its backend at import, and TensorFlow never lets go of the
    # memory that compiled code takes.
    session.run(*pytest, "-k", "not keras", env=TEST_ENV | {"KERAS_BACKEND": "tensorflow"})
    for backend in ("tensorflow", "jax", "torch"):
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
def docs(session: nox.Session) -> None:
    """Build the site into site/, strictly, studies' pages and all; `-- serve` shows it instead."""
    install(session, "[examples]", "docs", "test")
    env = TEST_ENV | {"LMF_MULTI_REQUIRE": "griffe,latex2mathml,mkdocs", "NO_MKDOCS_2_WARNING": "1"}
    session.run("pytest", "tests/test_docs.py", env=env)
    for study in ("heads", "cnn", "ham10000"):
        session.run("python", "-m", "examples.html_report", f"examples/study/{study}")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env=env)


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Measure other packages' losses again, and write the table of docs/other-losses.md."""
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


# --- the compiled kernel

PYTHONS = nox.project.python_versions(PYPROJECT)
CLANG = {"CC": "clang", "CXX": "clang++"}
PURE = {"asked": {"LMF_MULTI_PURE": "1"}, "no-compiler": {"CC": "absent", "CXX": "absent"}}
WITHOUT_COMPILER = """
import shutil, sys, lmf_multi
from lmf_multi._kernel import library
compilers = [*map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "clang++"))]
assert not any(compilers), compilers
assert lmf_multi.__file__.startswith(sys.prefix), lmf_multi.__file__
assert library() is not None, "the kernel was not found"
print(f"Python {sys.version.split()[0]} without a compiler: {library()}")
"""


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build this platform's wheel, and Clang's, and use them in each Python without a compiler."""
    session.install("auditwheel", "twine", "uv")
    dist = emptied(session, "dist")
    session.run("uv", "build", "--sdist", "--out-dir", dist)
    wheels = [build(session, dist, "platform")]
    if shutil.which("clang++"):
        wheels.append(build(session, dist, "clang", **CLANG))
    else:
        session.warn("Clang's wheel is left out, as there is no clang++ on the path")
    if sys.platform == "linux":
        for each in wheels:
            session.run("auditwheel", "show", each)
    pure = [build(session, dist, name, **PURE[name]) for name in PURE]
    session.run("twine", "check", "--strict", *dist.rglob("*.tar.gz"), *dist.rglob("*.whl"))
    for each in [*wheels, *pure]:
        names = [name for name in ZipFile(each).namelist() if name.endswith((".so", ".dylib"))]
        held, tag = (0, "-py3-none-any.whl") if each in pure else (1, "-py3-none-*_*.whl")
        if len(names) != held or not each.match(f"*{tag}"):
            session.error(f"{each} must hold {held} libraries and match *{tag}, holds {names}")
    for python in PYTHONS:
        session.notify(f"installed-{python}", map(str, wheels))


@nox.session(default=False, python=PYTHONS)
def installed(session: nox.Session) -> None:
    """Use wheels without a compiler, the oldest Python with frameworks; `nox -s wheel` asks it."""
    extras = "[torch,jax,keras]" if session.python == PYTHONS[0] else ""
    tests = ["alone", *(("cpu", "jax_cpu", "keras_cpu") if extras else ())]
    files = [f"tests/kernels/test_{name}.py" for name in tests]
    required = f"numpy,{extras.strip('[]')}"
    env = {"KERAS_BACKEND": "tensorflow", "LMF_MULTI_REQUIRE": required, "PATH": session.bin}
    for each in map(Path, session.posargs):
        groups = nox.project.dependency_groups(PYPROJECT, "test")
        package = f"lmf-multi{extras} @ {each.as_uri()}"
        session.install("--reinstall-package", "lmf-multi", package, *groups)
        with session.chdir(copied(session, "tests")):  # where the package is not beside them
            session.run("python", "-c", WITHOUT_COMPILER, env=env)
            # torch.compile takes a compiler of its own
            session.run("pytest", *files, "-k", "not compiled", env=TEST_ENV | env)


# What GCC calls its library, and how it compiles for it; what the environment says to it.
SANITIZERS = {
    "tsan": ("-fsanitize=thread", {"TSAN_OPTIONS": "halt_on_error=1"}),
    "asan": (  # Python leaves memory behind itself
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
    ),
}
WATCHED = {
    "tests/kernels/pool.cpp": "pool.so",
    "lmf_multi/_kernel/loss.cpp": "lmf_multi/_kernel/_loss.so",
}


@nox.session(default=False)
def sanitize(session: nox.Session) -> None:
    """Call the kernel at random while GCC's sanitizers watch; `-- N`: so many calls a test."""
    session.install("numpy", *nox.project.dependency_groups(PYPROJECT, "test"))
    compiler = "g++ -std=gnu++17 -O1 -g -fno-math-errno -fno-trapping-math -pthread -Wno-psabi"
    calls = {"LMF_MULTI_RANDOM_CALLS": (session.posargs or ["100"])[0], "OPENBLAS_NUM_THREADS": "1"}
    required = {"LMF_MULTI_REQUIRE": "numpy"}
    for name, (flags, options) in SANITIZERS.items():
        find = ("g++", f"-print-file-name=lib{name}.so")
        runtime = session.run(*find, external=True, silent=True).strip()
        folder = copied(session, "tests", "lmf_multi")
        with session.chdir(folder):
            for source, library in WATCHED.items():
                command = f"{compiler} {flags} -shared -fPIC {source} -o {library} -ldl"
                session.run(*command.split(), external=True)
            for preloaded in (runtime, f"{runtime} {folder}/pool.so"):  # its threads, or others
                env = calls | required | options | {"LD_PRELOAD": preloaded}
                session.run("python", "-m", "pytest", "-s", "tests/kernels/test_alone.py", env=env)


def emptied(session: nox.Session, name: str) -> Path:
    """A folder for what the session makes."""
    folder = Path(session.create_tmp()).resolve() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def copied(session: nox.Session, *names: str) -> Path:
    """A folder with nothing but these of the checkout, and what pytest is told."""
    folder, ignored = emptied(session, "copy"), shutil.ignore_patterns("*.so", "__pycache__")
    for name in names:
        shutil.copytree(name, folder / name, ignore=ignored)
    shutil.copy("pyproject.toml", folder)
    return folder


def build(session: nox.Session, dist: Path, name: str, **environment: str) -> Path:
    """A wheel, out of the sdist that lies in ``dist``, where no earlier build has left anything."""
    (sdist,) = dist.glob("*.tar.gz")
    session.run("uv", "build", "--wheel", "--out-dir", dist / name, sdist, env=environment)
    (wheel,) = (dist / name).glob("*.whl")
    return wheel
