"""The doctor's examination, in order: file, round trip, engine, own layout twice, other layouts, transformers.

Every rank takes part in everything; rows, clues and causes are put together on rank 0, and all ranks learn whether
the run is fit.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.compose.common import architecture, check_model, checked_weights
from aer_megatron.config import Config
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.hf_folder import read_hf_config
from aer_megatron.convert.hf_writer import write_hf_folder
from aer_megatron.convert.mapping import hf_names, hf_specs
from aer_megatron.convert.random_weights import random_hf_weights
from aer_megatron.costs.memory import DTYPE_BYTES
from aer_megatron.costs.model_size import parameter_count
from aer_megatron.doctor import diagnosis, layouts
from aer_megatron.doctor.diagnosis import Check, Clues, Diagnosis, Explanation, PositionProfile, TensorFinding
from aer_megatron.doctor.layout_comparison import (
    TOLERANCES,
    Measurement,
    Truth,
    choose_anchor,
    compare_layouts,
    compare_with_truth,
    position_profile,
    probe_batch,
    probe_experience,
    tensor_sketch,
)
from aer_megatron.doctor.rollout import RolloutProbe, compare_rollout
from aer_megatron.doctor.transformers_reference import TransformersReference
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.platform import Platform, free_memory_bytes
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.types import Experience, Float32Array, Float64Array, TrainBatch

ReferenceMode = Literal["auto", "never", "always"]
_LONGEST = 256  # tokens of the longest measured sequence: rope errors grow with it, so does the time
_FREE_SHARE = 0.8  # of what is free now


@dataclass(frozen=True, slots=True)
class Examination:
    """The outcome. ``checks`` and ``causes`` are complete on rank 0 alone, ``fit`` is the same everywhere."""

    fit: bool
    weights: str  # where the examined weights come from
    checks: tuple[Check, ...]
    causes: tuple[Diagnosis, ...]


@dataclass(slots=True)
class _Notes:
    """What rank 0 collects on the way."""

    checks: list[Check] = field(default_factory=list)
    tensors: list[TensorFinding] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    rollout: Experience | None = None  # of the weights in the file, with what the trainer says of the same tokens
    rollout_scores_T: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class _WeightFacts:
    """What rank 0 knows of the weights in the file, cast to the training dtype; ``norm`` is known everywhere."""

    norm: float
    checksums: Mapping[str, int]
    sketch_C: Mapping[str, Float64Array] | None


class Examiner:
    """Examines one run configuration on the calling ranks; the platform is installed and its group exists.

    Args:
        reference: whether transformers is asked: where it fits into memory, never, or in any case.
        on_phase: told the name of every phase, for the watchdog.
    """

    def __init__(
        self, config: Config, platform: Platform, *, reference: ReferenceMode, on_phase: Callable[[str], None]
    ) -> None:
        self._platform = platform
        self._mode = reference
        self._on_phase = on_phase
        self._notes = _Notes()
        # the run without what would hide a fault: FP8 in the trainer or in the servers
        on_phase("read weights")
        path, self._origin = policy_folder(config, platform)
        output = str(Path(config.run.output_dir) / "doctor")
        changes: dict[str, Any] = {"model.path": path, "run.output_dir": output}
        if config.megatron.get("fp8"):
            changes["megatron"] = {key: value for key, value in config.megatron.items() if not key.startswith("fp8")}
            reason = "FP8 scales depend on the tokens of a micro-batch: examined without; see aer fp8-parity"
            self._notes.checks.append(diagnosis.skipped("layouts", "all", "megatron.fp8", reason))
        if config.rollout.quantization != "none" and config.sglang.urls:
            raise ValueError(
                f"rollout.quantization={config.rollout.quantization!r}: the doctor gives servers unrounded weights, "
                "and those of sglang.urls hold FP8; start unquantised ones for it and add --sglang.urls with their "
                "addresses and --rollout.quantization=none"
            )
        if config.rollout.quantization != "none":
            changes["rollout.quantization"] = "none"
            reason = "rounded weights hide what is looked for: examined without"
            self._notes.checks.append(diagnosis.skipped("rollout", "all", "rollout.quantization", reason))
        self._run_config = config.with_options(changes)
        # its model, and the batch that every examination uses
        check_model(self._run_config, path)
        self._arch: ModelArchitecture = architecture(path)
        self._get = checked_weights(path)
        self._weights = self._read_weights()
        num_sequences = max(8, 2 * platform.world_size)
        self._config = layouts.doctor_config(
            self._run_config, num_sequences=num_sequences, weight_norm=self._weights.norm
        )
        self._tolerances = TOLERANCES[config.model.dtype]
        self._longest = layouts.longest_probe(config, self._arch, limit=_LONGEST)
        self._probe = probe_experience(
            num_sequences=num_sequences,
            vocab_size=self._arch.vocab_size,
            longest=self._longest,
            seed=config.run.seed,
        )

    def examine(self) -> Examination:
        """Returns the outcome; every rank calls it."""
        why_not = self._why_no_reference()
        fitting, left_out = layouts.variants(
            self._config,
            self._arch,
            num_ranks=self._platform.world_size,
            num_sequences=self._probe.num_sequences,
            longest=self._longest,
            free_bytes=int(_FREE_SHARE * free_memory_bytes(self._platform)),
        )
        own, *others = fitting
        truth_T = None if why_not else self._reference_logprobs()
        self._on_phase(own.name)
        with layouts.built(own, self._platform, self._get) as actor:
            batch = self._batch(actor, truth_T)
            first = self._examine_own(actor, own, batch)
        self._on_phase("repeat")
        with layouts.built(own, self._platform, self._get) as actor:
            again = self._measure(actor, own, batch)
        self._notes.checks.append(_repeat_row(first, again))
        self._notes.measured.append(first)
        for variant in others:
            self._on_phase(f"layout {variant.name}")
            gc.collect()
            with layouts.built(variant, self._platform, self._get) as actor:
                self._notes.measured.append(self._measure(actor, variant, batch))
        self._on_phase("transformers")
        return self._conclude(batch, why_not, left_out)

    # -- measuring, on every rank -----------------------------------------------------------------------------------

    def _read_weights(self) -> _WeightFacts:
        """Returns the facts of the file; only rank 0 reads all of it."""
        dtype = TORCH_DTYPES[self._run_config.model.dtype]
        checksums: dict[str, int] = {}
        sketch_C: dict[str, Float64Array] = {}

        def read() -> float:
            square = 0.0
            for name in hf_names(self._arch):
                tensor = self._get(name).to(dtype)
                checksums[name] = tensor_checksum(tensor)
                sketch_C[name] = tensor_sketch(tensor)
                square += float(tensor.double().square().sum())
            return float(np.sqrt(square))

        norm = on_first_rank(read, rank=self._platform.rank, device=self._platform.device)
        return _WeightFacts(norm, checksums, sketch_C if self._platform.rank == 0 else None)

    def _why_no_reference(self) -> str:
        """Returns why transformers is not asked, nothing where it is; the same on every rank."""
        if self._mode == "never":
            return "--reference=never"
        bytes_needed = 2 * DTYPE_BYTES["fp32"] * parameter_count(self._arch)

        def reason() -> str:
            free = int(_FREE_SHARE * free_memory_bytes(self._platform))
            if self._mode == "always" or bytes_needed <= free:
                return ""
            return (
                f"fp32 weights and gradients need {bytes_needed / 1e9:.1f} GB on rank 0, {free / 1e9:.1f} GB are free; "
                "--reference=always tries all the same"
            )

        return str(on_first_rank(reason, rank=self._platform.rank, device=self._platform.device))

    def _reference(self) -> TransformersReference:
        return TransformersReference(self._config.model.path, self._config, device=self._platform.device)

    def _reference_logprobs(self) -> Float32Array:
        values = on_first_rank(
            lambda: self._reference().logprobs(self._probe).tolist(),
            rank=self._platform.rank,
            device=self._platform.device,
        )
        return np.array(values, dtype=np.float32)

    def _batch(self, actor: Actor, truth_T: Float32Array | None) -> TrainBatch:
        logprob_T = actor.score(self._probe).logprob_T if truth_T is None else truth_T
        return probe_batch(self._probe, logprob_T, seed=self._config.run.seed)

    def _measure(self, actor: Actor, variant: layouts.Variant, batch: TrainBatch) -> Measurement:
        return layouts.measure(actor, variant, batch, self._weights.sketch_C)

    def _examine_own(self, actor: Actor, own: layouts.Variant, batch: TrainBatch) -> Measurement:
        """Returns the measurement of the run's layout; on the way the engine gets the weights before and after."""
        num_prompts = max(4, self._platform.world_size)
        with ExitStack() as stack:
            engine = RolloutProbe(self._run_config, self._platform, stack, num_prompts=num_prompts)
            exported = self._publish(engine, actor, 0)
            self._note_round_trip(exported)
            self._roll_out(engine, actor, 0)
            measured = self._measure(actor, own, batch)
            self._publish(engine, actor, 1)
            self._roll_out(engine, actor, 1)
        return measured

    def _publish(self, engine: RolloutProbe, actor: Actor, version: int) -> Mapping[str, int]:
        self._on_phase(f"publish version {version}")
        row, findings, exported = engine.publish(actor, version)
        self._notes.checks.append(row)
        self._notes.tensors.extend(findings)
        return exported

    def _note_round_trip(self, exported: Mapping[str, int]) -> None:
        expected = self._weights.checksums
        findings = diagnosis.compare_tensors("round trip", expected, exported)
        agreeing = float(len(expected) - len(findings))
        status: diagnosis.Status = "fail" if findings else "pass"
        note = "tensors whose names, shapes and bits come back"
        self._notes.tensors.extend(findings)
        self._notes.checks.insert(
            0, Check("round trip", "tensors", layouts.OWN, status, agreeing, float(len(expected)), 0.0, note=note)
        )

    def _roll_out(self, engine: RolloutProbe, actor: Actor, version: int) -> None:
        self._on_phase(f"roll out version {version}")
        experience = engine.roll_out(version)
        if experience is None:
            reason = "the engine took no weights"
            self._notes.checks.append(
                diagnosis.skipped("rollout", "log-probability", f"policy version {version}", reason)
            )
            return
        scores_T = actor.score(experience).logprob_T
        gate = self._run_config.rollout.logprob_gate
        self._notes.checks.extend(compare_rollout(experience, scores_T, version, self._tolerances, gate=gate))
        if version == 0:
            self._notes.rollout, self._notes.rollout_scores_T = experience, scores_T

    # -- concluding, on rank 0 --------------------------------------------------------------------------------------

    def _conclude(self, batch: TrainBatch, why_not: str, left_out: list[tuple[str, str]]) -> Examination:
        causes: list[Diagnosis] = []

        def conclude() -> bool:
            clues = self._compare(batch, why_not)
            self._notes.checks.extend(diagnosis.skipped("layouts", "all", name, reason) for name, reason in left_out)
            causes.extend(diagnosis.diagnose(self._notes.checks, clues))
            return not any(check.status == "fail" for check in self._notes.checks)

        fit = on_first_rank(conclude, rank=self._platform.rank, device=self._platform.device)
        return Examination(bool(fit), self._origin, tuple(self._notes.checks), tuple(causes))

    def _compare(self, batch: TrainBatch, why_not: str) -> Clues:
        """Adds the rows of layouts and transformers; returns the clues."""
        notes, own = self._notes, self._notes.measured[0]
        truth: Truth | None = None
        explanations: dict[str, Explanation] = {}
        profiles: dict[str, PositionProfile] = {}
        if why_not:
            notes.checks.append(diagnosis.skipped("transformers", "all", "reference", why_not))
        else:
            reference = self._reference()
            truth = reference.truth(batch)
            rows = [
                replace(row, subject=diagnosis.TRAINING) for row in compare_with_truth(own, truth, self._tolerances)
            ]
            profiles[diagnosis.TRAINING] = position_profile(self._probe, own.logprob_T, truth.logprob_T)
            if any(row.status == "fail" and row.measure not in diagnosis.GRADIENT_MEASURES for row in rows):
                _note(explanations, diagnosis.TRAINING, reference.explain(self._probe, own.logprob_T))
            rows += self._rollout_rows(reference, explanations)
            notes.checks.extend(rows)
        if notes.rollout is not None and notes.rollout_scores_T is not None:
            profiles[diagnosis.ROLLOUT] = position_profile(
                notes.rollout, notes.rollout_scores_T, notes.rollout.rollout_logprob_T
            )
        anchor = notes.measured[choose_anchor(notes.measured, truth)]
        rows, moved = compare_layouts(notes.measured, anchor, self._tolerances)
        notes.checks.extend(rows)
        return Clues(
            own=own.name,
            axes={item.name: item.axes for item in notes.measured},
            moved=moved,
            tensors=tuple(notes.tensors),
            explanations=explanations,
            profiles=profiles,
        )

    def _rollout_rows(self, reference: TransformersReference, explanations: dict[str, Explanation]) -> list[Check]:
        experience = self._notes.rollout
        if experience is None:
            return []
        expected_T = reference.logprobs(experience)
        error = float(np.abs(expected_T.astype(np.float64) - experience.rollout_logprob_T).mean())
        row = diagnosis.bounded(
            "transformers", "log-probability, mean", diagnosis.ROLLOUT, error, bound=self._tolerances.model_logprob
        )
        if row.status == "fail":
            found = reference.explain(experience, experience.rollout_logprob_T)
            _note(explanations, diagnosis.ROLLOUT, found)
        return [row]


def policy_folder(config: Config, platform: Platform) -> tuple[str, str]:
    """Returns (folder, its origin in words) of the weights to examine: the run's own, or what they will be made from.

    Raises:
        ValueError: there are none.
    """
    if _has_weights(config.model.path):
        return config.model.path, f"model.path = {config.model.path}"
    init = config.sft.init
    if init is None or not (Path(init) / "config.json").is_file():
        raise ValueError(
            f"model.path={config.model.path!r} holds no *.safetensors, and sft.init names no folder to start from; "
            "give a Hugging Face folder"
        )
    if _has_weights(init):
        return init, f"sft.init = {init}: {config.model.path} is not made yet"
    target = Path(config.run.output_dir) / "doctor" / "random-weights"

    def write() -> None:
        arch, get = architecture(init), random_hf_weights(init, config.run.seed)
        shutil.rmtree(target, ignore_errors=True)
        write_hf_folder(
            target,
            ((name, get(name)) for name in hf_names(arch)),
            hf_specs(arch, torch.float32),
            config=read_hf_config(Path(init)),
            like=Path(init),
        )

    on_first_rank(write, rank=platform.rank, device=platform.device)
    return str(target), f"random weights for {init}/config.json: {config.model.path} is not made yet"


def _has_weights(path: str) -> bool:
    return (Path(path) / "config.json").is_file() and any(Path(path).glob("*.safetensors"))


def _note(explanations: dict[str, Explanation], whose: str, found: Explanation | None) -> None:
    if found is not None:
        explanations[whose] = found


def _repeat_row(first: Measurement, again: Measurement) -> Check:
    """Returns the row that says whether two runs of one layout are equal bit for bit."""
    differing = int((first.logprob_T != again.logprob_T).sum())
    differing += int((first.token_entropy_T != again.token_entropy_T).sum())
    differing += sum(getattr(first, name) != getattr(again, name) for name in ("loss", "grad_norm"))
    differing += sum(not np.array_equal(again.step_C[name], value) for name, value in first.step_C.items())
    note = "numbers that differ between two runs: log-probabilities, entropies, loss, gradient norm, steps"
    return diagnosis.bounded("repeat", "bits", layouts.OWN, float(differing), bound=0.0, note=note)
