"""What FP8 changes: each recipe against the run's own precision, on one batch and over a short replayed run.

    aer fp8-parity RUN.toml --steps 20 --parallel.tp=1

Exit codes: 0 done, 2 the options or the run file are wrong (one clear message).
"""

from __future__ import annotations

from pathlib import Path

from aer_megatron.config import Config
from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import LOG_FOLDER, Edge

# the formats that TransformerEngine pairs with a recipe, where the run file names none
FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
_ROWS = """
Rows of the table:
  EXACT            the reference itself (fp32 or bf16)
  RECIPE           [megatron] fp8 with that recipe: emulated without a CUDA device, TransformerEngine's with one
  rollout weights  the exact policy with the weights that rollout.quantization = "fp8" gives the engine (scored only)"""


def _run(given: Given, edge: Edge) -> int:
    config = given.config()
    folder = Path(given["output"] or Path(config.run.output_dir) / "fp8_parity")
    edge.log_folder = folder / LOG_FOLDER
    config = _report_config(config, given["steps"])
    from aer_megatron.fp8_parity.measurement import run_report

    text = run_report(config, {name: FORMATS[name] for name in given["recipes"]}, folder)
    if text:
        print(text)
    return 0


def _recipes(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"names {name!r}; use some of {','.join(FORMATS)}")
    return names


def _report_config(config: Config, num_steps: int) -> Config:
    """Returns the run as the report needs it: a few steps, nothing evaluated, no gate on precision."""
    if config.parallel.pp > 1:
        raise ValueError(f"parallel.pp={config.parallel.pp}: the report looks at all layers; use --parallel.pp=1")
    return config.with_options(
        {
            "run.num_steps": num_steps,
            "eval.sets": {},
            "run.keep_best": "",
            "rollout.logprob_gate": 0.0,
            # every precision drifts away from the policy whose rollouts it replays: that must not hold its controller
            "algo.entropy.mismatch_bound": 0.0,
        }
    )


COMMAND = CommandLine(
    "fp8-parity",
    about="Compares FP8 recipes with the precision of model.dtype, all with the weights of model.path. The exact "
    "precision generates --steps rollout batches and trains on them; every recipe then trains on the SAME batches, its "
    "controller fed by its own entropies.",
    run=_run,
    place="RUN.toml",
    what="the run file",
    under_launch=True,
    options=(
        Option("steps", "K", "rollout batches of the replayed run", whole(1), 20),
        Option("recipes", "NAMES", f"some of {','.join(FORMATS)} [all]", _recipes, tuple(FORMATS)),
        Option("output", "FOLDER", "folder of the report [fp8_parity/ below run.output_dir]"),
    ),
    more_help=lambda: _ROWS,
)
main = COMMAND.main
