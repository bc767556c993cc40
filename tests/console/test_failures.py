"""An exception becomes one line and an exit code; the trace is in the file that the line names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from aer_megatron.console.failures import Edge, read_failure, run_command


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher, and a temporary folder of the test's own."""
    for name in ("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "RANK", "ROLE_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def raising(error: BaseException, folder: Path | None = None) -> Callable[[Edge], int]:
    def body(edge: Edge) -> int:
        edge.log_folder = folder
        raise error

    return body


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    return err[:-1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("run.seed=-1; use 0"), 2, "aer_megatron: run.seed=-1; use 0"),
        (KeyboardInterrupt(), 130, "aer_megatron: interrupted"),
        (SystemExit("no luck"), 1, "aer_megatron: no luck"),
        (RuntimeError("the server is gone"), 1, r"aer_megatron: the server is gone (trace: FILE)"),
        (OSError(28, "No space left on device"), 1, "aer_megatron: [Errno 28] No space left on device (trace: FILE)"),
        (KeyError("missing"), 1, "aer_megatron: KeyError: 'missing' (trace: FILE)"),
        (MemoryError(), 1, "aer_megatron: MemoryError (trace: FILE)"),
        (RecursionError("too deep"), 1, "aer_megatron: RecursionError: too deep (trace: FILE)"),
        (RuntimeError("a\nException raised from f at g.cpp:1\nframe #0"), 1, "aer_megatron: a (trace: FILE)"),
        (RuntimeError("a\nb\nc\nd\ne\nf"), 1, "aer_megatron: a\nb\n...\nf (trace: FILE)"),
        (ValueError("a\nb\nc\nd\ne\nf"), 2, "aer_megatron: a\nb\nc\nd\ne\nf"),
        (RuntimeError("\x1b[2Jgone\x07"), 1, r"aer_megatron: \x1b[2Jgone\x07 (trace: FILE)"),
        (RuntimeError("x" * 10**6), 1, f"aer_megatron: {'x' * 4000} ... (trace: FILE)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error, tmp_path / "logs")) == code
    said = last_line(capsys)
    files = list(tmp_path.glob("logs/*"))
    assert said == line.replace("FILE", str(files[0]) if files else "")
    if files:
        assert "Traceback" in files[0].read_text() and "in body" in files[0].read_text()
        assert files[0].stat().st_mode & 0o777 == 0o600


def test_an_exit_on_purpose_passes() -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(raising(SystemExit(143)))
    assert stop.value.code == 143
    assert run_command(lambda edge: 7) == 7


def test_a_library_s_value_error_has_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be a fault of the program: the message alone would not say where."""
    assert run_command(lambda edge: json.loads("{")) == 2
    trace = re.search(r"\(trace: (.*)\)$", last_line(capsys))
    assert trace and "json/decoder.py" in Path(trace[1]).read_text()


def test_a_folder_that_takes_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_command(raising(RuntimeError("gone"), tmp_path / "file" / "logs")) == 1
    trace = re.search(r"gone \(trace: (.*)\)$", last_line(capsys))
    assert trace and "Traceback" in Path(trace[1]).read_text()


def test_debug_prints_the_trace(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aer_megatron")
    assert run_command(raising(ValueError("wrong"))) == 2
    assert "Traceback" in (err := capsys.readouterr().err) and err.endswith("aer_megatron: wrong\n")


def test_a_rank_hands_its_failure_over_before_its_surroundings_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")

    def body(edge: Edge) -> int:
        try:
            with edge.noting():
                raise ValueError("the first")
        finally:
            failure = read_failure(path)
            assert failure is not None and (failure.message, failure.exit_code) == ("the first", 2)
            raise RuntimeError("the process group is gone")

    assert run_command(body) == 2
    assert capsys.readouterr() == ("", "")
    assert json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"] == "aer_megatron: the first"
    failure = read_failure(path)
    assert failure is not None and failure.message == "the first"
    # the launcher itself speaks, whatever started it
    assert run_command(raising(ValueError("its own")), is_launcher=True) == 2
    assert capsys.readouterr().err == "aer_megatron: its own\n"
