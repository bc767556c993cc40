"""Wheel and sdist build and install; a build without a compiler ends with one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# what a checkout holds beside its content
NOT_PACKAGED = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "runs",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "*.so",
    "*.egg-info",
)


def run(*command: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: builds leave nothing in the tree under test."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_PACKAGED), dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("aer_megatron-*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_the_whole_checkout(source: Path, unpacked: Path) -> None:
    """So its tests can be run, the C++ ones too, which need no doctest of the system."""
    held = files(unpacked)
    assert {"cpp/third_party/doctest/doctest.h", "cpp/third_party/doctest/LICENSE.txt", ".ci/run"} <= held
    assert not files(source) - held
    assert not [name for name in held if name.endswith(".so")]


def test_wheel_from_the_sdist_installs_into_a_new_environment(unpacked: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    done = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", unpacked)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((tmp_path / "dist").glob("aer_megatron-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"aer_megatron/_C.pyi", "aer_megatron/py.typed"} <= set(names)
    scripts = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "aer = aer_megatron.cli:main" in zipfile.ZipFile(wheel).read(scripts).decode()
    assert any(name.startswith("aer_megatron/_C.") and name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"aer_megatron"}
    for file in ("LICENSE", "NOTICE"):
        held = next(name for name in names if name.endswith(f".dist-info/licenses/{file}"))
        assert zipfile.ZipFile(wheel).read(held) == (ROOT / file).read_bytes()

    done = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    python = tmp_path / "venv" / "bin" / "python"
    done = run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    numpy_only = tmp_path / "numpy_only"
    numpy_only.mkdir()
    site = Path(np.__file__).parents[1]
    for entry in ("numpy", "numpy.libs"):
        if (site / entry).exists():
            (numpy_only / entry).symlink_to(site / entry)
    code = "import aer_megatron._C as c; print(c.__file__, len(c.DifficultyLedger(0.9, 0)))"
    done = run(python, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(numpy_only)})
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "venv") in done.stdout
    assert done.stdout.split()[-1] == "0"


@pytest.mark.parametrize(
    ("compilers", "tried"),
    [({}, "g++"), ({"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}, "/no/such/compiler")],
)
def test_without_a_compiler_the_build_fails_with_one_line(
    unpacked: Path, tmp_path: Path, compilers: dict[str, str], tried: str
) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    env = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
    env |= {"PATH": str(empty), **compilers}
    done = run(
        sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path,
        cwd=unpacked, env=env,
    )  # fmt: skip
    line = f"aer_megatron: no C++ compiler found (tried {tried}); install g++ or set CXX"
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == line
    assert "Traceback" not in done.stderr

    command = (
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path / "dist",
        unpacked,
    )
    done = run(sys.executable, *command, env=env)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(line) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "dist").exists() or not list((tmp_path / "dist").glob("*.whl"))


def test_metadata_asks_for_what_it_should_and_never_for_apex(unpacked: Path) -> None:
    lines = (unpacked / "PKG-INFO").read_text().splitlines()
    assert "Name: aer-megatron" in lines
    assert "Requires-Python: >=3.11" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "License-File: LICENSE" in lines
    assert (unpacked / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    requirements = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert any(r.startswith("megatron-core<0.20,>=0.16.1") for r in requirements)
    assert not any(r.startswith("apex") for r in requirements)


def test_every_pin_is_a_plain_release() -> None:
    """A local version (torch==2.13.0+cpu) exists on one index only."""
    lines = (ROOT / "constraints" / "cpu-py311.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        name, separator, version = pin.partition("==")
        assert name and separator and version and "+" not in version and "@" not in pin, pin
