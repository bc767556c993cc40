"""Parameters of a decoder-only transformer (RMSNorm, SwiGLU, RoPE, grouped-query attention), counted exactly.

Every count is an integer that follows from the shapes alone: of the whole model, and of one rank's part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Recompute = Literal["none", "selective", "full"]


class MoeSizes(Protocol):
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...


class ModelSizes(Protocol):
    """What the arithmetic needs of a model; ``convert.architecture.ModelArchitecture`` has it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def padded_heads(self) -> int: ...
    @property
    def padded_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def moe(self) -> MoeSizes | None: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over ranks. Example, 8 GPUs: ``Layout(tp=2, pp=1, dp=4, sequence_parallel=True)``."""

    tp: int
    pp: int
    dp: int
    ep: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    cp: int = 1
    vpp: int = 1  # model chunks per pipeline rank

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same weights and share their optimizer's state."""
        return self.dp * self.cp

    @property
    def sequence_shards(self) -> int:
        """Ranks that share what lies between tensor-parallel regions: norms and residuals."""
        return self.tp if self.sequence_parallel else 1

    @property
    def text(self) -> str:
        """What a reader calls it: ``tp 2 pp 1 dp 4 sp``."""
        expert = f" ep {self.ep}" if self.ep > 1 else ""
        context = f" cp {self.cp}" if self.cp > 1 else ""
        chunks = f" vpp {self.vpp}" if self.vpp > 1 else ""
        sequence = " sp" if self.sequence_parallel else ""
        recompute = f" recompute {self.recompute}" if self.recompute != "none" else ""
        return f"tp {self.tp} pp {self.pp}{chunks}{context} dp {self.dp}{expert}{sequence}{recompute}"


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer by how ranks share them."""

    split: int  # over tp
    whole: int  # norms and the router, on every tp rank
    experts: int  # over ep and tp

    @property
    def total(self) -> int:
        return self.split + self.whole + self.experts


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters held by one rank; experts are replicated, and their optimizer sharded, over dp / ep ranks only."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def query_width(model: ModelSizes) -> int:
    """Returns the columns of all query heads."""
    return model.padded_heads * model.head_dim


def kv_width(model: ModelSizes) -> int:
    """Returns the columns of all key heads (the value heads have as many)."""
    return model.padded_kv_heads * model.head_dim


def layer_parameters(model: ModelSizes) -> LayerParameters:
    """Returns the parameters of one decoder layer."""
    hidden, query, kv = model.hidden_size, query_width(model), kv_width(model)
    split = hidden * (query + 2 * kv) + query * hidden
    if model.qkv_bias:
        split += query + 2 * kv
    whole = 2 * hidden + (2 * model.head_dim if model.qk_norm else 0)
    if model.moe is None:
        return LayerParameters(split + 3 * hidden * model.ffn_hidden_size, whole, 0)
    experts = model.moe.num_experts * 3 * hidden * model.moe.ffn_hidden_size
    return LayerParameters(split, whole + hidden * model.moe.num_experts, experts)


def parameter_count(model: ModelSizes) -> int:
    """Returns the number of parameters, each shared one counted once: what the model's publisher counts."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return embeddings + model.num_layers * layer_parameters(model).total + model.hidden_size


def rank_parameters(model: ModelSizes, layout: Layout, *, stage: int, vocab_rows: int) -> RankParameters:
    """Returns the parameters of one rank of pipeline stage ``stage``; ``vocab_rows`` is the padded vocabulary."""
    layer = layer_parameters(model)
    per_stage = model.num_layers // layout.pp
    matrix = vocab_rows // layout.tp * model.hidden_size
    first, last = stage == 0, stage == layout.pp - 1
    dense = per_stage * (layer.split // layout.tp + layer.whole)
    if first:
        dense += matrix
    if last:
        dense += model.hidden_size + (0 if first and model.tied_embeddings else matrix)
    return RankParameters(dense, per_stage * layer.experts // (layout.tp * layout.ep))


def active_matrix_parameters(model: ModelSizes) -> int:
    """Returns the matrix elements of the layers that one token meets: N of the 6 N D rule, without the head."""
    hidden = model.hidden_size
    attention = hidden * (query_width(model) + 2 * kv_width(model)) + query_width(model) * hidden
    if model.moe is None:
        return model.num_layers * (attention + 3 * hidden * model.ffn_hidden_size)
    experts = model.moe.top_k * 3 * hidden * model.moe.ffn_hidden_size + hidden * model.moe.num_experts
    return model.num_layers * (attention + experts)
