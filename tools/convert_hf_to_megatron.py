"""Converts a Hugging Face model folder to Megatron-Core's distributed checkpoint format.

    python tools/convert_hf_to_megatron.py MODEL OUTPUT [--tp N] [--dtype bfloat16] [--verify]

The output loads into GPTModel through megatron.core.dist_checkpointing under any pipeline and expert layout, and any
tensor-parallel size that divides the heads; --tp pads the heads for another one (docs/checkpoints.md). Tensors are
read from memory-mapped files and written one at a time. OUTPUT appears when it is complete and flushed, or not at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversion_cli import DTYPES, GB, plain_errors, progress_bar, say, torch_dtype, verify_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder: config.json and safetensors files")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size the heads must split into; default 1")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the output; default: as stored")
    parser.add_argument("--max-file-gb", type=float, default=4.0, help="size of one output file; default %(default)s")
    parser.add_argument("--verify", action="store_true", help="read it back: names, shapes, bits, logits")
    options = parser.parse_args()
    with plain_errors("convert_hf_to_megatron"):
        convert(options)
        print(options.output)


def convert(options: argparse.Namespace) -> None:
    from aer_megatron.convert import folders

    dtype = torch_dtype(options.dtype)
    folder, arch = folders.checked_hf_folder(options.model, options.tp)
    dtypes = {name: dtype or stored for name, stored in folders.hf_dtypes(folder, arch).items()}
    num_bytes = sum(spec.num_bytes for spec in folders.hf_specs(arch, dtypes).values())
    folders.check_space(options.output, num_bytes)
    with progress_bar("to Megatron", num_bytes) as advance:
        folders.hf_to_megatron(
            folder, arch, options.output, dtype=dtype, max_file_bytes=int(options.max_file_gb * GB), advance=advance
        )
    if options.verify:
        verify(options, num_bytes)


def verify(options: argparse.Namespace, num_bytes: int) -> None:
    """Returns nothing; raises RuntimeError unless the output gives back every bit of the model, and its logits."""
    from aer_megatron.actor.conversion_check import load_distributed
    from aer_megatron.convert import folders
    from aer_megatron.convert.megatron_folder import MegatronFolder
    from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes

    folder, arch = folders.checked_hf_folder(options.model, options.tp)
    stored = MegatronFolder(options.output)
    padded = stored_architecture(arch, stored)
    with progress_bar("verifying", num_bytes) as advance:
        count = folders.compare(
            folder.get, stored_hf_dtypes(padded, stored), iter_stored_as_hf(padded, stored), advance
        )
    say(f"verified: {count} tensors, names, shapes and bits")
    if options.dtype and set(folders.hf_dtypes(folder, arch).values()) != {torch_dtype(options.dtype)}:
        say("logits not compared: --dtype changed the numbers")
        return
    say(verify_logits(options.model, padded, lambda model, _: load_distributed(model, options.output)))


if __name__ == "__main__":
    main()
