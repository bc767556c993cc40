"""Standard output and error that go away in the middle of a program: it goes on, ends with 0, and says nothing odd."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

pytestmark = pytest.mark.processes

PROGRAM = """
import logging, sys, time, warnings
from pathlib import Path
from rich.console import Console
from aer_megatron.report.progress import PlainProgress
from aer_megatron.console.standard_streams import keep_standard_streams, say
keep_standard_streams()
progress = PlainProgress(5)
say("first")
(sys.stdin or open("/dev/null")).readline()
for step in range(5):
    progress.step({"step": step})
    Console().print("· ━ step", step)
    print("x" * 100_000)
    print("to error", file=sys.stderr)
    warnings.warn("a warning")
    logging.getLogger("x").warning("a log line")
    say("said", error=True)
assert open("/dev/null").fileno() > 2
Path(sys.argv[1]).write_text("reached")
"""


def command(folder: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(folder / "end")]


def finished(folder: Path) -> bool:
    return (folder / "end").is_file()


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_ends(tmp_path: Path, both: bool) -> None:
    error = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(
        command(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=error, cwd=ROOT, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        said = "" if both else process.stderr.read()  # type: ignore[union-attr]
        assert process.wait(120) == 0, said
    assert finished(tmp_path)
    assert "Exception ignored" not in said
    assert "Broken pipe" not in said


@pytest.mark.parametrize("redirection", ["> /dev/full", "2> /dev/full > /dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_full_disk_and_closed_descriptors(tmp_path: Path, redirection: str) -> None:
    shell = f'exec "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *command(tmp_path)], input="\n", capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path)
    assert "Exception ignored" not in done.stderr


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """The ssh connection is lost: writes fail with EIO."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(tmp_path), stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        assert process.stdin is not None
        assert b"first" in os.read(ours, 100)
        os.close(ours)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(120) == 0
    assert finished(tmp_path)


def test_an_encoding_without_the_displays_characters(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path), input="\n", capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\u2501" in done.stdout
