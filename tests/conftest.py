"""Fixtures of more than one file, and what keeps ``make test-fast`` fast: a test that starts a process says so.

The marker is ``processes``; folders whose tests start some as a rule (APART) are not in ``make test-fast`` at all.
"""

from __future__ import annotations

import multiprocessing.process
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import random_base, train, write_run_file

APART = ("contract", "distributed", "integration")
_ALLOWED = {"git"}  # milliseconds, and only asked which commit this is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent.name in APART:
            item.add_marker(pytest.mark.processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("processes"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        popen = subprocess.Popen.__init__

        def start(self: Any, args: Any, *more: Any, **options: Any) -> None:
            program = args if isinstance(args, (str, bytes, Path)) else args[0]
            if Path(str(program)).name not in _ALLOWED:
                _refuse(item, program)
            popen(self, args, *more, **options)

        patch.setattr(subprocess.Popen, "__init__", start)
        patch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: _refuse(item, self.name))
        return (yield)


def _refuse(item: pytest.Item, program: object) -> None:
    raise AssertionError(f"{item.nodeid} starts {program}: mark it with @pytest.mark.processes")


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's model with random weights; nobody writes there."""
    return random_base(tmp_path_factory.mktemp("random") / "base")


@pytest.fixture(scope="session")
def warm_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's model after a supervised stage of 20 steps; nobody writes there."""
    folder = tmp_path_factory.mktemp("warm")
    made = train(write_run_file(folder), "--stage=sft")
    assert made.returncode == 0, made.stderr
    return folder / "base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that servers and their doubles serve; what a test writes may lie beside it."""
    from tests.support.sglang_fixtures import model_folder  # needs torch

    return model_folder(tmp_path_factory.mktemp("served") / "model")
