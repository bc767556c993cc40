"""The one place that turns an exception into one line and an exit code.

    return run_command(lambda edge: train(arguments, edge))

Exit codes: 2 for ValueError (configuration or data), 130 for an interrupt, 1 for everything else. The trace goes to a
log file that the message names; a ValueError of our own code says all there is to say and has none.

A rank says nothing itself: it hands its failure to its launcher in the file that TORCHELASTIC_ERROR_FILE names, in
torchrun's format, so that the message of several ranks appears once, after everything else. ``aer launch`` prints it
as the last line; torchrun puts it at the end of its report.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aer_megatron
from aer_megatron.console.escaping import visible
from aer_megatron.console.standard_streams import keep_standard_streams, say

LOG_FOLDER = "logs"  # below run.output_dir
LAUNCH_ROLE = "aer-launch"  # ROLE_NAME of the ranks of aer launch

_MAX_MESSAGE_CHARS = 4000
_MAX_LINES = 5  # of a message whose whole is in a trace
_MAX_FILE_BYTES = 64 * 1024
_CPP_TRACE = "\nException raised from "  # torch appends the C++ stack to its messages
_SECOND_MESSAGE_S = 1.0  # under torchrun: time to end a rank whose failure is not the first


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended a process. Example: ``Failure("run.seed=-1 must be at least 0", 2, 1764291600000000000)``."""

    message: str  # with the path of the trace, without a prefix
    exit_code: int
    time_ns: int  # when it was noticed, time.time_ns()


class Edge:
    """What a command tells its edge while it runs: where traces go, and a failure before its surroundings are ended."""

    def __init__(self) -> None:
        self.log_folder: Path | None = None  # of traces; without one they go to a temporary folder
        self._failure: Failure | None = None

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes a failure at once. Ranks that lose their peers fail, too: the first one in time is the cause."""
        try:
            yield
        except BaseException as error:
            self.note(error)
            raise

    def note(self, error: BaseException) -> Failure | None:
        """Returns the first failure that was noted, and hands it over if this is it; None for an exit on purpose."""
        if self._failure is None and not (isinstance(error, SystemExit) and not isinstance(error.code, str)):
            self._failure = _failure_of(error, self.log_folder)
            _hand_over(self._failure)
        return self._failure


def run_command(body: Callable[[Edge], int], *, is_launcher: bool = False) -> int:
    """Runs ``body`` and returns its exit code; an exception becomes one message, said here or by the launcher.

    Args:
        is_launcher: the process has no launcher, whatever its environment says.
    """
    keep_standard_streams()
    edge = Edge()
    try:
        return body(edge)
    except BaseException as error:
        failure = edge.note(error)
        if failure is None:
            raise
        if logging.getLogger("aer_megatron").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
    if is_launcher or _error_file() is None:
        print_message(failure.message)
    elif _other_rank_of_torchrun():
        time.sleep(_SECOND_MESSAGE_S)  # torchrun ends it meanwhile
    return failure.exit_code


def print_message(message: str) -> None:
    """Prints one message on standard error."""
    say(f"aer_megatron: {message}", error=True)


def read_failure(path: Path) -> Failure | None:
    """Returns what a process handed over in ``path``; None where there is nothing, or nothing that is understood."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            return None
        text = json.loads(data)["message"]["message"]
        extra = json.loads(data)["message"]["extraInfo"]
        code, time_ns = extra.get("exit_code"), extra.get("time_ns")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not (isinstance(text, str) and type(code) is int and 0 < code < 256 and type(time_ns) is int):
        return None
    return Failure(_printable(text), code, time_ns)


def message_of(error: BaseException) -> str:
    """Returns the words of an exception: its own where we wrote them, with its type where that says more."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return _printable(str(error.code))
    text = str(error).partition(_CPP_TRACE)[0].strip()
    if not isinstance(error, (ValueError, OSError)) and type(error) is not RuntimeError:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return _printable(text or type(error).__name__)


def _failure_of(error: BaseException, log_folder: Path | None) -> Failure:
    noticed = time.time_ns()
    code = 2 if isinstance(error, ValueError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    message = message_of(error)
    if not _says_all(error):
        lines = message.splitlines()
        if len(lines) > _MAX_LINES:  # the end of another program's log, for instance: its last line says most
            lines[2:-1] = ["..."]
        message = "\n".join(lines) + f" (trace: {_write_trace(error, log_folder)})"
    return Failure(message, code, noticed)


def _says_all(error: BaseException) -> bool:
    """Returns whether the message is meant for the user; a ValueError of a library may be a fault of the program."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    place = frames[-1].filename if frames else ""
    libraries = tuple(set(sysconfig.get_paths().values()))
    ours = place.startswith(str(Path(aer_megatron.__file__).parent)) or not place.startswith(libraries)
    return isinstance(error, ValueError) and ours


def _write_trace(error: BaseException, log_folder: Path | None) -> str:
    """Returns the path of the trace's file; it lies in a temporary folder where ``log_folder`` takes none."""
    text = "".join(traceback.format_exception(error)).encode(errors="backslashreplace")
    rank = os.environ.get("RANK", "0")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-rank{rank if rank.isdigit() else 0}-{os.getpid()}.log"
    for make in (lambda: log_folder, lambda: Path(tempfile.mkdtemp(prefix="aer_megatron-"))):
        try:
            folder = make()
            if folder is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(text)
            return str(folder / name)
        except OSError:
            continue
    return "none, no folder takes it"


def _hand_over(failure: Failure) -> None:
    path = _error_file()
    if path is None:
        return
    extra = {
        "py_callstack": f"aer_megatron: {failure.message}",  # torchrun prints this
        "timestamp": str(failure.time_ns // 10**9),
        "exit_code": failure.exit_code,
        "time_ns": failure.time_ns,
    }
    unfinished = path.with_name(path.name + ".tmp")
    with contextlib.suppress(OSError):  # the launcher then names the exit code
        unfinished.write_text(json.dumps({"message": {"message": failure.message, "extraInfo": extra}}))
        unfinished.replace(path)


def _error_file() -> Path | None:
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(name) if name and "TORCHELASTIC_RUN_ID" in os.environ else None


def _other_rank_of_torchrun() -> bool:
    """Every rank that fails by itself gets seven lines in torchrun's report; one that it ends gets one."""
    return os.environ.get("ROLE_NAME") != LAUNCH_ROLE and os.environ.get("RANK", "0") != "0"


def _printable(text: str) -> str:
    """Returns ``text`` without control characters, which a server or a file may have put in, and not without end."""
    if len(text) > _MAX_MESSAGE_CHARS:
        text = text[:_MAX_MESSAGE_CHARS] + " ..."
    return visible(text)
