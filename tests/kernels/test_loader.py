"""The compiled CPU kernel as it is found, refused and switched off, whatever calls it."""

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
from tests.frameworks import load, need_kernel

SWITCH = "LMF_MULTI_CPU_KERNEL"
PACKAGE = Path(lmf_multi.__file__).parent
OTHER = """
extern "C" {
%s
int lmf_multi_one_class(void *) { __builtin_trap(); }
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
    return copy / "lmf_multi/_kernel" / f"_one_class{sysconfig.get_config_var('EXT_SUFFIX')}"


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
    call = _kernel.OneClassCall(size=8)
    assert compiled.lmf_multi_one_class(call) == _kernel.OTHER_SIZE


def test_a_name_that_is_no_field_is_refused():
    """ctypes keeps it beside the fields otherwise, and the kernel gets zeros."""
    with pytest.raises(AttributeError, match="z_outer"):
        _kernel.OneClassCall(z_outer=1)


def test_the_structure_is_the_kernels(tmp_path):
    """Each field at its place, in its size."""
    lines, call = ['#include "one_class.cpp"'], "lmf_multi_call"
    first = {"z_strides": "z_outer", "grad_strides": "grad_outer"}  # of the three
    for name, *_ in _kernel.OneClassCall._fields_:
        field, ours = first.get(name, name), getattr(_kernel.OneClassCall, name)
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
