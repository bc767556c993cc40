"""Small JSON values between all ranks: what each one knows, told to all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aer_megatron.parallel.exchange import all_gather_ragged


def exchange_json(value: Any, *, device: torch.device) -> list[Any]:
    """Returns every rank's JSON-serialisable value, in rank order, on every rank."""
    raw = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    return [json.loads(row.tobytes()) for row in all_gather_ragged(raw, device=device)]


def on_first_rank(compute: Callable[[], Any], *, rank: int, device: torch.device) -> Any:
    """Returns on every rank what ``compute`` returned on rank 0, the only one that runs it.

    Raises:
        ValueError: on every rank, with the message, where ``compute`` raised one.
        RuntimeError: likewise, where it raised RuntimeError or OSError.
    """
    outcome: dict[str, Any] = {}
    if rank == 0:
        try:
            outcome = {"value": compute()}
        except ValueError as error:
            outcome = {"refusal": str(error)}
        except (RuntimeError, OSError) as error:
            outcome = {"error": str(error)}
    first = exchange_json(outcome, device=device)[0]
    if "refusal" in first:
        raise ValueError(first["refusal"])
    if "error" in first:
        raise RuntimeError(first["error"])
    return first["value"]
