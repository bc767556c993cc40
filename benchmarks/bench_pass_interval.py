"""How often 95 % intervals of the mean pass@k hold the truth; writes benchmarks/results/pass_interval.md.

    python -m benchmarks.bench_pass_interval    # a minute

Problems are drawn from a population, and 16 answers from each; the truth is the mean of 1 - (1 - q)^k over the
population's success rates q. Populations, all with the same mean rate:
  alike            Beta, a + b = 200
  Beta 8, 2, 1     a + b = 8, 2, 1: from one hump to two horns
  always or never  every problem is solved always or never
  half never       half of the problems never, the others Beta with a + b = 4
Beside ``pass_interval`` stands the percentile bootstrap over problems, 1000 resamples. Everything is seeded.

This file does NOT judge the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aer_megatron.algo.passk import mean_interval, pass_at_k

RESULTS = Path(__file__).parent / "results" / "pass_interval.md"
NUM_SAMPLES, RATES, KS = 16, (0.1, 0.2, 0.3, 0.5), (1, 4, 8)
TRUTH_DRAWS = 1_000_000
RESAMPLES = 1000
Intervals = tuple[np.ndarray, np.ndarray]  # low and high, [R] each, of R repetitions


def beta(total: float) -> Callable[[np.random.Generator, float, tuple[int, ...]], np.ndarray]:
    return lambda random, mean, shape: random.beta(total * mean, total * (1 - mean), shape)


def always_or_never(random: np.random.Generator, mean: float, shape: tuple[int, ...]) -> np.ndarray:
    return (random.random(shape) < mean).astype(np.float64)


def half_never(random: np.random.Generator, mean: float, shape: tuple[int, ...]) -> np.ndarray:
    if mean >= 0.5:
        return always_or_never(random, mean, shape)
    return np.where(random.random(shape) < 0.5, 0.0, beta(4)(random, 2 * mean, shape))


POPULATIONS = {
    "alike": beta(200),
    "Beta 8": beta(8),
    "Beta 2": beta(2),
    "Beta 1": beta(1),
    "always or never": always_or_never,
    "half never": half_never,
}


def plus_two(value_RP: np.ndarray) -> Intervals:
    counts_P = np.full(value_RP.shape[1], NUM_SAMPLES)
    low_high = np.array([mean_interval(value_P, counts_P) for value_P in value_RP])
    return low_high[:, 0], low_high[:, 1]


def bootstrap(value_RP: np.ndarray) -> Intervals:
    num_problems = value_RP.shape[1]
    weights = np.random.default_rng(1).multinomial(num_problems, np.full(num_problems, 1 / num_problems), RESAMPLES)
    low, high = np.quantile(value_RP @ (weights.T / num_problems), [0.025, 0.975], axis=1)
    return low, high


def cell(population: str, mean: float, k: int, num_problems: int, repetitions: int) -> tuple[float, ...]:
    """Returns the truth, and coverage and mean width of both intervals."""
    draw = POPULATIONS[population]
    random = np.random.default_rng([int(mean * 10), k, num_problems, *population.encode()])
    truth = float((1 - (1 - draw(random, mean, (TRUTH_DRAWS,))) ** k).mean())
    correct_RP = random.binomial(NUM_SAMPLES, draw(random, mean, (repetitions, num_problems)))
    value_C = pass_at_k(np.full(NUM_SAMPLES + 1, NUM_SAMPLES), np.arange(NUM_SAMPLES + 1), k=k)
    figures = [truth]
    for method in (bootstrap, plus_two):
        low, high = method(value_C[correct_RP])
        figures += [float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean())]
    return tuple(figures)


def table(rows: list[tuple[str, float, int, int]], repetitions: int) -> list[str]:
    cells = [cell(*row, repetitions) for row in rows]
    inside = [sum(abs(figures[at] - 0.95) <= 0.015 for figures in cells) for at in (1, 3)]
    lines = [
        f"Within 95 +- 1.5 %: the bootstrap in {inside[0]}, `pass_interval` in {inside[1]} of {len(rows)} lines.",
        "",
        "| population | problems | rate | k | pass@k | bootstrap covers | width | pass_interval covers | width |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (population, rate, k, num_problems), (truth, cover, width, own_cover, own_width) in zip(
        rows, cells, strict=True
    ):
        figures = f"{truth:.3f} | {cover:.3f} | {width:.3f} | {own_cover:.3f} | {own_width:.3f} |"
        lines.append(f"| {population} | {num_problems} | {rate} | {k} | {figures}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10_000)
    repetitions = parser.parse_args().repetitions
    rows = [(population, rate, k, 30) for population in POPULATIONS for k in KS for rate in RATES]
    more = [("Beta 2", rate, k, count) for count in (5, 10, 100, 500) for k in (1, 8) for rate in (0.1, 0.5)]
    RESULTS.write_text(
        "\n".join(
            [
                "# How often the interval of pass@k holds the truth",
                "",
                f"`python -m benchmarks.bench_pass_interval`, {repetitions} repetitions a line: a coverage has a "
                f"standard error of {(0.95 * 0.05 / repetitions) ** 0.5:.4f}. {NUM_SAMPLES} answers a problem; what "
                "the populations are stands in that file.",
                "",
                "## 30 problems",
                "",
                *table(rows, repetitions),
                "",
                "## Other numbers of problems",
                "",
                *table(more, repetitions),
                "",
            ]
        ),
        encoding="utf-8",
    )
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
