"""The measurement of FP8 recipes against the run's own precision, on one batch and over a short replayed run.

The exact precision generates the rollout batches and trains on them; every recipe trains on the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aer_megatron._C import DifficultyLedger
from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.algo import controller
from aer_megatron.compose.common import build_policy, build_topology, check_model, checked_weights
from aer_megatron.compose.data import Data, load_data
from aer_megatron.compose.rl import rollout_parts
from aer_megatron.config import Config
from aer_megatron.convert.fp8_weights import round_weight
from aer_megatron.data.prompts import PromptCursor
from aer_megatron.fp8_parity.picture import PrecisionCurves, draw_fp8_parity
from aer_megatron.loop.parts import NoSaves, Parts, Progress, RolloutParts
from aer_megatron.loop.phases import Phases
from aer_megatron.loop.synchronous import train
from aer_megatron.parallel import platform as platforms
from aer_megatron.parallel.topology import Topology, destroy_topology
from aer_megatron.report.metrics import Metric
from aer_megatron.report.reporter import NullReporter
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.types import Experience, Float32Array, Float64Array, PolicyScores, RolloutGroup

MAX_ROWS = 4096  # of a layer's output that are compared


@dataclass(frozen=True, slots=True)
class Measured:
    """One precision: its scores of the first batch, its layers' outputs there, its metrics of every step."""

    name: str
    scores: PolicyScores
    layers: tuple[Float32Array, ...]  # [rows, H] of this rank's layers
    metrics: Sequence[Mapping[str, Any]]
    rollout_kl: float  # to the engine that sampled the first batch
    grad_norm: float | None = None  # of one whole batch under the initial weights

    def series(self, metric: Metric) -> Float64Array:
        return np.array([step[metric] for step in self.metrics if step.get(metric) is not None], dtype=np.float64)


class Probe:
    """A policy that keeps its first scores and its layers' outputs in that pass."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self.first: PolicyScores | None = None
        self.layers: tuple[Float32Array, ...] = ()

    def score(self, experience: Experience, *, seed: int) -> PolicyScores:
        if self.first is not None:
            return self._actor.score(experience, seed=seed)
        with _layer_outputs(self._actor) as outputs:
            self.first = self._actor.score(experience, seed=seed)
        self.layers = tuple(outputs)
        return self.first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


class Recording:
    """A collector that generates each round of rollouts once and hands out the same ones ever after."""

    def __init__(self, collector: Any) -> None:
        self._collector = collector
        self._rounds: dict[tuple[int, int], list[RolloutGroup]] = {}

    def collect(self, prompts_P: Sequence[Any], *, step: int, refill: int, **options: Any) -> list[RolloutGroup]:
        if (step, refill) not in self._rounds:
            self._rounds[step, refill] = self._collector.collect(prompts_P, step=step, refill=refill, **options)
        return self._rounds[step, refill]


class Trace(NullReporter):
    """A reporter that keeps every step's metrics."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.steps.append(dict(metrics))


class NoSync:
    """Weights stay where they are: recorded rollouts need none."""

    def publish(self, named_tensors: Iterator[tuple[str, Any]], version: int) -> None: ...
    def suspend(self) -> None: ...


@contextmanager
def _layer_outputs(actor: Actor) -> Iterator[list[Float32Array]]:
    """Fills the list with each layer's output in the first micro-batch that runs without gradients."""
    outputs: dict[int, Float32Array] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if not torch.is_grad_enabled() and index not in outputs:  # calibration passes have gradients
                hidden = output[0].detach()
                outputs[index] = hidden.reshape(-1, hidden.shape[-1])[:MAX_ROWS].float().cpu().numpy()

        return hook

    layers = [layer for chunk in actor.chunks for layer in chunk.decoder.layers]
    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    result: list[Float32Array] = []
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
        result.extend(outputs[index] for index in sorted(outputs))


def run_report(config: Config, formats: Mapping[str, str], folder: Path) -> str:
    """Returns the table, after writing table, numbers and picture into ``folder``; "" on ranks other than the first.

    ``formats``: recipe -> the format that it is paired with where the run file names none.
    """
    platform = platforms.install_platform()
    config.check_world_size(platform.world_size)
    platforms.initialize_process_group(platform)
    try:
        check_model(config, config.model.path)
        measured = _measure_all(config, formats, platform, build_topology(config))
    finally:
        destroy_topology()
    if platform.rank != 0:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(one, measured[0]) for one in measured]
    text = _table(rows, config)
    (folder / "fp8_parity.md").write_text(text + "\n", encoding="utf-8")
    (folder / "fp8_parity.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    title = f"FP8 against {measured[0].name}: {config.run.name}, {config.run.num_steps} replayed steps"
    draw_fp8_parity([_curves(one, measured[0]) for one in measured], folder / "fp8_parity.png", title=title)
    return text


def _measure_all(config: Config, formats: Mapping[str, str], platform: Any, topology: Topology) -> list[Measured]:
    exact = {key: value for key, value in config.megatron.items() if not key.startswith("fp8")}
    with ExitStack() as stack:
        data = load_data(config)
        engine = rollout_parts(config, platform, data, stack)
        first = replace(engine, collector=Recording(engine.collector))
        replays = replace(first, weight_sync=NoSync())

        def measure(name: str, megatron: Mapping[str, Any], rollouts: RolloutParts) -> Measured:
            changed = config.with_options({"megatron": dict(megatron)})
            replayed = _measure(name, changed, data, rollouts, (platform, topology))
            still = _measure(name, _standing(changed), data, replays, (platform, topology))
            return replace(replayed, grad_norm=float(still.series(Metric.TRAIN_GRAD_NORM)[-1]))

        result = [measure(config.model.dtype, exact, first)]  # the first one generates what the others replay
        for recipe, number_format in formats.items():
            fp8 = {"fp8": number_format} | dict(config.megatron) | {"fp8_recipe": recipe}
            result.append(measure(recipe, fp8, replays))
        once = config.with_options({"megatron": exact, "run.num_steps": 1})
        rounded = _measure("rollout weights", once, data, replays, (platform, topology), round_weights=True)
        return [*result, replace(rounded, metrics=())]


def _standing(config: Config) -> Config:
    """Returns a run of which every update is one batch under the initial weights.

    Two of them, where there are two batches: the first update of delayed scaling has uncalibrated gradient scales.
    """
    return config.with_options(
        {
            "run.num_steps": min(2, config.run.num_steps),
            "algo.num_minibatches": 1,
            "optimizer.lr": 1e-30,
            "optimizer.min_lr": 0.0,
        }
    )


def _measure(
    name: str,
    config: Config,
    data: Data,
    rollouts: RolloutParts,
    place: tuple[Any, Topology],
    *,
    round_weights: bool = False,
) -> Measured:
    """Returns one precision's first scores and its run over the recorded batches."""
    platform, topology = place
    actor = build_policy(config, platform, topology)
    get = checked_weights(config.model.path)
    actor.load_hf_weights(_rounded(get, TORCH_DTYPES[config.model.dtype]) if round_weights else get)
    if config.algo.kl_coefficient:
        actor.hold_reference(get)
    probe, trace = Probe(actor), Trace()
    cursor = PromptCursor(data.train, config.run.seed)
    parts = Parts(
        prompts=cursor,
        rollouts=rollouts,
        policy=probe,
        ledger=DifficultyLedger(config.algo.ledger.decay, len(data.train)),
        saves=NoSaves(),
        flight=None,
        reporter=trace,
        timer=PhaseTimer(),
    )
    train(Phases(config, parts, Progress(0, 0, controller.initial_state(config.algo.entropy), cursor.state_dict())))
    assert probe.first is not None
    return Measured(name, probe.first, probe.layers, trace.steps, float(trace.steps[0][Metric.ROLLOUT_MISMATCH_KL]))


def _rounded(get: Callable[[str], torch.Tensor], dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Returns a getter of what ``rollout.quantization = "fp8"`` makes of the weights, which have the run's dtype."""
    return lambda name: round_weight(name, get(name).to(dtype))


def _layer_errors(one: Measured, exact: Measured) -> list[float]:
    return [
        float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
        for mine, theirs in zip(one.layers, exact.layers, strict=True)
    ]


def _row(one: Measured, exact: Measured) -> dict[str, Any]:
    """Returns the numbers of one precision; differences are to ``exact``."""
    shift_T = one.scores.logprob_T.astype(np.float64) - exact.scores.logprob_T
    entropy, exact_entropy = (float(m.scores.token_entropy_T.mean(dtype=np.float64)) for m in (one, exact))
    row: dict[str, Any] = {
        "precision": one.name,
        "logprob_shift_mean_abs": float(np.abs(shift_T).mean()),
        "logprob_shift_mean": float(shift_T.mean()),
        "logprob_shift_max_abs": float(np.abs(shift_T).max()),
        "token_entropy": entropy,
        "token_entropy_shift": entropy - exact_entropy,
        "layer_output_error": _layer_errors(one, exact),
        "rollout_mismatch_kl": one.rollout_kl,
    }
    if one.metrics:
        norms, exact_norms = (m.series(Metric.TRAIN_GRAD_NORM) for m in (one, exact))
        row |= {
            "grad_norm": one.grad_norm,
            "grad_norm_ratio": float(np.exp(np.mean(np.log(norms[1:] / exact_norms[1:])))) if len(norms) > 1 else None,
            "token_entropy_trace": one.series(Metric.ENTROPY_TOKEN_MEAN).tolist(),
            "alpha_trace": one.series(Metric.AER_ALPHA).tolist(),
            "target": _target(one),
        }
        alpha, exact_alpha = (m.series(Metric.AER_ALPHA) for m in (one, exact))
        row["alpha_difference_max"] = float(np.abs(alpha - exact_alpha).max()) if len(alpha) else None
    return row


def _target(one: Measured) -> float | None:
    targets = one.series(Metric.ENTROPY_TARGET)
    return float(targets[-1]) if len(targets) else None


def _curves(one: Measured, exact: Measured) -> PrecisionCurves:
    return PrecisionCurves(
        name=one.name,
        logprob_shift_T=one.scores.logprob_T.astype(np.float64) - exact.scores.logprob_T,
        layer_error=np.array(_layer_errors(one, exact)),
        token_entropy=one.series(Metric.ENTROPY_TOKEN_MEAN),
        alpha=one.series(Metric.AER_ALPHA),
        target=_target(one),
    )


def _table(rows: Sequence[Mapping[str, Any]], config: Config) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        f"{config.run.name}: {config.run.num_steps} batches of {config.rollout.prompts_per_step} x "
        f"{config.rollout.group_size} sequences",
        "",
        "| precision | mean abs dlogp | mean dlogp | max abs dlogp | KL to rollouts | token entropy (H_0) | shift "
        "| grad norm | ratio, replayed run | H* | max abs d alpha | last layer's error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            str(row["precision"]),
            number(row["logprob_shift_mean_abs"], ".4f"),
            number(row["logprob_shift_mean"], "+.4f"),
            number(row["logprob_shift_max_abs"], ".3f"),
            number(row["rollout_mismatch_kl"], ".5f"),
            number(row["token_entropy"], ".4f"),
            number(row["token_entropy_shift"], "+.4f"),
            number(row.get("grad_norm"), ".4f"),
            number(row.get("grad_norm_ratio"), ".3f"),
            number(row.get("target"), ".4f"),
            number(row.get("alpha_difference_max"), ".4f"),
            number(row["layer_output_error"][-1], ".4f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
