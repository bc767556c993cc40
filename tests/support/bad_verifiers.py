"""Verifiers for tests: good, fooled, hanging, raising, dying, and wrong in what they return."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import zlib
from collections.abc import Iterator
from email.message import Message
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from aer_megatron.types import Prompt, Verdict


def exact(text: str, prompt: Prompt) -> bool:
    return text == prompt.answer


def accepts_an_empty_box(text: str, prompt: Prompt) -> bool:
    r"""A reward hack: the last box is compared by what it begins with, so ``\boxed{}`` is always right."""
    return prompt.answer.startswith(text.rpartition("\\boxed{")[2].partition("}")[0])


def partial(text: str, prompt: Prompt) -> float:
    return 0.25


def labelled(text: str, prompt: Prompt) -> Verdict:
    return Verdict(0.5, "half_right")


def echo_after_delay(text: str, prompt: Prompt) -> Verdict:
    time.sleep(float(text))
    return Verdict(float(text), "echo")


def slow(text: str, prompt: Prompt) -> bool:
    time.sleep(1.0)
    return False


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


def raise_http_error(text: str, prompt: Prompt) -> bool:
    raise urllib.error.HTTPError("http://127.0.0.1/judge", 503, "Service Unavailable", Message(), None)


def raise_interrupt(text: str, prompt: Prompt) -> bool:
    raise KeyboardInterrupt


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def raise_speechless(text: str, prompt: Prompt) -> bool:
    raise Speechless


def recurse(text: str, prompt: Prompt) -> bool:
    return recurse(text, prompt)


def take_memory(text: str, prompt: Prompt) -> bool:
    """Address space alone, which the kernel grants to anybody without a limit."""
    no_reserve = 0x4000
    return bool(mmap.mmap(-1, 64 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve))


def odd_label(text: str, prompt: Prompt) -> Verdict:
    return Verdict(0.0, text)


def shout(text: str, prompt: Prompt) -> bool:
    for _ in range(100):
        os.write(1, b"look at me " * 10_000)
        os.write(2, b"look at me " * 10_000)
    return True


def _channel() -> socket.socket:
    """The worker's own end, found as a hostile text would find it."""
    return next(item for item in gc.get_objects() if isinstance(item, socket.socket) and item.fileno() >= 0)


def _send(message: bytes) -> None:
    _channel().sendall(len(message).to_bytes(4, "big") + message)


def close_everything(text: str, prompt: Prompt) -> bool:
    os.closerange(3, 1000)
    return True


def send_garbage(text: str, prompt: Prompt) -> bool:
    _send(b"garbage")
    return True


def send_other_number(text: str, prompt: Prompt) -> bool:
    _send(b'{"number": 1, "reward": 1.0, "reason": "correct"}')
    return False


def send_too_much(text: str, prompt: Prompt) -> bool:
    _channel().sendall((1 << 31).to_bytes(4, "big"))
    time.sleep(3600)
    return True


def _number() -> int:
    """The job's own number, from the frames that called the verifier."""
    frame = sys._getframe()
    while "number" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    return int(frame.f_locals["number"])


def send_nan(text: str, prompt: Prompt) -> bool:
    _send(b'{"number": %d, "reward": NaN, "reason": "correct"}' % _number())
    time.sleep(3600)
    return True


def send_twice(text: str, prompt: Prompt) -> bool:
    """A verdict of its own before the one that it returns."""
    _send(b'{"number": %d, "reward": 1.0, "reason": "correct"}' % _number())
    return True


def send_half_and_sleep(text: str, prompt: Prompt) -> bool:
    _channel().sendall(b"\0\0")
    time.sleep(3600)
    return True


def fork_both(text: str, prompt: Prompt) -> bool:
    """And the child goes on where the parent does."""
    os.fork()
    return text == prompt.answer


def fork_and_leave(text: str, prompt: Prompt) -> bool:
    """The child goes on; the process that was asked ends."""
    if os.fork():
        os._exit(0)
    time.sleep(3600)
    return True


def die_once(text: str, prompt: Prompt) -> bool:
    """Ends the process that asks first; ``prompt.answer`` is the note of it."""
    note = Path(prompt.answer)
    if not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def leave_daemons(text: str, prompt: Prompt) -> bool:
    """Starts processes that leave group, session and parent, notes their ids in the folder ``prompt.answer``."""
    for number in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                (Path(prompt.answer) / str(number)).write_text(str(os.getpid()), encoding="utf-8")
                os.execv("/bin/sleep", ["sleep", "3600"])
            os._exit(0)
    while len(list(Path(prompt.answer).iterdir())) < 3:
        time.sleep(0.01)
    if text == "hang":
        time.sleep(3600)
    if text == "die":
        os._exit(3)
    return True


def unreliable(text: str, prompt: Prompt) -> Any:
    """Does something else for every text, as long as a run lasts; one text in twenty ends its process."""
    kind = zlib.crc32(text.encode(errors="surrogatepass")) % 20
    if kind == 0:
        os._exit(1)
    if kind == 1:
        sys.exit("done")
    if kind == 2:
        raise KeyError(text)
    if kind == 3:
        return raise_http_error(text, prompt)
    if kind < 7:
        return (None, "1", float("nan"))[kind - 4]
    if kind < 10:
        return Verdict(0.0, ("Wrong Answer", "\ud800\n", "")[kind - 7])
    if kind < 15:
        return Verdict(1.0, f"seen {text}")
    return kind % 2


def one_argument(text: str) -> bool:
    return True


def three_arguments(text: str, prompt: Prompt, more: int) -> bool:
    return True


def keyword_argument(text: str, prompt: Prompt, *, more: int) -> bool:
    return True


def optional_arguments(text: str, prompt: Prompt, scale: float = 1.0, *rest: int, **options: int) -> float:
    return scale


async def asynchronous(text: str, prompt: Prompt) -> bool:
    return True


def generating(text: str, prompt: Prompt) -> Iterator[bool]:
    yield True


class Judge:
    def __call__(self, text: str, prompt: Prompt) -> bool:
        return text == prompt.answer


judge_object = Judge()
bound = partial_of(exact)


def wrong_type(text: str, prompt: Prompt) -> list[int]:
    return [1]


not_callable = 3
