"""What the doctor asks of the run's own rollout engine: does it hold what was published, and does it say the same?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.compose.engines import build_engine
from aer_megatron.config import Config
from aer_megatron.data.prompts import PromptSet
from aer_megatron.data.sources import load_records
from aer_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from aer_megatron.doctor.diagnosis import Check, FindingKind, TensorFinding, bounded, compare_tensors
from aer_megatron.doctor.layout_comparison import Tolerances
from aer_megatron.parallel.agreement import exchange_json
from aer_megatron.parallel.gather import gather_experience
from aer_megatron.parallel.platform import Platform
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.collect import RolloutCollector
from aer_megatron.rollout.embedded import EmbeddedEngine
from aer_megatron.rollout.engine import SamplingOptions
from aer_megatron.rollout.seeds import stream_seed
from aer_megatron.types import Experience, Float32Array, Prompt, ScoredGroup, Verdict

SAMPLES_PER_PROMPT = 2
_MAX_NEW_TOKENS = 64  # enough for thousands of log-probabilities, and a small model's CPU decodes them in seconds


class RolloutProbe:
    """The engine and the weight transport of the run, with a few of its prompts; ``stack`` closes them."""

    def __init__(self, config: Config, platform: Platform, stack: ExitStack, *, num_prompts: int) -> None:
        self._platform = platform
        self._engine, self._sync = build_engine(config, platform, stack)
        self._prompts, stop_ids = _prompts(config, num_prompts)
        rollout = config.rollout
        self._collector = RolloutCollector(
            self._engine,
            SamplingOptions(rollout.temperature, rollout.top_p, rollout.top_k, frozenset(stop_ids)),
            num_samples=SAMPLES_PER_PROMPT,
            max_new_tokens=min(rollout.max_new_tokens, _MAX_NEW_TOKENS),
            stream_seed=stream_seed(config.run.seed, "doctor"),
            rank=platform.rank,
            world_size=platform.world_size,
        )
        self._exported: dict[int, dict[str, int]] = {}

    def publish(self, actor: Actor, version: int) -> tuple[Check, tuple[TensorFinding, ...], Mapping[str, int]]:
        """Returns (the row, what is wrong, the exported checksums) of giving the engine the policy's weights."""
        exported: dict[str, int] = {}
        stream = _metered(actor.hf_weights(), exported)
        refusal = ""
        try:
            self._sync.publish(stream, version)
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
            for _ in stream:  # the other ranks gather until the stream ends
                pass
        findings = self._findings(exported, version, refusal)
        self._exported[version] = exported
        how = "read back from the engine" if isinstance(self._engine, EmbeddedEngine) else "as the servers report them"
        row = Check(
            "weight sync", "checksums", f"policy version {version}", "fail" if findings else "pass",
            0.0 if refusal else float(len(exported) - len(findings)), float(len(exported)), 0.0,
            note=f"tensors that agree, {how}",
        )  # fmt: skip
        return row, findings, exported

    def roll_out(self, version: int) -> Experience | None:
        """Returns the completions of the prompts on every rank, or None where the engine has no weights to sample with.

        Verdicts are not asked for: the doctor looks at log-probabilities.
        """
        if any(held < 0 for held in exchange_json(self._engine.policy_version, device=self._platform.device)):
            return None
        groups = self._collector.collect(self._prompts, step=version, refill=0)
        unscored = Verdict(0.0, "unscored")
        scored = [ScoredGroup(group, tuple(unscored for _ in group.completions)) for group in groups]
        return gather_experience(scored, device=self._platform.device)

    def _findings(self, exported: Mapping[str, int], version: int, refusal: str) -> tuple[TensorFinding, ...]:
        """Returns the findings of the first rank that has any, the same on every rank."""
        found: tuple[TensorFinding, ...] = ()
        if refusal:
            found = (TensorFinding("weight sync", "", "refused", refusal, version),)
        elif isinstance(self._engine, EmbeddedEngine):
            held = self._engine.held_checksums()
            found = compare_tensors("weight sync", exported, held, version=version, earlier=self._exported)
        table = [[finding.name, finding.kind, finding.other] for finding in found]
        for rows in exchange_json(table, device=self._platform.device):
            if rows:
                return tuple(_finding(row, version) for row in rows)
        return ()


def compare_rollout(
    experience: Experience, logprob_T: Float32Array, version: int, tolerances: Tolerances, *, gate: float
) -> list[Check]:
    """Returns the rows of the engine's log-probabilities against the trainer's; ``gate`` is the run's own, 0 = none."""
    error_T = np.abs(logprob_T.astype(np.float64) - experience.rollout_logprob_T)
    largest, mean = float(error_T.max()), float(error_T.mean())
    subject = f"policy version {version}"
    oldest, newest = int(experience.policy_version_B.min()), int(experience.policy_version_B.max())
    wrong = float(np.count_nonzero(experience.policy_version_B != version))
    return [
        bounded("rollout", "log-probability, max", subject, largest, bound=gate or tolerances.rollout_max),
        bounded("rollout", "log-probability, mean", subject, mean, bound=tolerances.rollout_mean),
        bounded(
            "rollout", "reported version", subject, wrong, bound=0.0,
            note=f"completions of another version; reported {oldest}..{newest}" if wrong else "",
        ),
    ]  # fmt: skip


def _metered(tensors: Iterator[tuple[str, Tensor]], checksums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


def _finding(row: list[Any], version: int) -> TensorFinding:
    name, kind, other = row
    return TensorFinding("weight sync", name, cast(FindingKind, kind), other, version)


def _prompts(config: Config, count: int) -> tuple[list[Prompt], tuple[int, ...]]:
    tokenizer = load_tokenizer(config.model.path)
    source = config.data.train
    if source.task is not None:  # a procedural set need not be made whole for a few prompts
        source = source.with_options({"size": min(source.size, 4 * count)})
    records = load_records(
        source,
        on_bad_record=config.data.on_bad_record,
        default_verifier=config.data.verifier,
        may_name=lambda name: True,  # the doctor judges no answer
    ).records
    prompts = PromptSet(records, tokenizer, config.data)
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    return chosen, stop_token_ids(config.model.path, tokenizer)
