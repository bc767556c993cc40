"""Finds where an update stops being finite: the same pass once more, under probes, on all ranks together.

    forward   module outputs in the order of execution, then scores and loss of each micro-batch
    backward  gradients of module outputs in the order of execution, gradients of parameters before they are reduced

The first of each on a rank is kept; what the ranks saw is exchanged, so that all of them know the same. This costs a
synchronisation per module and is done only for an update that was found out already (actor.py).

This file does NOT decide what becomes of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aer_megatron.actor.batching import MicroBatch
from aer_megatron.actor.model import PolicyModel, global_name, named_weights
from aer_megatron.actor.nonfinite_findings import (
    MAX_SHOWN,
    Finding,
    Owner,
    Place,
    finding_from_dict,
    ordered,
    place_of_sequence,
    places_of_tokens,
    spell,
)
from aer_megatron.algo.loss import LossOutput
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.mapping import hf_tensors_of
from aer_megatron.parallel.agreement import exchange_json
from aer_megatron.parallel.topology import Topology
from aer_megatron.types import PackedSequences


class Probe:
    """What one rank sees of an update that is not finite; ``sequences`` is the batch whose places it names."""

    def __init__(
        self, chunks: Sequence[PolicyModel], arch: ModelArchitecture, topology: Topology, sequences: PackedSequences
    ) -> None:
        self._chunks = chunks
        self._arch = arch
        self._topology = topology
        self._sequences = sequences
        self._owner = Owner(topology.rank, topology.tp_rank, topology.pp_rank, topology.dp_rank)
        self._micros: list[MicroBatch] = []
        self._calls = [-1] * len(chunks)  # micro-batches that each chunk has begun
        self._backward_micro: int | None = None
        self._found: dict[str, tuple[tuple[int, int], Finding]] = {}  # kind -> (place in the execution, finding)
        self._listed: list[Finding] = []

    def parameters(self) -> None:
        """Notes this rank's parameters that are not finite."""
        self._list("parameter", ((name, parameter.detach()) for name, parameter in named_weights(self._chunks)))

    def gradients(self, kind: str) -> None:
        """Notes the parameters whose gradient in this rank's buffers is not finite."""
        self._list(kind, ((name, getattr(each, "main_grad", None)) for name, each in named_weights(self._chunks)))

    @contextmanager
    def watching(self, micros: list[MicroBatch]) -> Iterator[None]:
        """Watches one forward-backward pass over ``micros``; gradients stay unreduced."""
        self._micros = micros
        handles: list[Any] = []
        finalize = self._chunks[0].config.finalize_model_grads_func
        for number, chunk in enumerate(self._chunks):
            handles.append(chunk.register_forward_pre_hook(partial(self._begin, number)))
            for name, module in chunk.named_modules():
                if name:
                    handles.append(module.register_forward_hook(partial(self._forward, number, _global(chunk, name))))
            for name, parameter in chunk.named_parameters():
                handles.append(parameter.register_hook(partial(self._parameter, global_name(chunk, name))))
        self._chunks[0].config.finalize_model_grads_func = None  # whose gradient it is shows before it is reduced
        try:
            yield
        finally:
            self._chunks[0].config.finalize_model_grads_func = finalize
            for handle in handles:
                handle.remove()

    def scores(self, output_Kt: Tensor, micro: MicroBatch) -> None:
        """Notes tokens of a micro-batch whose scores, or whose gradients by the loss, are not finite."""
        if not self._topology.writes_results:
            return
        number = next((index for index, each in enumerate(self._micros) if each is micro), None)
        names = ("log-probability", "token entropy")
        for name, row_t in zip(names, output_Kt.detach(), strict=False):
            self._tokens("score", name, row_t, micro, number)
        if output_Kt.requires_grad:

            def on_gradient(gradient_Kt: Tensor) -> None:
                for name, row_t in zip(names, gradient_Kt, strict=False):
                    self._tokens("output_gradient", name, row_t, micro, number)

            output_Kt.register_hook(on_gradient)

    def loss(self, of_tokens: Callable[[NDArray[np.bool_]], LossOutput], micro: MicroBatch) -> None:
        """Notes loss terms of a micro-batch that are not finite; ``of_tokens`` is the loss of some of its tokens."""
        if not self._topology.writes_results:
            return
        number = next((index for index, each in enumerate(self._micros) if each is micro), None)
        value, terms = _nonfinite_terms(of_tokens(np.ones(len(micro.packed_t), dtype=np.bool_)))
        if not terms:
            return
        sequences = list(dict.fromkeys(micro.sequence_t.tolist()))
        bad = [each for each in sequences if _nonfinite_terms(of_tokens(micro.sequence_t == each))[1]]
        finding = self._finding("loss", ", ".join(terms), value, len(terms), number)
        places = tuple(place_of_sequence(self._sequences, each) for each in (bad or sequences)[:MAX_SHOWN])
        self._keep((number or 0, 0), dataclasses.replace(finding, places=places))

    def findings(self, device: torch.device) -> tuple[Finding, ...]:
        """Returns what all ranks saw, causes first, the same on every rank; every rank calls it."""
        mine = {
            "first": [(place, dataclasses.asdict(finding)) for place, finding in self._found.values()],
            "listed": [dataclasses.asdict(finding) for finding in self._listed],
        }
        of_ranks = exchange_json(mine, device=device)
        first: dict[str, tuple[tuple[int, int], Finding]] = {}
        for rank in of_ranks:
            for place, table in rank["first"]:
                finding, where = finding_from_dict(table), (place[0], place[1])
                group = "activation" if finding.kind == "activation_input" else finding.kind
                if group not in first or where < first[group][0]:
                    first[group] = (where, finding)
        findings = [finding for _, finding in first.values()]
        known = {(finding.kind, finding.tensor, finding.owner) for finding in findings}
        listed = [finding_from_dict(table) for rank in of_ranks for table in rank["listed"]]
        findings += [each for each in listed if (each.kind, each.tensor, each.owner) not in known]
        if any(finding.kind != "first_gradient" for finding in findings):
            findings = [finding for finding in findings if finding.kind != "first_gradient"]
        return ordered(findings)

    def _begin(self, number: int, module: torch.nn.Module, inputs: Any) -> None:
        del module, inputs
        self._calls[number] += 1

    def _forward(self, number: int, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        del module
        index = self._calls[number]
        for kind, tensors in (("activation_input", inputs), ("activation", output)):
            for tensor in _tensors(tensors):
                if not self._found.keys() & {"activation_input", "activation"}:
                    self._look(kind, name, tensor.detach(), index, self._stage(number))
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._output_gradient, number, name, index))

    def _output_gradient(self, number: int, name: str, index: int, gradient: Tensor) -> None:
        self._backward_micro = index
        if "output_gradient" not in self._found:
            self._look("output_gradient", name, gradient, index, -self._stage(number))

    def _parameter(self, name: str, gradient: Tensor) -> None:
        if "gradient" not in self._found and not _finite(gradient):
            index = self._backward_micro
            value, count = _describe(gradient)
            finding = self._finding("gradient", name, value, count, index, parameter=True)
            if index is not None and index < len(self._micros):
                finding = dataclasses.replace(finding, places=self._all_places(self._micros[index]))
            self._keep((index or 0, 0), finding)

    def _look(self, kind: str, name: str, tensor: Tensor, index: int, stage: int) -> None:
        if _finite(tensor):
            return
        value, count = _describe(tensor)
        micro = self._micros[index] if index < len(self._micros) else None
        finding = self._finding(kind, name, value, count, index)
        if micro is not None:
            finding = dataclasses.replace(finding, places=self._places(tensor, micro))
        self._keep((index, stage), finding)

    def _tokens(self, kind: str, name: str, row_t: Tensor, micro: MicroBatch, number: int | None) -> None:
        bad_t = torch.nonzero(~torch.isfinite(row_t)).flatten().cpu().numpy()
        if not bad_t.size or kind in self._found:
            return
        places = places_of_tokens(self._sequences, micro.packed_t[bad_t])
        finding = self._finding(kind, name, spell(row_t[int(bad_t[0])]), int(bad_t.size), number)
        after_all = self._topology.pp * self._topology.vpp
        place = (number or 0, after_all if kind == "score" else -after_all)
        self._keep(place, dataclasses.replace(finding, places=places))

    def _list(self, kind: str, named: Iterable[tuple[str, Tensor | None]]) -> None:
        """Notes the first few tensors of ``named`` that are not finite."""
        found = 0
        for name, tensor in named:
            if tensor is None or _finite(tensor):
                continue
            value, count = _describe(tensor)
            self._listed.append(self._finding(kind, name, value, count, None, parameter=True))
            found += 1
            if found == MAX_SHOWN:
                return

    def _finding(
        self,
        kind: str,
        tensor: str,
        value: str,
        count: int,
        micro_batch: int | None,
        *,
        parameter: bool = False,
    ) -> Finding:
        names = tuple(hf_tensors_of(self._arch, tensor)) if parameter else ()
        return Finding(kind, tensor, value, count, self._owner, _layer(tensor), micro_batch, also_known_as=names)

    def _keep(self, place: tuple[int, int], finding: Finding) -> None:
        self._found.setdefault(finding.kind, (place, finding))

    def _places(self, tensor: Tensor, micro: MicroBatch) -> tuple[Place, ...]:
        """Returns the sequences of a micro-batch that values of a module's output [S, b, ...] belong to."""
        row_of = dict(zip((micro.row_t // micro.sequence_length).tolist(), micro.sequence_t.tolist(), strict=True))
        if micro.packed_length_n is None and tensor.dim() > 1 and tensor.shape[1] == len(micro.tokens_bS):
            bad_b = ~torch.isfinite(tensor.transpose(0, 1).flatten(1)).all(dim=1)
            rows = torch.nonzero(bad_b).flatten().tolist()
            return tuple(place_of_sequence(self._sequences, row_of[row]) for row in rows if row in row_of)[:MAX_SHOWN]
        ends = None if micro.packed_length_n is None else np.cumsum(micro.packed_length_n)
        sequences = list(dict.fromkeys(micro.sequence_t.tolist()))
        if ends is not None and tensor.shape[0] == ends[-1] and len(sequences) == len(ends):
            bad_S = ~torch.isfinite(tensor.flatten(1)).all(dim=1)
            numbers = np.unique(np.searchsorted(ends, torch.nonzero(bad_S).flatten().cpu().numpy(), side="right"))
            return tuple(place_of_sequence(self._sequences, sequences[n]) for n in numbers.tolist())[:MAX_SHOWN]
        return self._all_places(micro) if len(sequences) == 1 else ()

    def _all_places(self, micro: MicroBatch) -> tuple[Place, ...]:
        sequences = list(dict.fromkeys(micro.sequence_t.tolist()))[:MAX_SHOWN]
        return tuple(place_of_sequence(self._sequences, sequence) for sequence in sequences)

    def _stage(self, number: int) -> int:
        """The chunk's place in the model: chunk c of stage s is part c * pp + s."""
        return number * self._topology.pp + self._topology.pp_rank


def uncounted_gradients(chunks: Sequence[PolicyModel], topology: Topology) -> list[Tensor]:
    """Returns the gradient buffers of parameters that Megatron's gradient norm leaves out on this rank.

    They are those that every tensor-parallel rank holds alike (norms, routers): only the first rank's count, so a fault
    of another rank's copy would reach its weights unseen.
    """
    if topology.tp_rank == 0:
        return []
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return [each.main_grad for each in weights if not getattr(each, "tensor_model_parallel", False)]


def _global(chunk: PolicyModel, name: str) -> str:
    """Returns a module's name with the global number of its layer."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "layers"] and len(parts) > 2 else None


def _nonfinite_terms(result: LossOutput) -> tuple[str, list[str]]:
    """Returns (the first such value, the names of the loss's terms that are not finite)."""
    terms = {"total": result.loss} | {name: total for name, (total, _) in result.sums.items()}
    bad = [name for name, total in terms.items() if not bool(torch.isfinite(total.detach()))]
    return (spell(terms[bad[0]].detach()) if bad else ""), bad


def _tensors(output: Any) -> list[Tensor]:
    items = output if isinstance(output, tuple | list) else [output]
    return [item for item in items if isinstance(item, Tensor) and torch.is_floating_point(item)]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _describe(tensor: Tensor) -> tuple[str, int]:
    bad = tensor[~torch.isfinite(tensor)]
    return spell(bad[0]), int(bad.numel())
