"""smg, the real router, as a process beside the real servers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from aer_megatron.sglang.addresses import HeldPort
from tests.support.runs import ROOT

SMG = ROOT / ".venv-sglang" / "bin" / "smg"
_GRACE_S = 5.0


@contextmanager
def real_router(log: Path, workers: Sequence[str] = (), *options: str) -> Iterator[str]:
    """Yields the address of a router, which may not answer yet; skips the test where smg is not installed."""
    if not SMG.exists():
        pytest.skip(f"the router is not installed ({SMG} is missing): make test-sglang installs it")
    port, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    command = [str(SMG), "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    command += ["--disable-retries", "--disable-tokenizer-autoload", "--shutdown-grace-period-secs", "1", *options]
    if workers:
        command += ["--worker-urls", *workers]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port(host: str) -> int:
    """Returns a port that is free now."""
    held = HeldPort(host)
    held.release()
    return held.number
