"""The command ``aer``: its table, its help, and what it answers to a name that it does not know."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aer_megatron import cli
from tests.support.runs import ROOT


@pytest.mark.processes
def test_the_help_imports_no_command() -> None:
    program = "import sys; from aer_megatron import cli; cli.main([]); sys.exit('aer_megatron.train' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, cli.help_text() + "\n")


def test_a_command_gets_its_arguments_and_gives_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("aer_megatron.train.main", lambda arguments: seen.append(arguments) or 7)
    assert cli.main(["train", "RUN.toml", "--run.seed=1"]) == 7
    assert seen == [["RUN.toml", "--run.seed=1"]]


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lunch"]) == 2
    assert capsys.readouterr().err == "aer_megatron: aer lunch is no command; did you mean aer launch?\n"
