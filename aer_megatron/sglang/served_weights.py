"""What an SGLang server holds for Hugging Face tensors: its parameter names, and the checksums that it must report.

A server joins q, k and v, gate and up, and all experts of a layer, pads the vocabulary with zeros, and cuts the
result for its tensor-parallel ranks. /weights_checker reports the first 64 bits of SHA-256 over the bytes of each
parameter (on CPU; a CUDA server uses a hash of its own). Both sides are compared through ``ServedChecksums``.

Of a parameter in blocks of FP8 the server hashes what values and scales stand for, rounded to bf16, under the weight's
name; the scales have no checksum of their own.

This file does NOT talk to servers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.fp8_quantize import E4M3
from aer_megatron.convert.fp8_weights import SCALE_SUFFIX, dequantize_weight

VOCAB_MULTIPLE = 64  # a server pads its vocabulary to a multiple of this
_HEX_DIGITS = 16  # 64 bits
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_JOINED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)} | {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_NUM_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
_ROW_PARALLEL = (".o_proj.weight", ".down_proj.weight")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


@dataclass(slots=True)
class _Parameter:
    """One served parameter on one rank: its parts are hashed in order, those that come early wait."""

    num_parts: int
    hasher: Any = field(default_factory=hashlib.sha256)
    reached: int = 0
    early: dict[int, Tensor] = field(default_factory=dict)

    def add(self, part: int, tensor: Tensor) -> None:
        self.early[part] = tensor
        while self.reached in self.early:
            whole = self.early.pop(self.reached).contiguous().reshape(-1)
            raw: Any = whole.view(torch.uint8).numpy()
            self.hasher.update(raw)
            self.reached += 1


class ServedChecksums:
    """The checksums, by served name and rank, of a server with ``tp_size`` ranks; feed every tensor once, in any order.

    Example: of q_proj, k_proj and v_proj it holds ``model.layers.0.self_attn.qkv_proj.weight``.
    """

    def __init__(self, arch: ModelArchitecture, *, tp_size: int) -> None:
        self._arch = arch
        self._tp_size = tp_size
        self._ranks: list[dict[str, _Parameter]] = [{} for _ in range(tp_size)]
        self._unscaled: dict[str, Tensor] = {}  # FP8 values that wait for their scales

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one Hugging Face tensor; nothing of it is kept once its neighbours have come.

        FP8 values come before their scales.
        """
        if name == "lm_head.weight" and self._arch.tied_embeddings:
            return
        host = tensor.detach().cpu()
        if host.dtype == E4M3:
            self._unscaled[name] = host
            return
        weight_name = name.removesuffix(SCALE_SUFFIX)
        if weight_name in self._unscaled:
            name, host = weight_name, dequantize_weight(self._unscaled.pop(weight_name), host, torch.bfloat16)
        served, part, num_parts = self._part_of(name)
        for rank, parameters in enumerate(self._ranks):
            parameter = parameters.setdefault(served, _Parameter(num_parts))
            parameter.add(part, self._cut(name, host, rank))

    def result(self) -> list[dict[str, str]]:
        """Returns, for every rank, the checksum of every served parameter.

        Raises:
            ValueError: part of a joined parameter, or the scales of FP8 values, never came.
        """
        for name in self._unscaled:
            raise ValueError(f"{name}: the scales of its FP8 values were not sent")
        for name, parameter in self._ranks[0].items():
            if parameter.reached != parameter.num_parts:
                raise ValueError(f"{name}: only {parameter.reached} of its {parameter.num_parts} parts were sent")
        return [
            {name: parameter.hasher.hexdigest()[:_HEX_DIGITS] for name, parameter in parameters.items()}
            for parameters in self._ranks
        ]

    def _part_of(self, name: str) -> tuple[str, int, int]:
        """Returns the served name, which part of it the tensor is, and the number of parts."""
        expert = _EXPERT.match(name)
        if expert is not None:
            assert self._arch.moe is not None
            prefix, number, kind = expert.group(1), int(expert.group(2)), expert.group(3)
            if kind == "down":
                return f"{prefix}.w2_weight", number, self._arch.moe.num_experts
            return f"{prefix}.w13_weight", 2 * number + (kind == "up"), 2 * self._arch.moe.num_experts
        *path, module, leaf = name.split(".")
        joined, part = _JOINED.get(module, (module, 0))
        return ".".join([*path, joined, leaf]), part, _NUM_PARTS.get(joined, 1)

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        if name.endswith(_VOCABULARY):
            padding = -tensor.shape[0] % VOCAB_MULTIPLE
            tensor = torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]) if padding else tensor
            return tensor.chunk(self._tp_size)[rank]
        if self._tp_size == 1:
            return tensor
        if name.endswith(_ROW_PARALLEL):
            return tensor.chunk(self._tp_size, dim=1)[rank]
        module = name.split(".")[-2]
        if module in ("k_proj", "v_proj") and self._arch.num_kv_heads < self._tp_size:
            return tensor.chunk(self._arch.num_kv_heads)[rank * self._arch.num_kv_heads // self._tp_size]
        return tensor.chunk(self._tp_size)[rank] if module in _JOINED else tensor


def first_difference(expected: list[dict[str, str]], reported: Any, *, names_only: bool = False) -> str:
    """Returns what is wrong with the ranks of a /weights_checker reply, nothing where every checksum is right.

    Args:
        expected: by tensor-parallel rank, ``ServedChecksums.result``.
        reported: the reply's ``ranks``.
        names_only: whether the server's hash is another than ours.
    """
    seen: set[tuple[int, str]] = set()
    for rank, checksums in _reported_ranks(reported):
        if not 0 <= rank < len(expected):
            return f"it reports a tensor-parallel rank {rank}, {len(expected)} were expected"
        for name, value in checksums.items():
            wanted = expected[rank].get(name)
            if wanted is None:
                return f"it holds {ascii(name)[1:-1][:200]}, which was never sent"
            if value != wanted and not names_only:
                return f"{name} has checksum {_shown(value)}, {wanted} was sent"
            seen.add((rank, name))
    for rank, wanted_names in enumerate(expected):
        for name in wanted_names:
            if (rank, name) not in seen:
                return f"it does not report {name} of tensor-parallel rank {rank}"
    return ""


def probe_of_fp8() -> dict[str, Any]:
    """Returns the body of a /weights_checker call that makes a server report its FP8 weights only.

    It leaves out what contains one of the words, but never a weight with scales (utils/weight_checker.py of 0.5.23).
    """
    return {"action": "checksum", "skip_tensor_list": ["norm", "embed", "lm_head", "proj", "experts", "gate"]}


def holds_fp8(reported: Any) -> bool | None:
    """Returns whether a server's reply to ``probe_of_fp8`` names weights in FP8; None where it does not say."""
    rows = [checksums for _, checksums in _reported_ranks(reported)]
    if not rows or any("norm" in name for checksums in rows for name in checksums):
        return None  # an older server, which reports everything
    return any(rows)


def by_rank(reported: Any) -> list[dict[str, str]]:
    """Returns the checksums of a /weights_checker reply's ``ranks``, by tensor-parallel rank."""
    rows = dict(_reported_ranks(reported))
    return [dict(rows.get(rank, {})) for rank in range(len(rows))]


def _reported_ranks(reported: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (rank, checksums) of those rows of a reply that can be a server's report; -1 is no rank."""
    for row in reported if isinstance(reported, list) else []:
        if not isinstance(row, Mapping) or not isinstance(row.get("checksums"), Mapping):
            continue
        info = row.get("parallelism_info")
        # one entry per role of the engine; the target comes first
        first = info[0] if isinstance(info, list) and info else info
        rank = first.get("tp_rank", 0) if isinstance(first, Mapping) else 0
        yield rank if type(rank) is int else -1, row["checksums"]


def _shown(value: Any) -> str:
    return ascii(value)[1:-1][:40] if isinstance(value, str) else f"of type {type(value).__name__}"
