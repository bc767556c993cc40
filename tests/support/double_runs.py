"""Runs of the command line whose launched servers are doubles."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig

from tests.support.runs import MODEL, ROOT


def double_python(folder: Path, *options: str) -> Path:
    """Returns a program that takes an interpreter's place: it runs the double, whatever module is asked for."""
    program = folder / "double-python"
    double = ROOT / "tests" / "support" / "sglang_double.py"
    vocab_size = AutoConfig.from_pretrained(MODEL).vocab_size
    # it is called with: -m sglang.launch_server OPTIONS
    words = [sys.executable, str(double), "--vocab-size", str(vocab_size), *options]
    program.write_text(f'#!/bin/sh\nshift 2\nexec {" ".join(words)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program
