"""The compiled half of the package: the CPU kernel, and what a wheel with or without it is called.

ctypes loads the kernel, which knows nothing of Python, so that one wheel a platform serves every
Python. Where it cannot be compiled, on Windows, and with ``LMF_MULTI_PURE=1`` in the environment,
the wheel is one for any platform. All else stands in pyproject.toml.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNEL = Extension(
    "lmf_multi._kernel._loss",
    ["lmf_multi/_kernel/loss.cpp"],
    depends=[str(header) for header in sorted(Path("lmf_multi/_kernel").glob("*.h"))],
    extra_compile_args=[
        "-std=gnu++17",  # c++17 would forbid to multiply and add at once
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-pthread",
        "-Wno-psabi",
    ],
    extra_link_args=["-pthread", "-ldl"],  # libraries of their own before glibc 2.34
    optional=True,
)


class BuildKernel(build_ext):
    """A file name without the Python's version and ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # on macOS too: nobody links to it

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except Exception:  # setuptools goes on, and would pack what an earlier build has left
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            raise


class Wheel(bdist_wheel):
    """For a platform and every Python 3, or pure, by what was compiled and not what was planned."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and not self.root_is_pure:
            kernel = self.get_finalized_command("build_ext").get_ext_fullpath(KERNEL.name)
            if not os.path.exists(kernel):
                self.root_is_pure, self.distribution.ext_modules = True, []

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


# loss.cpp needs the vectors of GCC and Clang
pure = sys.platform == "win32" or os.environ.get("LMF_MULTI_PURE") == "1"
setup(
    ext_modules=[] if pure else [KERNEL],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
