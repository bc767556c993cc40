"""The C++ extension `aer_megatron._C`; everything else about the package is in pyproject.toml."""

import os
import shlex
import shutil
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext


def missing_compiler() -> str | None:
    """The names that were tried if none of them is a program, else None."""
    named = os.environ.get("CXX")
    names = [shlex.split(named)[0]] if named else ["g++"]
    return None if any(shutil.which(name) for name in names) else ", ".join(names)


class BuildExtension(build_ext):
    """build_ext that says in one line what is missing instead of a compiler trace."""

    def build_extensions(self) -> None:
        tried = missing_compiler()
        if tried is not None:
            raise SystemExit(f"aer_megatron: no C++ compiler found (tried {tried}); install g++ or set CXX")
        super().build_extensions()


extension = Pybind11Extension(
    "aer_megatron._C",
    sources=sorted(glob("cpp/src/*.cpp") + glob("cpp/bindings/*.cpp")),
    include_dirs=["cpp/include", "cpp/bindings"],
    depends=sorted(glob("cpp/**/*.hpp", recursive=True)),
    cxx_std=17,
    # Contracted multiply-adds would give other bits on machines that have them.
    extra_compile_args=["-O3", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic"],
    extra_link_args=["-pthread"],
)

ParallelCompile(default=0).install()
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
