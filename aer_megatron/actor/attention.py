"""Exact causal attention in plain PyTorch: padded or packed sequences, with or without context parallelism.

It is the core attention of the local layers in place of Megatron-Core's, which knows neither packing nor context
parallelism and holds the whole score matrix. A packed sequence never meets another one: each run of equal lengths is
its own call, so that changing one sequence changes no bit of the others. Where TransformerEngine's layers run, theirs
is used instead.

Shape suffixes: S padded length, b sequences, t packed tokens of this rank, h heads, g query groups (KV heads),
d head size, n sequences of one length, l their length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aer_megatron.parallel.context import gather_context


class ExactAttention(torch.nn.Module):
    """Core attention of a Megatron-Core layer; has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        del layer_number, attn_mask_type, cp_comm_type
        super().__init__()
        if attention_type != "self" or config.softmax_type != "vanilla" or config.window_size is not None:
            raise ValueError(
                f"attention_type={attention_type!r}, softmax_type={config.softmax_type!r}, window_size="
                f"{config.window_size}: without TransformerEngine only plain causal self-attention runs"
            )
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._scale = softmax_scale  # None: 1 / sqrt(d)
        self._cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns the heads' outputs side by side, [S, b, h d] or, packed, [t, h d].

        Args:
            query: [S, b, h, d], packed [t, h, d]; under context parallelism S and t are this rank's share.
            key, value: as ``query`` with g instead of h.
            packed_seq_params: the lengths of all sequences over all ranks, of which ``cu_seqlens_q`` is read.
        """
        del attention_mask, attn_mask_type
        assert attention_bias is None
        if packed_seq_params is None:
            out_bShd = self._attention(*(x.transpose(0, 1) for x in (query, key, value)))
            return out_bShd.transpose(0, 1).flatten(2).contiguous()
        parts = []
        for rows, length in self._runs(packed_seq_params):
            out_nlhd = self._attention(*(x[rows].unflatten(0, (-1, length)) for x in (query, key, value)))
            parts.append(out_nlhd.flatten(0, 1))
        return torch.cat(parts).flatten(1)

    def _runs(self, packed: PackedSeqParams) -> Iterator[tuple[slice, int]]:
        """Yields this rank's rows of neighbouring sequences that have one length, and that length."""
        ranks = 1 if self._cp_group is None else self._cp_group.size()
        lengths = (packed.cu_seqlens_q.diff() // ranks).tolist()
        first, start = 0, 0
        for index, length in enumerate(lengths):
            if index + 1 == len(lengths) or lengths[index + 1] != length:
                stop = start + (index + 1 - first) * length
                if length:
                    yield slice(start, stop), length
                first, start = index + 1, stop

    def _attention(self, query_nlhd: Tensor, key_nlgd: Tensor, value_nlgd: Tensor) -> Tensor:
        """Returns [n, l, h, d] of n sequences of one length, which see nothing of one another."""
        query = query_nlhd.transpose(1, 2)
        if self._cp_group is None:
            return self._product(query, key_nlgd.transpose(1, 2), value_nlgd.transpose(1, 2), None).transpose(1, 2)
        rank, ranks = self._cp_group.rank(), self._cp_group.size()
        key, value = (self._natural_order(x).transpose(1, 2) for x in (key_nlgd, value_nlgd))
        chunk = query.shape[2] // 2
        parts = []
        for part, index in enumerate((rank, 2 * ranks - 1 - rank)):
            seen = (index + 1) * chunk
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=query.device).tril(seen - chunk)
            own = query[:, :, part * chunk : (part + 1) * chunk]
            parts.append(self._product(own, key[:, :, :seen], value[:, :, :seen], mask))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _natural_order(self, local_nlgd: Tensor) -> Tensor:
        """Returns [n, l R, g, d]: all ranks' keys or values in the order of the sequence."""
        assert self._cp_group is not None
        ranks = self._cp_group.size()
        of_ranks = gather_context(local_nlgd.contiguous(), self._cp_group).unflatten(2, (2, -1))
        chunks = [of_ranks[r, :, 0] for r in range(ranks)] + [of_ranks[r, :, 1] for r in reversed(range(ranks))]
        return torch.cat(chunks, dim=1)

    def _product(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self._dropout if self.training else 0.0
        # dropout differs between tensor-parallel ranks, which hold different heads
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self._scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
