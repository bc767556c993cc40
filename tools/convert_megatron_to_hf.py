"""Converts a Megatron checkpoint to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py CHECKPOINT OUTPUT [--hf MODEL] [--dtype bfloat16] [--verify]

CHECKPOINT is a folder that megatron.core.dist_checkpointing wrote (or convert_hf_to_megatron.py did), or a step_*
folder of one of this project's runs, in any parallel layout. config.json, generation_config.json and tokenizer files
come from --hf, by default from the checkpoint's own folder. Tensors are read and written one at a time. OUTPUT appears
when it is complete and flushed, or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conversion_cli import DTYPES, GB, plain_errors, progress_bar, say, torch_dtype, verify_logits


class Source(NamedTuple):
    """A checkpoint to read: its architecture, a stream of Hugging Face tensors and their stored dtypes."""

    arch: Any
    tensors: Callable[[], Iterator[tuple[str, Any]]]
    dtypes: dict[str, Any]
    distributed: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="distributed checkpoint, or step_* folder of a run")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--hf", type=Path, help="folder of config.json, tokenizer, ...; default: the checkpoint's")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the output; default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of one output file; default %(default)s")
    parser.add_argument("--verify", action="store_true", help="read it back: names, shapes, bits, logits")
    options = parser.parse_args()
    with plain_errors("convert_megatron_to_hf"):
        convert(options)
        print(options.output)


def open_source(checkpoint: Path, hf: Path) -> Source:
    """Returns the checkpoint, checked against config.json. Raises ValueError naming what does not fit."""
    from aer_megatron.checkpoint.weights import RunCheckpoint, is_run_checkpoint
    from aer_megatron.convert.folders import HFConfig
    from aer_megatron.convert.hf_config import architecture_from_hf_config
    from aer_megatron.convert.megatron_folder import MegatronFolder
    from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes

    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder")
    is_run = is_run_checkpoint(checkpoint)
    if is_run and not (hf / "config.json").is_file():
        raise ValueError(f"{checkpoint} is a run's checkpoint; name the run's model.path with --hf")
    stored = None if is_run else MegatronFolder(checkpoint)
    arch = architecture_from_hf_config(HFConfig(hf).table)
    if stored is None:
        run = RunCheckpoint(checkpoint)
        return Source(arch, lambda: run.tensors(arch), run.dtypes(arch), distributed=False)
    padded = stored_architecture(arch, stored)
    return Source(padded, lambda: iter_stored_as_hf(padded, stored), stored_hf_dtypes(padded, stored), True)


def convert(options: argparse.Namespace) -> None:
    from aer_megatron.convert import folders

    hf = options.hf or options.checkpoint
    source = open_source(options.checkpoint, hf)
    dtype = torch_dtype(options.dtype)
    dtypes = {name: dtype or stored for name, stored in source.dtypes.items()}
    num_bytes = sum(spec.num_bytes for spec in folders.hf_specs(source.arch, dtypes).values())
    folders.check_space(options.output, num_bytes)
    with progress_bar("to Hugging Face", num_bytes) as advance:
        folders.megatron_to_hf(
            source.tensors(),
            source.arch,
            options.output,
            dtypes=dtypes,
            like=hf,
            max_shard_bytes=int(options.max_shard_gb * GB),
            advance=advance,
        )
    if options.verify:
        verify(options, source, num_bytes)


def verify(options: argparse.Namespace, source: Source, num_bytes: int) -> None:
    """Returns nothing; raises RuntimeError unless the output holds the checkpoint bit for bit and gives its logits."""
    import torch

    from aer_megatron.actor.conversion_check import load_distributed, load_from_hf
    from aer_megatron.convert import folders
    from aer_megatron.convert.hf_folder import HFFolder

    written, _ = folders.checked_hf_folder(options.output, 1)
    dtypes = folders.hf_dtypes(written, source.arch)
    converted: Iterator[tuple[str, torch.Tensor]] = (
        (name, tensor.to(dtypes[name])) for name, tensor in source.tensors()
    )
    with progress_bar("verifying", num_bytes) as advance:
        count = folders.compare(written.get, dtypes, converted, advance)
    say(f"verified: {count} tensors, names, shapes and bits")
    if dtypes != source.dtypes:
        say("logits not compared: --dtype changed the numbers")
        return
    from_hf = load_from_hf(source.arch, HFFolder(options.output).get)
    from_checkpoint = lambda model, _: load_distributed(model, options.checkpoint)  # noqa: E731
    say(verify_logits(options.output, source.arch, from_checkpoint if source.distributed else from_hf))


if __name__ == "__main__":
    main()
