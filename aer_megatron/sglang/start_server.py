"""Runs a server's module with an API key that no command line and no log shows: ``start_server.py MODULE OPTIONS``

SGLang takes its key as an option or from a configuration file, and writes all of its options, the key among them, to
its log. Here it comes from a file that ``--aer-key-file`` names, which is removed before anything else happens; the
module finds it in its arguments, and what it prints has the key crossed out. Everything else is as with
``python -m MODULE OPTIONS``. This file runs in the server's environment and needs nothing but the standard library.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
from pathlib import Path

KEY_FILE_OPTION = "--aer-key-file"


def main(words: list[str]) -> None:
    """Runs the module; returns or raises as it does."""
    module, *options = words
    at = options.index(KEY_FILE_OPTION)
    file = Path(options[at + 1])
    key = file.read_text(encoding="ascii")
    file.unlink()
    del options[at : at + 2]
    sys.stdout, sys.stderr = hiding(sys.stdout, key), hiding(sys.stderr, key)
    sys.path[0] = os.getcwd()  # as -m has it: not this file's folder, where other modules have an sglang of their own
    sys.argv = [module, *options, f"--api-key={key}"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def hiding(stream: io.TextIOBase | object, key: str) -> io.TextIOWrapper:
    """Returns a text stream to the same file that writes *** for the key."""

    class Hiding(io.TextIOWrapper):
        def write(self, text: str) -> int:
            super().write(text.replace(key, "***"))
            return len(text)

    assert isinstance(stream, io.TextIOWrapper)
    return Hiding(stream.buffer, stream.encoding, stream.errors, line_buffering=True)


if __name__ == "__main__":
    main(sys.argv[1:])
