"""Corrections of stale or rounded rollouts against numbers derived by hand; what ``auto`` means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aer_megatron.algo.correction import Correction, correction
from aer_megatron.algo.options import CorrectionSection
from aer_megatron.config import Config

# two sequences of 2 and 3 tokens: products 3 and 1/4, geometric means sqrt(3) = 1.73 and 4^(-1/3) = 0.63
RATIOS = np.array([6.0, 0.5, 0.5, 1.0, 0.5])
LENGTHS = np.array([2, 3])


def corrected(**options: Any) -> Correction:
    old_T = np.array([-1.0, -2.0, -0.5, -3.0, -1.5])
    found = correction(old_T, old_T - np.log(RATIOS), LENGTHS, CorrectionSection(**{"weight": "none", **options}))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"weight": "token"}, [2, 0.5, 0.5, 1, 0.5]),
        ({"weight": "token", "low": 0.75, "high": 0.0}, [6, 0.75, 0.75, 1, 0.75]),
        ({"weight": "token", "bound": "mask"}, [0, 0.5, 0.5, 1, 0.5]),
        ({"weight": "token", "bound": "mask", "low": 0.75}, [0, 0, 0, 1, 0]),
        ({"weight": "sequence", "high": 2.0}, [2, 2, 0.25, 0.25, 0.25]),
        ({"weight": "geometric", "high": 0.0}, [3**0.5] * 2 + [4 ** (-1 / 3)] * 3),
        ({"reject": "geometric", "reject_low": 0.7}, [1, 1, 0, 0, 0]),
        ({"reject": "sequence", "reject_high": 3.0}, [1, 1, 1, 1, 1]),  # bounds are inclusive
        ({"weight": "token", "reject": "geometric", "reject_low": 0.7}, [2, 0.5, 0, 0, 0]),
        ({"veto": 0.6}, [0, 0, 0, 0, 0]),
        ({"weight": "token", "veto": 0.4}, [2, 0.5, 0.5, 1, 0.5]),
    ],
)
def test_weights_by_hand(options: dict[str, Any], weights: list[float]) -> None:
    found = corrected(**options)
    assert found.weight_T.tolist() == pytest.approx(weights, rel=1e-12)
    assert found.counted_T.all() and found.counted_length_B.tolist() == [2, 3]


def test_what_is_rejected_may_leave_the_mean() -> None:
    found = corrected(weight="token", bound="mask", denominator="kept")
    assert found.counted_T.tolist() == [False, True, True, True, True]
    assert found.counted_length_B.tolist() == [1, 3]


def test_a_ratio_beyond_all_measure_stays_finite() -> None:
    options = CorrectionSection(weight="sequence", high=0.0)
    found = correction(np.zeros(2), np.array([-400.0, -400.0]), np.array([2]), options)
    assert found is not None and np.isfinite(found.weight_T).all()


@pytest.mark.parametrize(
    ("rollout", "weight"),
    [
        ({}, "none"),
        ({"quantization": "fp8"}, "token"),
        ({"staleness": 1, "engine": "sglang"}, "token"),
    ],
)
def test_auto_corrects_what_is_stale_or_quantised(rollout: dict[str, Any], weight: str) -> None:
    table = {
        "model": {"path": "unused"},
        "data": {"train": {"task": "countdown"}},
        "sglang": {"urls": ["http://unused"]},
        "rollout": rollout,
    }
    assert Config.from_table(table).correction.weight == weight
    off = Config.from_table({**table, "algo": {"correction": {"weight": "none"}}})
    assert not off.correction.is_on
