"""_C.pyi says what the compiled module has: names, signatures and nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aer_megatron import _C


@pytest.mark.processes
def test_stub_matches_the_compiled_module() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "aer_megatron._C"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def argument_names(function: ast.FunctionDef) -> list[str]:
    """The stub's argument names, a "*" before the keyword-only ones."""
    positional = [a.arg for a in function.args.args if a.arg != "self"]
    keyword_only = [a.arg for a in function.args.kwonlyargs]
    return [*positional, "*", *keyword_only] if keyword_only else positional


def compiled_names(signature: str) -> list[str]:
    """The argument names in the first docstring line that pybind11 writes."""
    return [name for name in re.findall(r"(?:^|, )(\*|\w+)(?=:|,|$)", signature) if name != "self"]


def test_argument_names_match_the_compiled_ones() -> None:
    """Compiled functions have no signature that stubtest could read; their docstrings do."""
    stub = ast.parse((Path(_C.__file__).parent / "_C.pyi").read_text())
    compared = 0
    for owner in [stub, *[node for node in stub.body if isinstance(node, ast.ClassDef)]]:
        runtime = getattr(_C, owner.name) if isinstance(owner, ast.ClassDef) else _C
        for function in [node for node in owner.body if isinstance(node, ast.FunctionDef)]:
            first_line = (getattr(runtime, function.name).__doc__ or "").split("\n")[0]
            match = re.match(rf"{function.name}\((.*)\) ->", first_line)
            if match is not None:
                assert compiled_names(match.group(1)) == argument_names(function), function.name
                compared += 1
    assert compared >= 16
