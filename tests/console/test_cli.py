"""The command ``aer``: its table, its help, and what it answers to a name that it does not know."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aer_megatron import cli
from tests.support.runs import ROOT


@pytest.mark.processes
def test_the_help_names_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert name in said and text in said
    program = "import sys; from aer_megatron import cli; cli.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_command_gets_its_arguments_and_gives_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("aer_megatron.train.main", lambda arguments: seen.append(arguments) or 7)
    assert cli.main(["train", "RUN.toml", "--run.seed=1"]) == 7
    assert seen == [["RUN.toml", "--run.seed=1"]]


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lunch"]) == 2
    assert "aer lunch" in capsys.readouterr().err
