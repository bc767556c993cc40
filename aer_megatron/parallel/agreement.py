"""Small JSON values between all ranks: what each one knows, or why it failed, is known to all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aer_megatron.parallel.exchange import all_gather_ragged

FAILURES: tuple[type[Exception], ...] = (ValueError, RuntimeError, OSError)


def exchange_json(value: Any, *, device: torch.device) -> list[Any]:
    """Returns every rank's JSON-serialisable value, in rank order, on every rank."""
    raw = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    return [json.loads(row.tobytes()) for row in all_gather_ragged(raw, device=device)]


def on_all_ranks(
    work: Callable[[], Any],
    *,
    device: torch.device,
    action: str = "",
    error: type[Exception] | None = None,
    failures: tuple[type[Exception], ...] = FAILURES,
) -> list[Any]:
    """Returns what ``work`` returned on every rank (JSON), in rank order; where it failed on any, all ranks raise.

    Args:
        action: what could not be done, for the message; "" for the failure's own words alone.
        error: type of what is raised; by default ValueError for a ValueError, else RuntimeError.
        failures: what counts as a failure; anything else ends this rank alone.
    """
    try:
        answer: dict[str, Any] = {"result": work()}
    except failures as failure:
        answer = {"failure": str(failure) or type(failure).__name__, "refused": isinstance(failure, ValueError)}
    answers = exchange_json(answer, device=device)
    raise_first_failure(answers, action, error)
    return [answer["result"] for answer in answers]


def on_first_rank(work: Callable[[], Any], *, rank: int, device: torch.device) -> Any:
    """Returns on every rank what ``work`` returned on rank 0, the only one that runs it; errors as ``on_all_ranks``."""
    return on_all_ranks(work if rank == 0 else lambda: None, device=device)[0]


def raise_first_failure(answers: list[dict[str, Any]], action: str = "", error: type[Exception] | None = None) -> None:
    """Raises where one of the ranks' answers is a failure, naming the first and how many there are."""
    found = [(rank, answer) for rank, answer in enumerate(answers) if "failure" in answer]
    if found:
        rank, first = found[0]
        what = f"cannot {action} (rank {rank}): " if action else ""
        others = f" ({len(found) - 1} more ranks failed)" if len(found) > 1 else ""
        raise (error or (ValueError if first["refused"] else RuntimeError))(f"{what}{first['failure']}{others}")
