"""What in a policy update is not finite, and where: findings, their order, and their words.

    arrays of a TrainBatch --nonfinite_inputs--> Finding       (before anything is computed)
    one pass under probes (actor/nonfinite.py) --> Finding --> Diagnosis --text--> the message of a run that stops

This file does NOT run models, know ranks' groups or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aer_megatron.actor.batching import offsets, sampled_positions
from aer_megatron.types import Experience, Int64Array, PackedSequences, TrainBatch

MAX_SHOWN = 4  # findings that the message spells out, and places that a finding names


@dataclass(frozen=True, slots=True)
class Place:
    """A sequence of the global batch. Example: ``Place(sequence=5, prompt_id=0x9AE1, group=1, sample=1, token=0)``."""

    sequence: int  # 0..B-1
    prompt_id: int | None = None  # a supervised batch has no prompts and groups
    group: int | None = None  # 0..P-1
    sample: int | None = None  # the sequence's number within its group
    token: int | None = None  # of the response, from 0

    def text(self) -> str:
        """Returns the place as part of a sentence."""
        where = f"sequence {self.sequence}"
        if self.prompt_id is not None:
            where += f" (prompt {self.prompt_id:#x}, group {self.group}, sample {self.sample})"
        return where + (f", response token {self.token}" if self.token is not None else "")


@dataclass(frozen=True, slots=True)
class Owner:
    """The rank that saw it. Example: ``Owner(rank=1, tp=1, pp=0, dp=0)``."""

    rank: int
    tp: int
    pp: int
    dp: int

    def text(self) -> str:
        return f"rank {self.rank} (tp {self.tp}, pp {self.pp}, dp {self.dp})"


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor with values that are not finite.

    ``kind`` orders cause before effect: see ``KINDS``. ``owner`` is None for what every rank holds alike; ``places``
    are the first sequences concerned, empty where the tensor belongs to all.
    """

    kind: str
    tensor: str  # "advantage_B", "decoder.layers.1.mlp.linear_fc2.weight", "log-probability", ...
    value: str  # "nan", "inf" or "-inf": the first
    count: int  # values that are not finite
    owner: Owner | None = None
    layer: int | None = None  # of the transformer, from 0, global over pipeline stages
    micro_batch: int | None = None  # of its rank and update, from 0
    places: tuple[Place, ...] = ()
    also_known_as: tuple[str, ...] = ()  # Hugging Face names

    def text(self) -> str:
        """Returns the finding as part of a sentence."""
        names = [f"layer {self.layer}"] if self.layer is not None else []
        names += [", ".join(self.also_known_as)] if self.also_known_as else []
        words = f"{self.value} in {KINDS[self.kind].format(self.tensor)}" + (f" ({'; '.join(names)})" if names else "")
        words += f", {self.count} values" if self.count > 1 else ""
        words += f", on {self.owner.text()}" if self.owner else ""
        words += f", micro-batch {self.micro_batch}" if self.micro_batch is not None else ""
        if self.places:
            words += f", {self.places[0].text()}" + (" and others" if len(self.places) > 1 else "")
        return words


# kind -> its words, in the order of cause and effect
KINDS = {
    "input": "the batch's {}",
    "parameter": "the parameter {}",
    "activation_input": "the input of {}",  # what is computed between two modules
    "activation": "the output of {}",
    "score": "the {}",
    "scored": "the batch's {}",  # inputs that a forward pass of the policy made
    "loss": "the loss ({})",
    "output_gradient": "the gradient of the output of {}",
    "gradient": "the gradient of {}",
    "first_gradient": "the gradient of {}",  # of the update itself; the others are of the pass that was repeated
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an update was not applied. ``findings`` begin with the likely cause; the same on every rank."""

    update: int  # optimizer updates before it
    minibatch: int  # of the step's batch
    seen: str  # what gave it away, for example "gradient norm nan"
    findings: tuple[Finding, ...]

    @property
    def repeated(self) -> bool:
        """Whether the second pass over the same batch and weights was not finite either."""
        return any(finding.kind != "first_gradient" for finding in self.findings)

    def text(self) -> str:
        """Returns the diagnosis as one line."""
        if not self.findings:
            return f"{self.seen}; a second pass over the same batch and weights was finite: a fault that comes and goes"
        shown = "; ".join(finding.text() for finding in self.findings[:MAX_SHOWN])
        if not self.repeated:
            shown += "; a second pass over the same batch and weights was finite: a fault that comes and goes"
        return f"{self.seen}: {shown}"


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns the findings, causes before effects; within a kind in the order given."""
    kinds = list(KINDS)
    return tuple(sorted(findings, key=lambda finding: kinds.index(finding.kind)))


def nonfinite_inputs(batch: TrainBatch, indices_b: Int64Array) -> list[Finding]:
    """Returns one finding for each array of the batch that is not finite somewhere in the sequences ``indices_b``."""
    experience = batch.experience
    member_B = np.zeros(experience.num_sequences, dtype=np.bool_)
    member_B[indices_b] = True
    sequence_T = np.repeat(np.arange(experience.num_sequences), experience.sampled_length_B)
    of_sequences = {
        "reward_B": experience.reward_B,
        "advantage_B": batch.advantage_B,
        "entropy_weight_B": batch.entropy_weight_B,
    }
    of_tokens = {
        "rollout_logprob_T": experience.rollout_logprob_T,
        "old_logprob_T": batch.old_logprob_T,
        "ref_logprob_T": batch.ref_logprob_T,
    }
    findings = []
    for name, values in (of_sequences | of_tokens).items():
        if values is None:
            continue
        with np.errstate(over="ignore"):
            values = values if name == "reward_B" else values.astype(np.float32)  # as the loss reads them
        bad = ~np.isfinite(values) & (member_B if name in of_sequences else member_B[sequence_T])
        where = np.flatnonzero(bad)
        if not where.size:
            continue
        kind = "scored" if name in ("old_logprob_T", "ref_logprob_T") else "input"
        places = (
            tuple(place_of_sequence(experience, int(index)) for index in where[:MAX_SHOWN])
            if name in of_sequences
            else places_of_tokens(experience, where)
        )
        findings.append(Finding(kind, name, spell(values[where[0]]), int(where.size), places=places))
    return findings


def place_of_sequence(sequences: PackedSequences, sequence: int, token: int | None = None) -> Place:
    """Returns the place of one sequence of the batch."""
    if not isinstance(sequences, Experience):
        return Place(sequence, token=token)
    experience = sequences
    group = int(experience.group_index_B[sequence])
    sample = int((experience.group_index_B[:sequence] == group).sum())
    return Place(sequence, int(experience.prompt_id_B[sequence]), group, sample, token)


def places_of_tokens(sequences: PackedSequences, token_t: NDArray[np.int64]) -> tuple[Place, ...]:
    """Returns the sequences, each with its first token, of packed sampled tokens; at most a few."""
    start_T = offsets(sequences.sampled_length_B)
    start_L = offsets(sequences.length_B)
    places: dict[int, Place] = {}
    for token in np.sort(token_t).tolist():
        sequence = int(np.searchsorted(start_T, token, side="right")) - 1
        if sequence not in places:
            position_t = sampled_positions(sequences, sequence, int(start_L[sequence]))
            place = int(position_t[token - start_T[sequence]] - sequences.prompt_length_B[sequence])
            places[sequence] = place_of_sequence(sequences, sequence, place)
        if len(places) == MAX_SHOWN:
            break
    return tuple(places.values())


def nonfinite_sums(sums: Mapping[str, tuple[float, float]]) -> list[str]:
    """Returns the names of statistics whose sum is not finite, each with it. Example: ``["policy_loss nan"]``."""
    return [f"{name} {spell(total)}" for name, (total, _) in sums.items() if not math.isfinite(total)]


def spell(value: Any) -> str:
    """Returns "nan", "inf" or "-inf"."""
    number = float(value)
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"


def finding_from_dict(table: Mapping[str, Any]) -> Finding:
    """Returns the finding whose ``dataclasses.asdict`` went through JSON."""
    owner = table["owner"]
    return Finding(
        **{
            **table,
            "owner": Owner(**owner) if owner else None,
            "places": tuple(Place(**place) for place in table["places"]),
            "also_known_as": tuple(table["also_known_as"]),
        }
    )
