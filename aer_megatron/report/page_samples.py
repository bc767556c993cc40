"""The samples that the HTML report shows: of RUN/samples the best, the worst, the most uncertain, and some per reason.

Memory is bounded whatever lies there: rows are read in batches, and a fixed number of them is kept.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLES_FOLDER = "samples"
KEPT_OF_A_KIND = 24  # of the best, the worst, the most uncertain, and of each reason
MAX_REASONS = 12
MAX_COUNTED = 1_000  # labels that are counted, each by itself
MAX_CHARACTERS = 4_000  # of a prompt, and of each end of a completion
MAX_TOKENS = 600  # of each end of a completion
Place = tuple[int, int]  # (file, row in it)
_COLUMNS = (
    *("step", "set", "prompt_id", "group", "prompt", "answer", "completion", "token_ends", "sampled", "reward"),
    *("reason", "advantage", "difficulty", "entropy_weight", "token_entropy", "policy_version_min", "truncated"),
)


def page_samples(run_folder: Path) -> dict[str, Any]:
    """Returns ``{"total", "reasons": {reason: count}, "rows": [...]}``; ``total`` 0 where no sample was kept.

    Raises:
        ValueError: a file is no Parquet of samples.
    """
    reasons: Counter[str] = Counter()
    kept: dict[str, list[tuple[float, int, Place]]] = {}
    paths = sorted((run_folder / SAMPLES_FOLDER).glob("*.parquet"))
    order = itertools.count()
    for file, path in enumerate(paths):
        for row, (step, reward, reason, entropy) in enumerate(_figures(path)):
            reasons[reason if reason in reasons or len(reasons) < MAX_COUNTED else "(others)"] += 1
            values = {"best": reward + 1e-9 * step, "worst": -reward + 1e-9 * step}
            if f"reason {reason}" in kept or len(kept) < MAX_REASONS + 3:
                values[f"reason {reason}"] = step
            if entropy is not None:
                values["uncertain"] = entropy
            for kind, value in values.items():
                heap = kept.setdefault(kind, [])
                heapq.heappush(heap, (value, -next(order), (file, row)))
                if len(heap) > KEPT_OF_A_KIND:
                    heapq.heappop(heap)
    chosen = {place for heap in kept.values() for *_, place in heap}
    rows = [
        row
        for file, path in enumerate(paths)
        for row in _rows(path, {index for other, index in chosen if other == file})
    ]
    rows.sort(key=lambda row: -(row["step"] or 0))
    return {
        "total": reasons.total(),
        "reasons": dict(reasons.most_common(100)),
        "rows": [_shown(row) for row in rows],
    }


def _figures(path: Path) -> Iterator[tuple[int, float, str, float | None]]:
    """Yields (step, reward, reason, mean token entropy in nats) of every row; of absent numbers 0."""
    for batch in _batches(path, ("step", "reward", "reason", "token_entropy")):
        count = batch.num_rows
        means: list[float | None] = [None] * count
        if "token_entropy" in batch.schema.names:
            column = batch.column("token_entropy")
            length_N = np.nan_to_num(column.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
            sums = np.diff(np.concatenate([[0.0], np.cumsum(values)])[np.concatenate([[0], np.cumsum(length_N)])])
            means = [float(total / length) if length else None for total, length in zip(sums, length_N, strict=True)]
        reasons = batch.column("reason").to_pylist() if "reason" in batch.schema.names else [None] * count
        steps, rewards = batch.column("step").to_pylist(), batch.column("reward").to_pylist()
        for step, reward, reason, mean in zip(steps, rewards, reasons, means, strict=True):
            yield step or 0, reward or 0.0, str(reason)[:80], mean


def _rows(path: Path, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file whose numbers are ``wanted``, with the columns that the page shows."""
    if not wanted:
        return
    first = 0
    for batch in _batches(path, _COLUMNS):
        inside = sorted(index - first for index in wanted if first <= index < first + batch.num_rows)
        yield from batch.take(pa.array(inside, pa.int64())).to_pylist()
        first += batch.num_rows


def _batches(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the columns of ``names`` that a file has, some rows at a time; raises ValueError that names the file."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, (what, fits) in _NEEDED.items():
                if name not in schema.names or not fits(schema.field(name).type):
                    raise ValueError(f"its column {name} must hold {what}")
            if "token_entropy" in schema.names and not _is_list_of_floats(schema.field("token_entropy").type):
                raise ValueError("its column token_entropy must hold lists of floats")
            yield from file.iter_batches(batch_size=64, columns=[name for name in names if name in schema.names])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no Parquet of samples ({error}); repair it or move it away") from None


def _is_list_of_floats(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)


def _is_list_of_integers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)


_NEEDED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "step": ("integers", pa.types.is_integer),
    "reward": ("floats", pa.types.is_floating),
    "completion": ("strings", pa.types.is_string),
    "token_ends": ("lists of integers", _is_list_of_integers),
}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page shows of a row: texts cut, the completion in the texts of its tokens."""
    texts, entropies = _tokens(row)
    left_out = len(texts) - 2 * MAX_TOKENS
    if left_out > 0:
        texts = [*texts[:MAX_TOKENS], f" [... {left_out} tokens ...] ", *texts[-MAX_TOKENS:]]
        entropies = [*entropies[:MAX_TOKENS], None, *entropies[-MAX_TOKENS:]]
    completion = str(row["completion"] or "")
    answer = str(row.get("answer") or "")[:200]
    return {
        "step": row["step"] or 0,
        "set": str(row.get("set"))[:80],
        "prompt_id": f"{row.get('prompt_id') or 0:016x}",
        "group": row.get("group"),
        "prompt": _middle_cut(str(row.get("prompt"))),
        "answer": answer,
        "boxed": last_boxed(completion),
        "end": completion[-240:],
        "answer_absent": bool(answer) and answer not in completion,
        "tokens": texts,
        "entropy": entropies,
        "mean_entropy": sum(known) / len(known)
        if (known := [each for each in entropies if each is not None])
        else None,
        "reward": _number(row.get("reward")),
        "reason": str(row.get("reason"))[:80],
        "advantage": _number(row.get("advantage")),
        "difficulty": _number(row.get("difficulty")),
        "entropy_weight": _number(row.get("entropy_weight")),
        "version": row.get("policy_version_min"),
        "truncated": bool(row.get("truncated")),
    }


def _tokens(row: dict[str, Any]) -> tuple[list[str], list[float | None]]:
    """Returns the text and the entropy (nats; None where none was kept) of every token of a completion."""
    completion, ends = str(row["completion"] or ""), row["token_ends"] or []
    texts = [completion[start:end] for start, end in itertools.pairwise([0, *ends])]
    if rest := completion[ends[-1] if ends else 0 :]:
        texts.append(rest)
    texts = [_middle_cut(text) for text in texts]
    values = iter(row.get("token_entropy") or ())
    sampled = row.get("sampled") or [True] * len(texts)
    entropies = [next(values, None) if own else None for own, _ in zip(sampled, texts, strict=False)]
    entropies += [None] * (len(texts) - len(entropies))
    return texts, [None if value is None else _number(round(float(value), 3)) for value in entropies]


def last_boxed(text: str) -> str | None:
    r"""Returns what stands in the last ``\boxed{...}`` of a completion, at most 200 characters; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index, character in enumerate(text[start : start + 200]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start : start + index]
    return text[start : start + 200]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _middle_cut(text: str) -> str:
    left_out = len(text) - 2 * MAX_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:MAX_CHARACTERS]} [... {left_out} characters ...] {text[-MAX_CHARACTERS:]}"
