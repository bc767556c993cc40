"""Computes a kept update of a run again: the same batch, seed and weights, under any layout.

    aer replay-batch runs/run/nonfinite/step_000012
    aer launch --nproc 2 replay-batch runs/run/nonfinite/step_000012 --parallel.tp=2

Exit codes: 0 the update is finite, 1 it is not (where it begins is printed), 2 the folder or an option is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aer_megatron.config_section import TRUST_CODE
from aer_megatron.console.command_line import CommandLine, Given, Option
from aer_megatron.console.failures import Edge

if TYPE_CHECKING:
    from aer_megatron.actor.nonfinite_findings import Diagnosis
    from aer_megatron.report.reproducer import Reproducer
    from aer_megatron.types import StepStats


def _replay(given: Given, edge: Edge) -> int:
    """Makes the update, prints on rank 0 what came out, and returns 0 where it is finite, else 1."""
    from aer_megatron.compose.common import check_model, collective_timeout_s
    from aer_megatron.parallel import platform as platforms
    from aer_megatron.parallel.topology import destroy_topology
    from aer_megatron.report.reproducer import read_reproducer

    kept = read_reproducer(given.place, given.overrides, trusted=given[TRUST_CODE])
    path = given["weights"] or _kept_weights(kept)
    check_model(kept.config, path)
    platform = platforms.install_platform()
    kept.config.check_world_size(platform.world_size)
    platforms.initialize_process_group(platform, timeout_s=collective_timeout_s(kept.config))
    try:
        with edge.noting():
            stats, heard = _update(kept, path, platform)
    finally:
        destroy_topology()
    if platform.rank == 0:
        print(_text(kept, path, stats, heard), flush=True)
    return 1 if heard else 0


def _kept_weights(kept: Reproducer) -> str:
    from aer_megatron.report.reproducer import WEIGHTS_FOLDER

    named, folder = kept.description.get("weights"), kept.folder / WEIGHTS_FOLDER
    if named == WEIGHTS_FOLDER and folder.is_dir():
        return str(folder)
    raise ValueError(
        f"{kept.folder} has no weights (run.reproducer_gb); the nearest when it was written were {named!r}: give "
        "--weights=MODEL, a Hugging Face folder (aer convert megatron-to-hf makes one of a checkpoint)"
    )


def _update(kept: Reproducer, path: str, platform: Any) -> tuple[StepStats, list[Diagnosis]]:
    from aer_megatron.compose.common import build_actor, build_topology, checked_weights

    config, update = kept.config, kept.update
    actor = build_actor(
        config,
        path,
        platform,
        build_topology(config),
        optimizer=config.optimizer,
        num_updates=update.num_updates + config.algo.num_minibatches,
    )
    ids, vocabulary = update.batch.experience.token_ids_L, actor.arch.vocab_size
    if not ((ids >= 0) & (ids < vocabulary)).all():
        raise ValueError(f"{kept.folder}: token ids {ids.min()}..{ids.max()}, the model of {path} has {vocabulary}")
    actor.load_hf_weights(checked_weights(path))
    actor.num_updates = update.num_updates
    heard: list[Diagnosis] = []
    stats = actor.train(
        update.batch,
        seed=update.seed,
        entropy_gradient=update.entropy_gradient,
        report=heard.append,
        minibatch=update.minibatch,
    )
    return stats, heard


def _text(kept: Reproducer, path: str, stats: StepStats, heard: list[Diagnosis]) -> str:
    """Returns what was kept and what came out here."""
    update, parallel = kept.update, kept.config.parallel
    experience = update.batch.experience
    which = "all mini-batches" if update.minibatch is None else f"mini-batch {update.minibatch}"
    lines = [
        f"replay: step {update.step}, {which}, seed {update.seed}, {experience.num_sequences} sequences, "
        f"{experience.num_sampled_tokens:,} sampled tokens, weights of {path}",
        f"layout: tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp}, ep {parallel.ep}, {kept.config.model.dtype}",
    ]
    diagnosis = kept.description.get("diagnosis")
    if isinstance(diagnosis, dict) and isinstance(diagnosis.get("text"), str):
        lines.append(f"kept:   {diagnosis['text']}")
    for each in heard:
        lines.append(f"here:   {each.text()}")
        lines += [f"  {number}. {finding.text()}" for number, finding in enumerate(each.findings, start=1)]
    if not heard:
        sums = ", ".join(f"{name} {stats.mean(name):.9g}" for name in stats.sums)
        lines.append(f"here:   finite; gradient norm {stats.grad_norm:.9g}; means over tokens: {sums}")
        if diagnosis:
            lines.append(
                f"        the fault did not repeat here; it was seen on {kept.description.get('ranks')} ranks: try "
                "that layout, then the machine of the rank that is named"
            )
    return "\n".join(lines)


COMMAND = CommandLine(
    "replay-batch",
    about="Makes a kept update of a run again, from the weights that it began with, and prints its statistics, or what "
    "is not finite in it: first tensor, layer, sample, rank. Nothing is written. Exit codes: 0 finite, 1 not finite, "
    "2 folder or options wrong.",
    run=_replay,
    place="FOLDER",
    what="the folder, below nonfinite/ or recorded/ of a run",
    under_launch=True,
    options=(
        Option(
            "weights",
            "MODEL",
            "Hugging Face folder to take the weights from instead of those that were kept",
            default="",
        ),
        Option(TRUST_CODE, "", "import the classes of your own that its options name"),
    ),
)
main = COMMAND.main
