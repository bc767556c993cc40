"""Verifiers for tests of the pool: good, hanging, raising, dying, and wrong in what they return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from aer_megatron.types import Prompt, Verdict


def exact(text: str, prompt: Prompt) -> bool:
    return text == prompt.answer


def partial(text: str, prompt: Prompt) -> float:
    return 0.25


def labelled(text: str, prompt: Prompt) -> Verdict:
    return Verdict(0.5, "half_right")


def echo_after_delay(text: str, prompt: Prompt) -> Verdict:
    time.sleep(float(text))
    return Verdict(float(text), "echo")


def sleep_forever(text: str, prompt: Prompt) -> bool:
    if text == "hang":
        time.sleep(3600)
    return text == prompt.answer


def hold_the_interpreter(text: str, prompt: Prompt) -> bool:
    """Runs C code that no signal handler can interrupt."""
    return 9**99_999_999 == 0


def spawn_and_hang(text: str, prompt: Prompt) -> bool:
    """Starts a process of its own, writes its id to ``prompt.answer`` and hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    Path(prompt.answer).write_text(str(child.pid), encoding="utf-8")
    time.sleep(3600)
    return False


def raise_error(text: str, prompt: Prompt) -> bool:
    raise ZeroDivisionError("no")


def exit_python(text: str, prompt: Prompt) -> bool:
    sys.exit(3)


def end_process(text: str, prompt: Prompt) -> bool:
    if text == "die":
        os._exit(7)
    return text == prompt.answer


def kill_self(text: str, prompt: Prompt) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def nothing(text: str, prompt: Prompt) -> None:
    return None


def not_a_number(text: str, prompt: Prompt) -> float:
    return float("nan")


def wrong_type(text: str, prompt: Prompt) -> list[int]:
    return [1]


not_callable = 3
