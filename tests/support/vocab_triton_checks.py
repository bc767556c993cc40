"""Runs the Triton kernels of the vocabulary shard in Triton's interpreter and prints errors as JSON.

A program of its own because TRITON_INTERPRET must be set before Triton is imported:
    TRITON_INTERPRET=1 python -m tests.support.vocab_triton_checks
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy, logprob_entropy, logprob_entropy_gradient
from aer_megatron.parallel.vocab_shard import (
    TokenState,
    VocabShard,
    combine_statistics,
    empty_statistics,
    token_gradient,
)
from aer_megatron.parallel.vocab_triton import TritonKernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# tokens, columns, real columns, shards: one column, odd sizes, several blocks of the kernels, empty shards
SHAPES = [(1, 1, 1, 1), (3, 17, 17, 1), (5, 38, 31, 2), (2, 9001, 9000, 1), (3, 8300, 5000, 2), (4, 40, 7, 4)]


def _logits(kind: str, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    logits = 3 * torch.randn(tokens, columns, generator=generator)
    if kind == "masked":
        logits[torch.rand(tokens, columns, generator=generator) < 0.6] = -math.inf
        logits[:, 0] = 0.5
    if kind == "large":
        logits = logits.sign() * 1e4
    return logits.to(dtype)


def _shards(columns: int, real: int, count: int, temperature: float) -> list[VocabShard]:
    width = columns // count
    return [
        VocabShard(r * width, min(max(real - r * width, 0), width), real, temperature, None, True) for r in range(count)
    ]


def _forward(parts: list[Tensor], labels: Tensor, shards: list[VocabShard]) -> tuple[LogprobEntropy, TokenState]:
    blocks = []
    for part, shard in zip(parts, shards, strict=True):
        stats = empty_statistics(part.shape[0], shard, part)
        TritonKernel(shard, part.shape[0]).reduce_rows(part[:, : shard.width], labels - shard.start, stats)
        blocks.append(stats)
    return combine_statistics(torch.stack(blocks), shards[0])


def _error(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None
    same = (got.isinf() & wanted.isinf()) | (got.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (got.double() - wanted.double()).abs() / (1 + wanted.abs()))
    return float("inf") if bool(error.isnan().any()) else float(error.max())


def run_case(dtype: torch.dtype, kind: str, shape: tuple[int, int, int, int], which: str) -> dict[str, float]:
    """Returns the largest errors of values and gradient; `which` outputs have a gradient: both, logprob, entropy."""
    tokens, columns, real, count = shape
    temperature = 0.8
    wide = _logits(kind, tokens, columns + 3, dtype)  # rows are strided, as a slice of a larger tensor is
    logits = wide[:, :columns]
    generator = torch.Generator().manual_seed(tokens)
    labels = torch.randint(0, real, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator)
    shards = _shards(columns, real, count, temperature)
    parts = list(logits.split(columns // count, dim=1))
    original = logits.clone()
    result, state = _forward(parts, labels, shards)
    untouched = torch.equal(logits, original)
    wanted = logprob_entropy(original, labels, temperature=temperature, vocab_size=real)
    chosen = [grads[0] if which != "entropy" else None, grads[1] if which != "logprob" else None]
    gradient = token_gradient(state, chosen[0], chosen[1], temperature)
    for part, shard in zip(parts, shards, strict=True):
        window = part[:, : shard.width]
        TritonKernel(shard, tokens).write_gradient(window, labels - shard.start, gradient, window)
    zero = torch.zeros(tokens)
    wanted_gradient = logprob_entropy_gradient(
        original,
        labels,
        zero if chosen[0] is None else chosen[0],
        zero if chosen[1] is None else chosen[1],
        temperature=temperature,
        vocab_size=real,
    )
    values = max(_error(got, want) for got, want in zip(result, wanted, strict=True))
    error = _error(logits[:, :real], wanted_gradient[:, :real])
    beyond = torch.equal(wide[:, columns:], _logits(kind, tokens, columns + 3, dtype)[:, columns:])
    return {"values": values, "gradient": error, "intact": float(untouched and beyond)}


def nan_case() -> dict[str, float]:
    """A row of -inf in every shard is NaN, a NaN logit stays NaN, other rows are untouched by either."""
    logits = torch.zeros(3, 5)
    logits[0] = -math.inf
    logits[1, 2] = math.nan
    shard = _shards(5, 5, 1, 1.0)[0]
    entropy = _forward([logits], torch.zeros(3, dtype=torch.int64), [shard])[0].entropy_T
    right = entropy.isnan().tolist() == [True, True, False] and abs(float(entropy[2]) - math.log(5)) < 1e-6
    return {"values": 0.0 if right else math.inf, "gradient": 0.0, "intact": 1.0}


def main() -> None:
    outcome = {"nan": nan_case()}
    for name, dtype in DTYPES.items():
        for kind in ("normal", "masked", "large"):
            for shape in SHAPES:
                outcome[f"{name}-{kind}-{shape}"] = run_case(dtype, kind, shape, "both")
    for which in ("logprob", "entropy"):
        outcome[f"only-{which}"] = run_case(torch.float32, "normal", SHAPES[1], which)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
