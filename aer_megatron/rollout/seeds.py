"""Counter-based randomness: a uniform number is a pure function of (seed, token position).

Nothing here has a state, so a completion cannot depend on its neighbours in a batch, on the number of ranks
or on the order of the requests. The mixer is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014).

Shape suffix: B sequences.
"""

from __future__ import annotations

import numpy as np

from aer_megatron.types import Float64Array, UInt64Array

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """Returns the SplitMix64 finaliser of an unsigned 64-bit integer (a bijection)."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def derive_seed(*parts: int) -> int:
    """Returns an unsigned 64-bit seed that depends on every part and on their order.

    Example: ``derive_seed(run_seed, step, prompt_id, occurrence, rollout_index)``.
    """
    state = 0
    for part in parts:
        state = mix64((state + _GAMMA + (part & _MASK)) & _MASK)
    return state


def stream_seed(run_seed: int, stream: str) -> int:
    """Returns the seed of a named stream ("train", "eval"): streams of one run never share random numbers."""
    return derive_seed(run_seed, *stream.encode())


def uniform_B(seed_B: UInt64Array, position: int) -> Float64Array:
    """Returns one uniform number in [0, 1) per seed for token ``position`` (0-based), fp64 [B]."""
    offset = np.uint64(((position + 1) * _GAMMA) & _MASK)
    bits = _mix64_B(_mix64_B(seed_B) + offset)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64_B(value_B: UInt64Array) -> UInt64Array:
    value_B = (value_B ^ (value_B >> np.uint64(30))) * np.uint64(_MIX_1)
    value_B = (value_B ^ (value_B >> np.uint64(27))) * np.uint64(_MIX_2)
    return value_B ^ (value_B >> np.uint64(31))
