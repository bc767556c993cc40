"""What ``--dry-run`` looks at: everything that can be wrong before the first step, and all of it at once.

No weights are loaded (their files' headers are read), no server is asked and nothing is written. A verifier of the
user's is loaded in a worker process, as for a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from aer_megatron.checkpoint.folder import CheckpointFolder
from aer_megatron.checkpoint.manifest import MANIFEST_NAME, manifest_from_json, read_manifest_text
from aer_megatron.checkpoint.manifest import check_model as check_manifest_model
from aer_megatron.compose.common import architecture, checked_weights, model_checks
from aer_megatron.compose.data import evaluation_prompts, prompt_set
from aer_megatron.compose.engines import check_server_options
from aer_megatron.compose.evaluation import last_evaluation_is_missing
from aer_megatron.compose.sft import init_path, is_made, supervised_locks, supervised_source
from aer_megatron.compose.step_plan import StepPlan, fewest_ranks
from aer_megatron.config import Config
from aer_megatron.costs.memory import peak_bytes
from aer_megatron.data.skipped import SkippedRecords
from aer_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from aer_megatron.files.run_lock import LOCK_FILE, held_by
from aer_megatron.options.data import EvalSetSection
from aer_megatron.report.masking import mask_table
from aer_megatron.report.sinks.opening import check_sinks
from aer_megatron.report.writer import changed_options
from aer_megatron.rewards.pool import check_verifiers

Result = TypeVar("Result")


@dataclass(slots=True)
class Findings:
    """``problems`` would end the run or make it do nothing; ``notes`` are worth knowing."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """Returns what ``check`` returns; None, and a problem, where it raises."""
        try:
            return check()
        except (ValueError, RuntimeError, OSError) as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None


def dry_run(config: Config, stage: str, world_size: int) -> tuple[str, Findings]:
    """Returns the text to print, configuration and plan of one step, and what was found.

    ``world_size`` is the number of ranks that a launcher gave; with 1 the fewest that the layout can have are assumed.
    """
    found = Findings()
    num_ranks = world_size if world_size > 1 else fewest_ranks(config)
    fits = found.attempt(lambda: config.check_world_size(num_ranks))
    path = found.attempt(lambda: init_path(config)) if stage == "sft" else config.model.path
    plan: str | None = None
    evaluation: list[str] = []
    if path is not None and _is_folder(found, path, "sft.init" if stage == "sft" else "model.path"):
        for check in found.attempt(lambda: model_checks(config, path)) or ():
            found.attempt(check)
        if fits is not None:
            plan = found.attempt(lambda: plan_text(config, path, num_ranks))
        if stage == "rl" or any(Path(path).glob("*.safetensors")):
            found.attempt(lambda: checked_weights(path))
        if stage == "sft":
            _look_at_supervised_data(found, config, path, fits or 1)
        else:
            evaluation = _look_at_data(found, config)
    found.attempt(lambda: check_sinks(config.report))
    _look_at_folders(found, config, stage)
    if stage == "rl" and config.rollout.uses_servers:
        found.attempt(lambda: check_server_options(config))
    text = json.dumps(mask_table(config.model_dump(mode="json")), indent=2, ensure_ascii=False)
    return "\n".join([text, *(["", plan, *evaluation] if plan else [])]), found


def plan_text(config: Config, path: str, num_ranks: int) -> str:
    """Returns the sizes of one step of the model in ``path``; raises ValueError where that is not readable."""
    plan = StepPlan(config, architecture(path))
    arch, work, layout = plan.arch, plan.work, plan.own_layout(num_ranks)
    size = plan.own_micro_batch_size(layout)
    count, budget = plan.micro_batches(layout, size), config.parallel.tokens_per_micro_batch
    batches = f"{count} per optimizer step and rank, of <= {size} sequences (<= {size * plan.longest:,} tokens)"
    if budget:
        batches = f"packed, of <= {budget:,} tokens: at most {count} per optimizer step and rank"
    cp = f" x cp {layout.cp}" if layout.cp > 1 else ""
    _, training = plan.training_memory(layout, size)
    peak = peak_bytes(training, plan.engine_memory(layout)) / 1e9
    lines = [
        "plan of one step",
        f"  ranks                {num_ranks} = tp {layout.tp} x pp {layout.pp}{cp} x dp {layout.dp}",
        f"  model                {arch.family}, {arch.num_layers} layers, hidden {arch.hidden_size}, "
        f"vocabulary {arch.vocab_size}",
        f"  rollouts             {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} = "
        f"{work.sequences} sequences",
        f"  response tokens      <= {work.scored_tokens:,}",
        f"  optimizer steps      {work.minibatches} of {work.sequences // work.minibatches} sequences",
        f"  micro-batches        {batches}",
        f"  memory of a GPU      {peak:,.1f} GB at the peak; aer plan says of what, and which layouts fit",
    ]
    return "\n".join(lines)


def _is_folder(found: Findings, path: str, option: str) -> bool:
    if Path(path).is_dir():
        return True
    found.problems.append(f"{option}={path!r} is not a folder; give a Hugging Face folder with config.json")
    return False


def _look_at_data(found: Findings, config: Config) -> list[str]:
    """Returns what the plan says of the evaluation sets."""
    tokenizer: Any = found.attempt(lambda: load_tokenizer(config.model.path))
    if tokenizer is None:
        return []  # what is left are the records, which need it
    found.attempt(lambda: stop_token_ids(config.model.path, tokenizer))
    verifiers: set[str] = set()
    lines: list[str] = []
    train = found.attempt(lambda: prompt_set(config.data, "data.train", config.data.train, tokenizer))
    if train is not None:
        found.notes.extend(train[1])
        verifiers |= train[0].verifiers
    for name, options in config.eval.sets.items():
        problems = found.attempt(lambda: evaluation_prompts(config, tokenizer, [name]))  # noqa: B023
        if problems is not None:
            found.notes.extend(problems[1])
            lines.append(_evaluation_line(name, options, len(problems[0][name]), config))
            verifiers |= {prompt.verifier for prompt in problems[0][name]}
    for verifier in sorted(verifiers):
        found.attempt(lambda: check_verifiers([verifier]))  # noqa: B023
    return lines


def _evaluation_line(name: str, options: EvalSetSection, num_problems: int, config: Config) -> str:
    times = len({*range(0, config.run.num_steps, options.every), config.run.num_steps}) if options.every else 0
    return (
        f"  evaluation           {name}: {num_problems} prompts x {options.num_samples} = "
        f"{num_problems * options.num_samples} sequences of <= {options.length_limit(config.rollout.max_new_tokens):,} "
        f"tokens at temperature {options.temperature:g}, {times} times"
    )


def _look_at_supervised_data(found: Findings, config: Config, init: str, dp: int) -> None:
    skipped = SkippedRecords()
    source = found.attempt(lambda: supervised_source(config, init, dp=dp, on_skip=skipped))
    if source is not None:
        found.notes.extend(skipped.lines("sft.source", source.num_records))
    if config.sft.source is not None and found.attempt(lambda: is_made(config)):
        found.notes.append(f"{config.model.path}: made earlier by the same configuration; nothing would be done")


def _look_at_folders(found: Findings, config: Config, stage: str) -> None:
    folder, option = Path(config.run.output_dir), f"run.output_dir={config.run.output_dir!r}"
    locks = supervised_locks(config) if stage == "sft" else {folder / LOCK_FILE: option}
    for path, protects in locks.items():
        found.attempt(lambda: _check_writable(path.parent, protects))  # noqa: B023
        holder = found.attempt(lambda: held_by(path))  # noqa: B023
        if holder:
            found.problems.append(f"{protects} is in use by another run ({holder})")
    if stage == "rl":
        found.attempt(lambda: _look_at_checkpoints(found, config, folder / "checkpoints"))


def _check_writable(folder: Path, option: str) -> None:
    """Raises ValueError unless ``folder`` is there, or can be made, and takes files; makes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ValueError(f"{option}: {nearest} is no folder; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {nearest} cannot be written to; choose another one, or change its mode")


def _look_at_checkpoints(found: Findings, config: Config, folder: Path) -> None:
    finished = CheckpointFolder(folder, keep=1).finished()
    if not finished:
        return
    newest = finished[max(finished)]
    manifest = manifest_from_json(read_manifest_text(newest), newest / MANIFEST_NAME)
    arch = architecture(config.model.path, tp=config.parallel.tp)
    found.attempt(lambda: check_manifest_model(manifest, asdict(arch), config.model.dtype, newest))
    changes = ", ".join(changed_options(config.run.output_dir, config))
    if not config.run.resume:
        found.problems.append(f"run.resume=false, but run.output_dir={config.run.output_dir!r} holds {newest}")
    elif manifest.step < config.run.num_steps:
        found.notes.append(f"would resume at step {manifest.step} of {newest}; changed: {changes or 'nothing'}")
    elif last_evaluation_is_missing(config):
        found.notes.append(f"would evaluate the policy of {newest}; changed: {changes or 'nothing'}")
    elif changes:
        found.problems.append(
            f"{config.run.output_dir} is finished ({newest}) and nothing would be trained; its configuration "
            f"differs: {changes}; choose another run.output_dir, or raise run.num_steps"
        )
    else:
        found.notes.append(f"{config.run.output_dir} is finished ({newest}); nothing would be trained")
