"""One evaluation from its options to its result: engine, problems, samples on disk, sums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from aer_megatron.compose.common import VERSIONED_PACKAGES, held
from aer_megatron.compose.data import evaluation_prompts
from aer_megatron.compose.engines import build_engine, serving_engine
from aer_megatron.config import Config
from aer_megatron.config_loading import config_digest
from aer_megatron.console.standard_streams import say
from aer_megatron.data.tokenizer import load_tokenizer, make_decoder, stop_token_ids
from aer_megatron.evaluate.answering import Answering, Question
from aer_megatron.evaluate.policy import Policy
from aer_megatron.evaluate.result import Answers, EvaluatedSet, Result, sum_up, write_result
from aer_megatron.evaluate.samples import SampleFile
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.writer import package_versions
from aer_megatron.rewards.pool import VerifierPool, check_verifiers
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.engine import RolloutEngine, SamplingOptions
from aer_megatron.rollout.seeds import stream_seed
from aer_megatron.types import Prompt

# what a verdict of a verifier depends on, beside the code of the project
_GRADERS = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be evaluated. ``temperatures``: in place of each set's own; none keeps that."""

    policy: Policy
    sets: tuple[str, ...]
    temperatures: tuple[float, ...]
    output: Path


def evaluate(wish: Wish, platform: Platform) -> Result | None:
    """Returns the result, after writing it; None on ranks other than the first. Every rank calls it.

    Samples that an earlier call, perhaps killed, left beside the output are not made again.

    Raises:
        ValueError: options, problems, weights or the samples on disk are wrong, or another process evaluates.
        RuntimeError: the engine or the verifiers fail.
    """
    config, lock = wish.policy.config, wish.output.with_suffix(".lock")
    with held({lock: f"--output={wish.output}"}, platform), ExitStack() as stack:
        tokenizer = load_tokenizer(config.model.path)
        stops = stop_token_ids(config.model.path, tokenizer)
        prompts, notes = evaluation_prompts(config, tokenizer, wish.sets)
        for note in notes if platform.rank == 0 else ():
            say(note)
        check_verifiers({prompt.verifier for of_set in prompts.values() for prompt in of_set})
        engine, identity = _engine(wish.policy, platform, stack)
        questions = [
            _question(config, name, temperature, prompts[name], stops, identity)
            for name in wish.sets
            for temperature in wish.temperatures or (config.eval.sets[name].temperature,)
        ]
        rewards = config.rewards
        pool = stack.enter_context(VerifierPool(rewards.num_workers, rewards.timeout_s, rewards.memory_mb))
        decode = make_decoder(tokenizer, stops)
        answering = Answering(engine, pool, decode, platform, config.rollout.max_batch_size)
        file = _answer_all(wish, questions, answering)
        if file is None:
            return None
        result = _result(wish, questions, file, identity, platform)
        write_result(wish.output, result)
        return result


def _engine(policy: Policy, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, dict[str, Any]]:
    """Returns the engine with the policy in service, and what tells this policy from every other."""
    config = policy.config
    identity: dict[str, Any] = {"kind": policy.kind, "path": str(policy.place)}
    if policy.kind == "servers":
        engine, served = serving_engine(config, stack)
        return engine, identity | {"weights": config_digest(served)} | served
    engine, weight_sync = build_engine(config, platform, stack)
    digest = hashlib.sha256()
    weight_sync.publish(_digested(policy, digest), policy.step)
    if policy.checkpoint is not None:
        identity |= {"checkpoint": policy.checkpoint.name, "step": policy.step}
    weights = on_first_rank(lambda: digest.hexdigest()[:16], rank=platform.rank, device=platform.device)
    return engine, identity | {"weights": weights}


def _digested(policy: Policy, digest: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in policy.tensors():
        digest.update(f"{name} {tensor_checksum(tensor):016x}\n".encode())
        yield name, tensor


def _question(
    config: Config,
    name: str,
    temperature: float,
    prompts: Sequence[Prompt],
    stops: Sequence[int],
    identity: Mapping[str, Any],
) -> Question:
    options = config.eval.sets[name]
    num_samples = options.num_samples if temperature else 1  # greedy: one answer
    seed = stream_seed(config.run.seed, f"evaluate.{name}")
    decisive = {
        "weights": identity["weights"],
        "dtype": config.model.dtype,
        "quantization": config.rollout.quantization,
        "prompts": [(prompt.id, prompt.token_ids, prompt.answer, prompt.verifier) for prompt in prompts],
        "grader": _graders(prompts),
        "sampling": [temperature, options.top_p, options.top_k, num_samples, sorted(stops), seed],
        "max_new_tokens": options.length_limit(config.rollout.max_new_tokens),
    }
    return Question(
        name=name,
        key=config_digest(decisive),
        prompts=prompts,
        sampling=SamplingOptions(temperature, options.top_p, options.top_k, frozenset(stops)),
        num_samples=num_samples,
        max_new_tokens=decisive["max_new_tokens"],
        stream_seed=seed,
        k=tuple(k for k in options.k if k <= num_samples) or (1,),
    )


def _graders(prompts: Sequence[Prompt]) -> dict[str, str | None]:
    """Returns the version of every verifier of the problems; None for a function of the user's."""
    own = package_versions(["aer-megatron", *_GRADERS.values()])
    found: dict[str, str | None] = {}
    for name in sorted({prompt.verifier for prompt in prompts}):
        library = _GRADERS.get(name.partition(":")[0])
        spelled = f"{library} {own[library]}, " if library else ""
        is_own_function = ":" in name and library is None
        found[name] = None if is_own_function else f"{spelled}aer-megatron {own['aer-megatron']}"
    return found


def _answer_all(wish: Wish, questions: Sequence[Question], answering: Answering) -> SampleFile | None:
    """Returns the samples of all questions, once all are there; None on ranks other than the first."""
    platform, file = answering.platform, None

    def begin() -> list[list[Any]]:
        nonlocal file
        wish.output.parent.mkdir(parents=True, exist_ok=True)
        texts = {question.key: [prompt.problem for prompt in question.prompts] for question in questions}
        file = SampleFile(wish.output.with_suffix(".samples.jsonl"), texts)
        return [list(place) for place in file.done]

    done = {(key, index) for key, index in on_first_rank(begin, rank=platform.rank, device=platform.device)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=platform.rank != 0 or not console.is_terminal) as progress:
        for question in questions:
            total, old = len(question.prompts), sum(key == question.key for key, _ in done)
            title = f"{question.name} at temperature {question.sampling.temperature:g}"
            if platform.rank == 0:
                say(f"{title}: {total} problems x {question.num_samples} samples, {old} problems done", error=True)
            bar = progress.add_task(title, total=total, completed=old)
            for rows in answering.rows(question, done.__contains__):
                if file is not None:
                    file.append(rows)
                progress.advance(bar, sum((row["key"], row["index"]) not in done for row in rows))
    if file is not None:
        file.close()
    return file


def _result(
    wish: Wish, questions: Sequence[Question], file: SampleFile, identity: Mapping[str, Any], platform: Platform
) -> Result:
    config = wish.policy.config
    answers: dict[str, list[Answers]] = {}
    for question in questions:
        bare = Answers(
            temperature=question.sampling.temperature,
            num_samples=question.num_samples,
            k=list(question.k),
            problems=[file.done[question.key, index] for index in range(len(question.prompts))],
        )
        summed = {name: [*measure] for name, measure in sum_up(bare).items()}
        answers.setdefault(question.name, []).append(bare.model_copy(update={"measures": summed}))
    return Result(
        format=1,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        policy=dict(identity),
        engine={
            "engine": config.rollout.engine,
            "dtype": config.model.dtype,
            "quantization": config.rollout.quantization,
            "num_ranks": platform.world_size,
        },
        versions=package_versions(VERSIONED_PACKAGES),
        sets={
            question.name: EvaluatedSet(
                grader=_graders(question.prompts), settings=_settings(config, question), answers=answers[question.name]
            )
            for question in questions
        },
    )


def _settings(config: Config, question: Question) -> dict[str, Any]:
    """Returns the options of a set, those that it inherits filled in."""
    options = config.eval.sets[question.name]
    data = options.data_of(config.data)
    inherited = {name: getattr(data, name) for name in ("verifier", "instruction", "system", "template")}
    table = options.model_dump(mode="json", exclude={"every", "temperature", "num_samples", "k"}) | inherited
    return table | {"max_new_tokens": question.max_new_tokens, "seed": config.run.seed}
