"""A server that answers every connection by hand: what no HTTP library would send."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def answering(talk: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """Yields the address of a server that reads once and answers as ``talk`` does, every connection on a thread."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(64)

        def answer(peer: socket.socket) -> None:
            with peer:
                try:
                    peer.recv(65536)
                    talk(peer)
                except OSError:  # the client has gone
                    return

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(peer,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def says(text: bytes) -> Callable[[socket.socket], None]:
    """Returns what answers ``text`` and closes."""
    return lambda peer: peer.sendall(text)


def repeats(head: bytes, text: bytes, pause_s: float = 0.0) -> Callable[[socket.socket], None]:
    """Returns what answers ``head`` and then ``text`` for ever, as long as the client reads."""
    gone = threading.Event()

    def talk(peer: socket.socket) -> None:
        peer.sendall(head)
        while not gone.wait(pause_s):
            peer.sendall(text)

    return talk
