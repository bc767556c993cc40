"""What one rank stores of an actor, and how any layout finds its tensors in the files of another.

Three kinds of safetensors files, named by the coordinates of the rank that wrote them:

    model-*      weight/NAME          this stage's shard of every parameter (written by the first replica; files of
                                      expert-parallel ranks above 0 hold those of their experts)
                 buffer/NAME          persistent buffers, stage-local names
    optimizer-*  STATE/NAME@START     a flat piece of the shard, from element START: the distributed optimizer's own
                                      cut. STATE is exp_avg, exp_avg_sq, and param where the fp32 main copy is separate
    rng-*        torch, cuda, tracker/NAME

NAME is Megatron's with global layer numbers. Optimizer state has the shape of its parameter, so that the mapping of
weights to Hugging Face tensors and back (convert/) also recuts optimizer state: no rank has to talk to another.

This file does NOT know folders, manifests' files or agreement between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from safetensors import safe_open
from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES, PolicyModel, named_weights
from aer_megatron.actor.weights import has_te_names
from aer_megatron.checkpoint.manifest import TensorLayout
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.mapping import hf_tensors_of, hf_to_shard, is_expert, shard_shape, shards_to_hf
from aer_megatron.parallel.topology import Topology

WEIGHT, BUFFER, MAIN = "weight", "buffer", "param"
_STEP = "step"  # Adam's counter: the same for every tensor, so the manifest has it


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, end) of this rank's flattened shard of parameter ``name``, owned by its optimizer."""

    name: str
    parameter: Tensor
    optimizer: Any  # Megatron's DistributedOptimizer
    start: int
    end: int

    def tensors(self) -> dict[str, Tensor]:
        """Returns the optimizer's live tensors: "param" and, once stepped, Adam's moments (and torch's "step")."""
        return dict(self.optimizer._get_main_param_and_optimizer_states(self.parameter))


@dataclass(frozen=True, slots=True)
class ActorTensors:
    """A rank's part of a checkpoint, read and cut, not yet in the actor. ``rng`` is None from another layout."""

    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]  # by parameter name, then by state name
    rng: Mapping[str, Tensor] | None


def actor_layout(actor: Actor) -> TensorLayout:
    """Returns how this run cuts its tensors."""
    topology = actor.topology
    return TensorLayout(
        tp=topology.tp,
        pp=topology.pp,
        dp=topology.dp,
        padded_vocab=int(actor.chunks[0].vocab_size),
        num_padding_groups=actor.arch.num_padding_groups,
        ep=topology.ep,
        cp=topology.cp,
        vpp=topology.vpp,
        transformer_engine=has_te_names(actor.chunks),
    )


def actor_dtype(actor: Actor) -> str:
    """Returns the weights' dtype as the run file spells it."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return names[actor.chunks[0].config.params_dtype]


def model_file(tp_rank: int, pp_rank: int, ep_rank: int) -> str:
    experts = f"-ep{ep_rank:02d}" if ep_rank else ""
    return f"model-tp{tp_rank:02d}-pp{pp_rank:02d}{experts}.safetensors"


def optimizer_file(tp_rank: int, pp_rank: int, replica_rank: int) -> str:
    """The replica is one of dp x cp: context-parallel ranks share the optimizer's state like data-parallel ones."""
    return f"optimizer-tp{tp_rank:02d}-pp{pp_rank:02d}-dp{replica_rank:03d}.safetensors"


def rng_file(tp_rank: int, pp_rank: int, replica_rank: int) -> str:
    return f"rng-tp{tp_rank:02d}-pp{pp_rank:02d}-dp{replica_rank:03d}.safetensors"


def own_files(actor: Actor) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Returns file name -> (part, live tensors by name) of what this rank writes of the actor.

    The tensors are those that training goes on to change: copy them before the next update.
    """
    topology = actor.topology
    tp_rank, pp_rank, replica = topology.tp_rank, topology.pp_rank, topology.replica_rank
    files = {
        optimizer_file(tp_rank, pp_rank, replica): ("optimizer", _optimizer_tensors(actor)),
        rng_file(tp_rank, pp_rank, replica): ("rng", rng_tensors()),
    }
    if replica < topology.ep:  # the other replicas hold the same weights
        files[model_file(tp_rank, pp_rank, topology.ep_rank)] = ("model", _model_tensors(actor))
    return files


def _model_tensors(actor: Actor) -> dict[str, Tensor]:
    weights = {
        f"{WEIGHT}/{name}": parameter.detach()
        for name, parameter in named_weights(actor.chunks)
        if actor.topology.ep_rank == 0 or is_expert(actor.arch, name)
    }
    return weights | {f"{BUFFER}/{name}": buffer.detach() for name, buffer in _named_buffers(actor.chunks)}


def _optimizer_tensors(actor: Actor) -> dict[str, Tensor]:
    tensors = {}
    for piece in optimizer_pieces(actor):
        for state, tensor in piece.tensors().items():
            if state == _STEP or (state == MAIN and _is_view(tensor, piece.parameter)):
                continue
            tensors[f"{state}/{piece.name}@{piece.start}"] = tensor.detach()
    return tensors


def rng_tensors() -> dict[str, Tensor]:
    """Returns copies of this rank's random-number states: torch's, CUDA's and those of Megatron's tracker."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    return tensors | {f"tracker/{name}": state.detach().to("cpu", copy=True) for name, state in states.items()}


def set_rng(tensors: Mapping[str, Tensor]) -> None:
    """Returns nothing; puts back what ``rng_tensors`` returned."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    prefix = "tracker/"
    states = {key.removeprefix(prefix): state for key, state in tensors.items() if key.startswith(prefix)}
    tensor_parallel.get_cuda_rng_tracker().set_states(states)


def files_of(written: TensorLayout) -> set[str]:
    """Returns the names of all files that ranks of a layout write of an actor: those that are opened to read it."""
    names = set()
    for tp_rank in range(written.tp):
        for pp_rank in range(written.pp):
            names |= {model_file(tp_rank, pp_rank, ep_rank) for ep_rank in range(written.ep)}
            for replica in range(written.dp * written.cp):
                names |= {optimizer_file(tp_rank, pp_rank, replica), rng_file(tp_rank, pp_rank, replica)}
    return names


def read_actor_tensors(actor: Actor, folder: Path, written: TensorLayout, arch: ModelArchitecture) -> ActorTensors:
    """Returns this rank's tensors from the files in ``folder``, written under layout ``written`` of ``arch``.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    layout, topology = actor_layout(actor), actor.topology
    same = layout == written
    source = _SameLayout(folder, topology) if same else _OtherLayout(folder, written, arch, actor)
    states = source.states()
    weights = {}
    for name, parameter in named_weights(actor.chunks):
        weights[name] = _fitting(source.read(WEIGHT, name, 0, parameter.numel()), parameter, name)
    optimizer: dict[str, dict[str, Tensor]] = {}
    for piece in optimizer_pieces(actor):
        main = piece.tensors()[MAIN]
        wanted = states - {MAIN} if _is_view(main, piece.parameter) else states
        optimizer[piece.name] = {
            state: source.read(state, piece.name, piece.start, piece.end) for state in sorted(wanted)
        }
    buffers = _SameLayout(folder, topology).buffers() if same else {}
    coordinates = (topology.tp_rank, topology.pp_rank, topology.replica_rank)
    rng = dict(_read_all(folder / rng_file(*coordinates))) if same else None
    return ActorTensors(weights=weights, buffers=buffers, optimizer=optimizer, rng=rng)


@torch.no_grad()
def apply_actor_tensors(actor: Actor, tensors: ActorTensors, num_updates: int) -> None:
    """Puts weights, optimizer state, random-number states and the update counter into a newly built actor."""
    for name, parameter in named_weights(actor.chunks):
        parameter.copy_(tensors.weights[name])
    for index, chunk in enumerate(actor.chunks if tensors.buffers else []):
        prefix = _chunk_prefix(index)
        own = {name.removeprefix(prefix): buffer for name, buffer in tensors.buffers.items() if name.startswith(prefix)}
        chunk.load_state_dict(own, strict=False)
    for optimizer in _distributed_optimizers(actor):
        # looking a parameter up leaves an empty entry, which Megatron would take for allocated state
        optimizer.optimizer.state.clear()
        if num_updates:
            _allocate_moments(optimizer, num_updates)
    for piece in optimizer_pieces(actor):
        live, stored = piece.tensors(), tensors.optimizer[piece.name]
        step = torch.tensor(float(num_updates))
        piece.optimizer._set_main_param_and_optimizer_states(
            piece.parameter,
            {state: step if state == _STEP else stored.get(state, tensor) for state, tensor in live.items()},
        )
    actor.num_updates = num_updates
    if tensors.rng is not None:
        set_rng(tensors.rng)


def optimizer_pieces(actor: Actor) -> Iterator[Piece]:
    """Yields the pieces of parameters whose optimizer state lives on this rank."""
    names = {id(parameter): name for name, parameter in named_weights(actor.chunks)}
    for optimizer in _distributed_optimizers(actor):
        for parameter in optimizer.model_param_group_index_map:
            place = optimizer._get_model_param_range_map(parameter)["param"]
            yield Piece(names[id(parameter)], parameter, optimizer, place.start, place.end)


class _SameLayout:
    """Reads the files that a rank with these coordinates wrote."""

    def __init__(self, folder: Path, topology: Topology) -> None:
        tp_rank, pp_rank = topology.tp_rank, topology.pp_rank
        names = [model_file(tp_rank, pp_rank, ep_rank) for ep_rank in {0, topology.ep_rank}]
        names.append(optimizer_file(tp_rank, pp_rank, topology.replica_rank))
        self._tensors = {key: tensor for name in names for key, tensor in _read_all(folder / name)}

    def states(self) -> set[str]:
        return {key.partition("/")[0] for key in self._tensors} - {WEIGHT, BUFFER}

    def read(self, state: str, name: str, start: int, end: int) -> Tensor:
        key = f"{WEIGHT}/{name}" if state == WEIGHT else f"{state}/{name}@{start}"
        tensor = self._tensors.get(key)
        if tensor is None or tensor.numel() != end - start:
            found = "is missing" if tensor is None else f"has {tensor.numel()} elements"
            raise ValueError(
                f"{key} {found} in the checkpoint (expected {end - start} elements): another version of Megatron-Core "
                "wrote it; resume with that one (manifest.json names it), or start from its exported weights"
            )
        return tensor

    def buffers(self) -> dict[str, Tensor]:
        prefix = f"{BUFFER}/"
        return {key.removeprefix(prefix): t for key, t in self._tensors.items() if key.startswith(prefix)}


class _OtherLayout:
    """Reads any piece of any shard out of files that were cut in another way, through whole Hugging Face tensors."""

    def __init__(self, folder: Path, written: TensorLayout, arch: ModelArchitecture, actor: Actor) -> None:
        self._written = written
        self._arch = arch  # of the checkpoint: its padding may differ from the actor's
        self._actor = actor
        self._files = _index(folder, written)
        self._origin = self._hf_origins()
        self._cached: tuple[tuple[str, str], dict[str, Tensor]] = (("", ""), {})

    def states(self) -> set[str]:
        return {state for state, _, _ in self._files} - {WEIGHT, BUFFER}

    def read(self, state: str, name: str, start: int, end: int) -> Tensor:
        # this rank's shard out of whole tensors, then the piece of it
        actor = self._actor
        shard = hf_to_shard(
            actor.arch,
            name,
            lambda hf_name: self._whole(state, hf_name),
            tp_rank=actor.topology.tp_rank,
            tp_size=actor.topology.tp,
            padded_vocab=int(actor.chunks[0].vocab_size),
        )
        piece = shard.reshape(-1)[start:end]
        return piece.reshape(shard.shape) if state == WEIGHT else piece.clone()

    def _hf_origins(self) -> dict[str, str]:
        """The stored parameter behind each Hugging Face tensor; a tied head's copy never shadows the embedding."""
        names = sorted({name for state, _, name in self._files if state == WEIGHT})
        return {hf: name for name in names[::-1] for hf in hf_tensors_of(self._arch, name)}

    def _whole(self, state: str, hf_name: str) -> Tensor:
        name = self._origin.get(hf_name)
        if name is None:
            raise ValueError(f"the checkpoint has no {hf_name}; it is of another model or incomplete")
        # one parameter gives several tensors (q, k, v), asked for one after the other: the last one is kept
        if self._cached[0] != (state, name):
            shards = [self._shard(state, tp_rank, name) for tp_rank in range(self._written.tp)]
            self._cached = ((state, name), dict(shards_to_hf(self._arch, name, shards)))
        return self._cached[1][hf_name]

    def _shard(self, state: str, tp_rank: int, name: str) -> Tensor:
        shape = shard_shape(self._arch, name, tp_size=self._written.tp, padded_vocab=self._written.padded_vocab)
        # a shard's optimizer state is cut over replicas: its pieces, by where they begin
        pieces = []
        for start, path, key in sorted(self._files[state, tp_rank, name]):
            with safe_open(path, framework="pt") as file:
                pieces.append((start, file.get_tensor(key).reshape(-1)))
        # they must follow one another and fill the shard
        whole = torch.cat([piece for _, piece in pieces])
        starts = [start for start, _ in pieces]
        ends = [start + piece.numel() for start, piece in pieces]
        if starts != [0, *ends[:-1]] or whole.numel() != torch.Size(shape).numel():
            raise ValueError(f"{state} of {name} has elements {starts}..{ends} in the checkpoint, expected {shape}")
        return whole.reshape(shape)


def _index(folder: Path, written: TensorLayout) -> dict[tuple[str, int, str], list[tuple[int, Path, str]]]:
    """(state, tp rank, parameter) -> (start, file, key) of its pieces, from the headers of all files."""
    files: dict[tuple[str, int, str], list[tuple[int, Path, str]]] = {}
    for tp_rank in range(written.tp):
        for pp_rank in range(written.pp):
            paths = [model_file(tp_rank, pp_rank, ep_rank) for ep_rank in range(written.ep)]
            paths += [optimizer_file(tp_rank, pp_rank, replica) for replica in range(written.dp * written.cp)]
            for path in (folder / name for name in paths):
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dict
                        state, _, rest = key.partition("/")
                        name, _, start = rest.partition("@")
                        files.setdefault((state, tp_rank, name), []).append((int(start or 0), path, key))
    return files


def _read_all(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            yield key, file.get_tensor(key)


def _fitting(tensor: Tensor, parameter: Tensor, name: str) -> Tensor:
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, the model has {tuple(parameter.shape)}"
        )
    return tensor


def _named_buffers(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
    """Yields persistent tensors that are no parameters (FP8 scales, router biases), by their name in the state dict."""
    for index, model in enumerate(chunks):
        prefix = _chunk_prefix(index)
        parameters = {name for name, _ in model.named_parameters()}
        for name, value in model.state_dict().items():
            if name not in parameters and isinstance(value, Tensor):
                yield prefix + name, value


def _chunk_prefix(index: int) -> str:
    return f"{index}." if index else ""


def _distributed_optimizers(actor: Actor) -> list[Any]:
    chained = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]


def _allocate_moments(optimizer: Any, step: int) -> None:
    """Has Megatron allocate Adam's state, which otherwise exists only after a step; hyperparameters stay the run's."""
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {_STEP: step}
        for group in optimizer.optimizer.param_groups
    ]
    optimizer.load_state_dict({"optimizer": {"param_groups": groups}})
    for state in optimizer.optimizer.state.values():
        if _STEP in state:  # Megatron hands all parameters one counter, which each would then advance
            state[_STEP] = state[_STEP].clone()


def _is_view(main: Tensor, parameter: Tensor) -> bool:
    return main.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
