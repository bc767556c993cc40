"""What the conversion tools share: progress bar, error exit, and the logits comparison of --verify."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aer_megatron.convert.architecture import ModelArchitecture

DTYPES = ("float32", "bfloat16", "float16")
LOGITS_TOLERANCE = 1e-5  # of the largest logit; fp32 rounding in two implementations usually stays below 4e-6
ROUNDING_TOLERANCE = 2.0  # of transformers' own fp32 rounding, where that is larger
GB = 10**9


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Ends the program with one line where the input or the disk is at fault, and with a traceback otherwise."""
    try:
        yield
    except OSError as error:
        full = "; the disk is full: nothing was left under the output's name" if error.errno == errno.ENOSPC else ""
        sys.exit(f"{program}: {error}{full}")
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{program}: {error}")


@contextmanager
def progress_bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told bytes; the bar is drawn on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda done: progress.advance(task, done)


def torch_dtype(name: str | None) -> Any:
    """Returns torch's dtype of the option --dtype, None where it was not given."""
    import torch

    return getattr(torch, name) if name else None


def verify_logits(hf_folder: Path, arch: ModelArchitecture, load: Callable[[Any, Any], None]) -> str:
    """Returns a line about the logits of a fixed prompt in Megatron-Core and in transformers.

    Raises RuntimeError where they differ by more than fp32 rounding. Some models (Qwen2.5: key biases of some 200)
    amplify rounding a thousandfold, so beyond a small tolerance transformers in fp64 is the judge. A model that does
    not fit into memory is not compared, and the line says so.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from aer_megatron.actor import conversion_check as check
    from aer_megatron.parallel.platform import install_platform

    needed, available = 1.3 * check.fp32_bytes(arch), _available_memory()
    if needed > available:
        return f"logits not compared: fp32 needs {needed / GB:.1f} GB of memory, {available / GB:.1f} GB are available"
    warnings.simplefilter("ignore")
    disable_progress_bar()
    prompts = [check.fixed_prompt(arch.vocab_size)]
    expected = check.transformers_logits(hf_folder, prompts)
    install_platform()
    logits = check.megatron_logits(arch, prompts, load)
    found = check.logits_difference(expected, logits)
    text = (
        f"logits of {found.num_positions} tokens, fp32: largest difference from transformers {found.max_abs:.1e} "
        f"(largest logit {found.largest:.3g}), most likely token differs at {found.num_other_argmax} positions"
    )
    if not found.num_other_argmax and found.max_abs <= LOGITS_TOLERANCE * max(1.0, found.largest):
        return text
    if 2 * needed > _available_memory():
        raise RuntimeError(
            f"verification failed: {text}; fp64, which would tell rounding, needs {2 * needed / GB:.1f} GB"
        )
    exact = check.transformers_logits(hf_folder, prompts, dtype=torch.float64)
    theirs, ours = check.logits_difference(exact, expected), check.logits_difference(exact, logits)
    text += f"; from transformers in fp64: {ours.max_abs:.1e}, transformers in fp32: {theirs.max_abs:.1e}"
    if ours.num_other_argmax > theirs.num_other_argmax or ours.max_abs > ROUNDING_TOLERANCE * theirs.max_abs:
        raise RuntimeError(f"verification failed: {text}")
    return text


def _available_memory() -> float:
    """Returns bytes, infinity where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
