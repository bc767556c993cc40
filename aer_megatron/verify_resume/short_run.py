"""A run shortened to minutes, and the other layouts that its ranks and its model fit.

This file does NOT start anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from aer_megatron.compose.step_plan import fewest_ranks
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.options.training import RunSection

MAX_NEW_TOKENS, GROUP_SIZE, PROMPTS = 16, 4, 4  # of the shortened run
LAYOUT_OPTIONS = ("tp", "pp", "vpp", "cp", "ep", "sequence_parallel")


@dataclasses.dataclass(frozen=True, slots=True)
class ShortRunRequest:
    """What the user asked for. Example: ``ShortRunRequest("run.toml", to=({"tp": "1", "pp": "2"},))``."""

    run_file: str
    overrides: tuple[str, ...] = ()
    nproc: int | None = None
    to: tuple[Mapping[str, str], ...] = ()
    steps: int = 2
    work: str | None = None
    keep_engine: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ShortRun:
    """The shortened run. ``layouts`` are the other ones by name, each with its overrides on top of ``overrides``."""

    run_file: str
    overrides: tuple[str, ...]
    num_ranks: int
    steps: int
    config: Config
    layouts: Mapping[str, tuple[str, ...]]


def shorten(request: ShortRunRequest) -> ShortRun:
    """Returns the shortened run.

    Raises:
        ValueError: the configuration is wrong, or a layout of ``--to`` fits neither the model nor the ranks.
    """
    from aer_megatron.compose.common import check_model  # it brings torch and Megatron-Core

    given = load_config(request.run_file, request.overrides)
    num_ranks = request.nproc or fewest_ranks(given)
    given.check_world_size(num_ranks)
    check_model(given, given.model.path)
    overrides = (*request.overrides, *_shortened(given, num_ranks, request))
    config = load_config(request.run_file, overrides)
    config.check_world_size(num_ranks)
    wanted = list(request.to) or _other_layouts(config, num_ranks)
    layouts: dict[str, tuple[str, ...]] = {}
    for layout in wanted:
        changes = _layout_overrides(config, layout)
        other = load_config(request.run_file, (*overrides, *changes))
        try:
            dp = other.check_world_size(num_ranks)
            check_model(other, other.model.path)
        except ValueError as error:
            if request.to:
                raise ValueError(f"--to {','.join(f'{k}={v}' for k, v in layout.items())}: {error}") from None
            continue
        layouts[layout_name(other, dp)] = changes
    if not request.to:
        layouts.pop(layout_name(config, config.check_world_size(num_ranks)), None)
        layouts = dict(list(layouts.items())[:2])
    return ShortRun(request.run_file, overrides, num_ranks, request.steps, config, layouts)


def _shortened(config: Config, num_ranks: int, request: ShortRunRequest) -> list[str]:
    """Returns the overrides that make minutes of a run, and keep it out of ``run.output_dir``."""
    rollout, k = config.rollout, request.steps
    group_size = min(rollout.group_size, GROUP_SIZE)
    multiple = config.algo.num_minibatches * num_ranks  # any data-parallel size divides it
    prompts = next(p for p in range(PROMPTS, PROMPTS + multiple) if p * group_size % multiple == 0)
    max_new_tokens = min(rollout.max_new_tokens, MAX_NEW_TOKENS)
    run = {
        "num_steps": 2 * k, "checkpoint_every": k, "keep_checkpoints": 2, "resume": "true",
        "record_batch": -1, "profile_steps": "[]", "export_every": 0, "keep_best": '""', "max_hours": 0,
    }  # fmt: skip
    options = {f"run.{name}": value for name, value in run.items() if name in RunSection.model_fields} | {
        "eval.sets": "{}",
        "rollout.prompts_per_step": prompts,
        "rollout.group_size": group_size,
        "rollout.max_new_tokens": max_new_tokens,
        "algo.overlong_buffer": min(config.algo.overlong_buffer, max_new_tokens - 1),
        # a gradient in every step, whatever the rewards: a few answers may all be alike
        **{f"algo.entropy.{name}": json.dumps(value) for name, value in config.algo.entropy.acting_options().items()},
        "report.sinks": "[]",
        "report.picture": "false",
    }
    if rollout.uses_servers and not request.keep_engine:
        options |= {
            "rollout.engine": "embedded",
            "rollout.staleness": 0,
            "rollout.oversample": 1.0,
            "sglang.release_memory": "false",
            "eval.overlap": "false",
        }
    return [f"--{name}={value}" for name, value in options.items()]


def _other_layouts(config: Config, num_ranks: int) -> list[Mapping[str, str]]:
    """Returns candidates: all ranks in the pipeline, in tensor parallelism, in data parallelism, and mixtures."""
    sizes = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    pairs = [(1, num_ranks), (num_ranks, 1), (1, 1), *((tp, pp) for tp in sizes for pp in sizes if tp * pp > 1)]
    keep = {"ep": str(config.parallel.ep), "cp": "1", "vpp": "1"}
    return [{"tp": str(tp), "pp": str(pp), **keep} for tp, pp in dict.fromkeys(pairs) if num_ranks % (tp * pp) == 0]


def _layout_overrides(config: Config, layout: Mapping[str, str]) -> tuple[str, ...]:
    sizes = {"vpp": "1"} if layout.get("pp") == "1" else {}
    sizes |= dict(layout)
    tp = int(sizes.get("tp", config.parallel.tp))
    if "sequence_parallel" not in sizes:  # experts need it under tensor parallelism; alone it is refused
        from aer_megatron.compose.common import architecture

        wanted = tp > 1 and (config.parallel.sequence_parallel or architecture(config.model.path).moe is not None)
        sizes["sequence_parallel"] = str(wanted).lower()
    return tuple(f"--parallel.{name}={value}" for name, value in sizes.items())


def layout_name(config: Config, dp: int) -> str:
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "ep": parallel.ep, "dp": dp}
    name = " ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one rank"
    return f"{name} sp" if parallel.sequence_parallel else name
