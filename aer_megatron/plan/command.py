"""What a run needs before it runs: memory per GPU, work per step, and the layouts that fit.

    aer plan RUN.toml --gpus 8 --gpu h100
    aer plan RUN.toml --gpus 64 --rollout-share 0.4 --rollout.max_new_tokens=8192

Reads the run file and the model's config.json only; needs no weights, data or GPU. The formulas are in
costs/memory.py and costs/step.py, what they were checked against is in docs/plan.md.

Exit codes: 0 done, 2 the settings are impossible or nothing fits (one clear message).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import Edge
from aer_megatron.costs.hardware import GPUS, gpu_named
from aer_megatron.files.json_input import read_json_object

if TYPE_CHECKING:
    from aer_megatron.plan.search import Setting


def _run(given: Given, edge: Edge) -> int:
    from aer_megatron.plan.search import check_layout, fitting_candidates
    from aer_megatron.plan.table import nothing_fits_text, report

    setting = _setting(given)
    check_layout(setting)
    candidates = list(fitting_candidates(setting))
    print("\n".join(report(setting, candidates, given["top"])))
    if not candidates:
        raise ValueError(nothing_fits_text(setting))
    return 0


def _setting(given: Given) -> Setting:
    from aer_megatron.compose.step_plan import StepPlan
    from aer_megatron.convert.hf_config import architecture_from_hf_config
    from aer_megatron.plan.search import Setting

    config, share = given.config(), given["rollout-share"]
    if share and not config.rollout.uses_servers:
        raise ValueError(f"--rollout-share={share} is for rollout.engine='sglang'; set that, or drop the share")
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={config.model.path!r} has no config.json; a plan needs that file, but no weights")
    arch = architecture_from_hf_config(read_json_object(file))
    return Setting(StepPlan(config, arch), gpu_named(given["gpu"]), given["gpus"], given["reserve"], share)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError("must lie in [0, 1): it is a share of a GPU's memory")
    return share


COMMAND = CommandLine(
    "plan",
    about="Prints what a run needs before it runs: memory per GPU, work per step, and the layouts that fit, by "
    "estimated time. Reads the run file and the model's config.json; needs no weights, data or GPU.",
    run=_run,
    place="RUN.toml",
    what="the run file",
    options=(
        Option("gpus", "N", "GPUs that train", whole(1), required=True),
        Option("gpu", "KIND", f"of these: {', '.join(gpu.name for gpu in GPUS)}", default="h100"),
        Option("reserve", "SHARE", "of memory for CUDA, NCCL and fragmentation", _share, 0.1),
        Option("rollout-share", "SHARE", "of each GPU's memory that co-located rollout servers hold", _share, 0.0),
        Option("top", "K", "layouts printed", whole(), 8),
    ),
)
main = COMMAND.main
