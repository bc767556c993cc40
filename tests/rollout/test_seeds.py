"""Counter-based random numbers: published SplitMix64 values, independence of streams, range."""

from __future__ import annotations

import numpy as np

from aer_megatron.rollout.seeds import derive_seed, mix64, stream_seed, uniform_B

GAMMA = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def test_mix64_reproduces_the_published_sequence_of_seed_1234567() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64((1234567 + (i + 1) * GAMMA) & MASK) for i in range(3)] == published


def test_uniforms_are_the_top_53_bits_of_the_mixed_seed_and_position() -> None:
    seeds = [0, 1, 0xFFFFFFFFFFFFFFFF, 0x0123456789ABCDEF]
    for position in (0, 1, 70_000):
        expected = [(mix64((mix64(seed) + (position + 1) * GAMMA) & MASK) >> 11) / 2**53 for seed in seeds]
        assert uniform_B(np.array(seeds, dtype=np.uint64), position).tolist() == expected


def test_uniforms_fill_the_unit_interval_evenly_over_seeds_and_positions() -> None:
    seeds = np.arange(2000, dtype=np.uint64)
    sample = np.stack([uniform_B(seeds, position) for position in range(50)])
    counts = np.histogram(sample, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert 99 - 5 * 14.1 < chi_square < 99 + 5 * 14.1  # 99 degrees of freedom, sd sqrt(198)
    neighbours = np.corrcoef(sample[:-1].ravel(), sample[1:].ravel())[0, 1]
    across = np.corrcoef(sample[:, :-1].ravel(), sample[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.016  # 5 sd of 1 / sqrt(98 000)
    assert abs(across) < 0.016


def test_derived_seeds_depend_on_every_part_and_on_the_order() -> None:
    parts = [7, 3, 0, 0xFFFFFFFFFFFFFFFF, 1, 2]
    seeds = {derive_seed(*parts), derive_seed(*reversed(parts)), derive_seed(*parts, 0)}
    seeds |= {derive_seed(*parts[:i], parts[i] ^ 1, *parts[i + 1 :]) for i in range(len(parts))}
    assert len(seeds) == 3 + len(parts)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_streams_of_a_run_are_apart() -> None:
    assert len({stream_seed(run, name) for run in range(10) for name in ("train", "eval")}) == 20
