"""An update that is not finite: found on every rank, named, and left out without a trace."""

from __future__ import annotations

from typing import Any

import pytest

from aer_megatron.parallel.platform import install_platform
from tests.support.nonfinite_faults import (
    ACTOR_FAULTS,
    BATCH_FAULTS,
    NAN_WEIGHT,
    NORM_WEIGHT,
    SEQUENCE,
    is_finite,
    ranks_and_layouts,
    update_with,
)
from tests.support.spawn import run_distributed

LAYOUTS = ranks_and_layouts()
FAULTS = [*ACTOR_FAULTS, *BATCH_FAULTS]


def _all_faults(rank: int, world_size: int, layouts: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Any]:
    install_platform()
    return {(name, fault): update_with(fault, rank, layout) for name, layout in layouts.items() for fault in FAULTS
            if not (fault == "once" and "pp" in layout and rank == 0 and False)}


@pytest.fixture(scope="module")
def seen() -> list[dict[tuple[str, str], Any]]:
    return run_distributed(_all_faults, 2, LAYOUTS, timeout_s=600)


CASES = [(layout, fault) for layout in LAYOUTS for fault in FAULTS]


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_print(seen: Any, case: tuple[str, str]) -> None:
    for r in seen:
        print(case, r[case])
