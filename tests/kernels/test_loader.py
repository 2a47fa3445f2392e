"""The compiled CPU kernel as it is found, refused and switched off, whatever calls it."""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import lmf_multi
from lmf_multi import _kernel, reference
from tests.checks import refuses
from tests.engines import kernel_switch
from tests.frameworks import load, need_kernel

SWITCH = "LMF_MULTI_CPU_KERNEL"
PACKAGE = Path(lmf_multi.__file__).parent
OTHER = """
extern "C" {
%s
int lmf_multi_loss(void *) { __builtin_trap(); }
}
"""
NEXT = f"extern const int lmf_multi_interface = {_kernel.INTERFACE + 1};"
LOG = """
import logging
logging.basicConfig(format="%(message)s")
logging.getLogger("lmf_multi").setLevel(logging.DEBUG)
"""
OPEN = f"""{LOG}
from lmf_multi._kernel import library
print(library(), library())
"""


@pytest.fixture
def compiled():
    """The kernel, or a skip where no compiler was at hand when the package was installed."""
    need_kernel(_kernel.library(), "torch")
    return _kernel.library()


def compiler():
    found = shutil.which("g++") or shutil.which("clang++")
    return found or pytest.skip("no C++ compiler")


@pytest.fixture
def copy(tmp_path):
    """The package without its kernel, in a folder of its own."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "lmf_multi", ignore=ignored)
    return tmp_path


def library_of(copy):
    return copy / "lmf_multi/_kernel/_loss.so"


def compile_into(copy, source):
    command = [compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library_of(copy))]
    subprocess.run(command, input=source, text=True, check=True)


def run(folder, code, **environment):
    """What code prints and logs, in a process that imports the package from this folder."""
    environment = {k: v for k, v in os.environ.items() if k != SWITCH} | environment
    environment |= {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_a_missing_library_is_said_once(copy):
    printed, logged = run(copy, OPEN)
    assert printed == "None None"
    assert logged.splitlines() == [
        "The loss takes many operations on CPUs, without the kernel: it was not compiled"
    ]


@pytest.mark.parametrize("interface", [NEXT, ""], ids=["another", "none"])
def test_another_interface_is_refused(copy, interface):
    compile_into(copy, OTHER % interface)
    printed, logged = run(copy, OPEN)
    assert printed == "None None"
    (line,) = logged.splitlines()
    said = f"interface {_kernel.INTERFACE + 1}, not {_kernel.INTERFACE}"
    assert (said if interface else "undefined symbol: lmf_multi_interface") in line


def test_what_is_no_library_is_refused(copy):
    library_of(copy).write_text("of another machine")
    printed, logged = run(copy, OPEN)
    assert printed == "None None" and len(logged.splitlines()) == 1


def test_another_name_is_never_found(copy):
    """One Python's extension module, which an earlier release left in the folder."""
    name = f"_loss{sysconfig.get_config_var('EXT_SUFFIX')}"
    shutil.copy(sys.executable, library_of(copy).with_name(name))
    assert run(copy, OPEN)[1].endswith("it was not compiled")


WARN = """
import logging, warnings
from lmf_multi import _kernel
logging.captureWarnings(True)
logging.basicConfig(format="%(message)s")
_kernel.library(), _kernel.library(2**14 - 1)
for _ in range(2):
    _kernel.library(2**14)
    warnings.simplefilter("always")
"""


def test_a_missing_library_warns_once(copy):
    """From the first call on that has many logits to compute."""
    said = (
        "The loss of many logits on CPUs is faster by its compiled kernel, which is missing: {}; "
        "`pip install --force-reinstall --no-deps --no-cache-dir lmf-multi` brings it in a wheel "
        "for this system, or compiles it, with GCC or Clang and --no-binary lmf-multi; "
        "LMF_MULTI_CPU_KERNEL=0 in the environment silences this"
    )
    line, *others = run(copy, WARN)[1].splitlines()
    assert line == f"<string>:8: UserWarning: {said.format('it was not compiled')}"
    assert "UserWarning" not in str(others)
    assert run(copy, WARN, **{SWITCH: "0"}) == ("", "")
    assert run(PACKAGE.parent, WARN) == ("", "") or _kernel.library() is None
    compile_into(copy, OTHER % NEXT)
    assert f"interface {_kernel.INTERFACE + 1}, not" in run(copy, WARN)[1]


CALLERS = {
    "jax": """
import jax, numpy as np
from lmf_multi.jax import LMFLoss
step = jax.jit(jax.value_and_grad(LMFLoss((625, 16, 1))))
few, many = (jax.ShapeDtypeStruct((n, 3), "float32") for n in (5000, 6000))
step.lower(few, np.zeros(5000, int))
step.lower(many, np.zeros(6000, int))
""",
    "keras": """
import tensorflow as tf
from lmf_multi.keras import LMFLoss
step, loss = lambda z: loss(tf.zeros(len(z), tf.int32), z), LMFLoss((625, 16, 1))
step(tf.zeros((6000, 3)))
tf.function(step).get_concrete_function(tf.zeros((6000, 3)))
tf.function(step, jit_compile=True).get_concrete_function(tf.zeros((5000, 3)))
tf.function(step, jit_compile=True).get_concrete_function(tf.zeros((6000, 3)))
""",
}


@pytest.mark.parametrize("framework", CALLERS)
def test_it_warns_where_the_kernel_would_be_called(copy, framework):
    """At the last line of each, which is the first with many logits that are compiled."""
    load(framework)
    code = CALLERS[framework].strip()
    (copy / "step.py").write_text(code)
    _, logged = run(copy, "import step", KERAS_BACKEND="tensorflow")
    (line,) = (line for line in logged.splitlines() if "compiled kernel" in line)
    assert line.startswith(f"{copy}/step.py:{len(code.splitlines())}: UserWarning: ")


ARRAYS = {"torch": "torch.tensor(z), torch.tensor(y)", "jax": "jax.numpy.asarray(z), y"}


@pytest.mark.parametrize("framework", ARRAYS)
def test_operations_run_beside_another_interface(copy, framework):
    """Whose function ends the process, were it called."""
    load(framework)
    compile_into(copy, OTHER % NEXT)
    code = f"""{LOG}
import numpy as np, {framework}
from lmf_multi.{framework} import LMFLoss
z, y = np.array([[2, 0, 1], [0.5, 1, 0]], np.float32), np.array([0, 1])
print(float(LMFLoss((625, 16, 1))({ARRAYS[framework]})))
"""
    printed, logged = run(copy, code)
    expected = reference.LMFLoss((625, 16, 1))(np.array([[2, 0, 1], [0.5, 1, 0]]), np.array([0, 1]))
    np.testing.assert_allclose(float(printed), expected, rtol=1e-5)
    assert logged.count("without the kernel") == 1


def test_the_switch_turns_it_off_and_on(compiled, monkeypatch):
    """Within a process: it is read each time."""
    for setting, found in (("0", None), ("1", compiled), ("0", None), ("always", compiled)):
        monkeypatch.setenv(SWITCH, setting)
        assert _kernel.library() is found
    monkeypatch.delenv(SWITCH)
    assert _kernel.library() is compiled


def test_the_suites_own_switch_writes_nothing_that_other_threads_read(compiled):
    """Frameworks' threads look into the process' environment, which must not change beside them."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    before = [getenv(name.encode()) for name in (SWITCH, "PATH")]
    with kernel_switch("0"):
        assert _kernel.library() is None
        assert [getenv(name.encode()) for name in (SWITCH, "PATH")] == before
    assert _kernel.library() is compiled


def test_another_setting_is_refused(monkeypatch):
    """Whoever writes off would believe that the kernel is."""
    monkeypatch.setenv(SWITCH, "off")
    sentence = "LMF_MULTI_CPU_KERNEL must be 0, 1 or always, got 'off'; 0 turns the CPU kernel off"
    with refuses(ValueError, sentence):
        _kernel.library()


def test_the_switch_is_said_once():
    printed, logged = run(PACKAGE.parent, OPEN, **{SWITCH: "0"})
    assert printed == "None None"
    (line,) = logged.splitlines()
    assert line.endswith("without the kernel: LMF_MULTI_CPU_KERNEL=0 turns it off")


def test_a_structure_of_another_size_is_refused(compiled):
    call = _kernel.LossCall(size=8)
    assert compiled.lmf_multi_loss(call) == _kernel.OTHER_SIZE


def test_a_name_that_is_no_field_is_refused():
    """ctypes keeps it beside the fields otherwise, and the kernel gets zeros."""
    with pytest.raises(AttributeError, match="z_outer"):
        _kernel.LossCall(z_outer=1)


def test_the_structure_is_the_kernels(tmp_path):
    """Each field at its place, in its size."""
    lines, call = ['#include "loss.cpp"'], "lmf_multi_call"
    first = {"z_strides": "z_outer", "grad_strides": "grad_outer"}  # of the three
    for name, *_ in _kernel.LossCall._fields_:
        field, ours = first.get(name, name), getattr(_kernel.LossCall, name)
        size = ours.size // 3 if name in first else ours.size
        lines.append(f'static_assert(offsetof({call}, {field}) == {ours.offset}, "{name}");')
        lines.append(f'static_assert(sizeof({call}::{field}) == {size}, "{name}");')
    codes = {"UNKNOWN_LABEL": _kernel.UNKNOWN_LABEL, "NO_MEMORY": _kernel.NO_MEMORY}
    codes |= {"OTHER_SIZE": _kernel.OTHER_SIZE, "lmf_multi_interface": _kernel.INTERFACE}
    codes |= {name.upper(): code for name, code in _kernel.DTYPES.items()}
    lines += [f'static_assert({name} == {code}, "{name}");' for name, code in codes.items()]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    folder = Path(_kernel.__file__).parent
    command = [compiler(), "-fsyntax-only", "-Wno-psabi", f"-I{folder}", str(source)]
    subprocess.run(command, check=True)
