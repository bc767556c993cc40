"""Proves on your own model that conversion loses nothing: prints one line per check and fails on the first difference.

    python tools/check_roundtrip.py MODEL [--layouts 1x1 2x1 1x2 2x2] [--scratch DIR]

MODEL -> distributed checkpoint -> Hugging Face folder is compared bit for bit; then, for every layout TPxPP[xEP], as
many processes load the distributed checkpoint through Megatron-Core into GPTModel and stream the weights back out as a
run does, compared bit for bit again; then the logits of a fixed prompt are compared with transformers'.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

from conversion_cli import GB, plain_errors, progress_bar, verify_logits

BUCKET_BYTES = 256 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--layouts", nargs="*", default=["1x1", "2x1", "1x2", "2x2"], help="default %(default)s")
    parser.add_argument("--scratch", type=Path, help="where the copies go; needs twice the model's size")
    options = parser.parse_args()
    with plain_errors("check_roundtrip"), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        check(options.model, [_layout(text) for text in options.layouts], Path(scratch))


def check(model: Path, layouts: list[tuple[int, int, int]], scratch: Path) -> None:
    """Returns nothing; raises RuntimeError naming the first tensor or layout that differs."""
    from aer_megatron.actor.conversion_check import load_distributed
    from aer_megatron.convert.folders import checked_hf_folder

    for tp in sorted({1, *(tp for tp, _, _ in layouts)}):
        _, arch = checked_hf_folder(model, tp)
        _, whole = checked_hf_folder(model, 1)
        if tp > 1 and arch == whole:
            continue  # the checkpoint of one rank serves this size as well
        target = scratch / f"megatron-tp{tp}"
        _folders(model, target, scratch / f"hf-tp{tp}", tp)
        _report("1x1", verify_logits(model, arch, lambda m, _, target=target: load_distributed(m, target)))
    for tp, pp, ep in layouts:
        padded = scratch / f"megatron-tp{tp}"
        folder = padded if padded.is_dir() else scratch / "megatron-tp1"
        started = time.monotonic()
        count = _on_ranks(model, folder, (tp, pp, ep))
        _report(f"{tp}x{pp}x{ep}", f"{count} tensors bit-exact through GPTModel, {time.monotonic() - started:.0f} s")


def _folders(model: Path, megatron: Path, back: Path, tp: int) -> None:
    from aer_megatron.convert import folders
    from aer_megatron.convert.hf_folder import HFFolder
    from aer_megatron.convert.megatron_folder import MegatronFolder
    from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes

    folder, arch = folders.checked_hf_folder(model, tp)
    dtypes = folders.hf_dtypes(folder, arch)
    num_bytes = sum(spec.num_bytes for spec in folders.hf_specs(arch, dtypes).values())
    folders.check_space(megatron, 2 * num_bytes)
    with progress_bar("to Megatron", num_bytes) as advance:
        folders.hf_to_megatron(folder, arch, megatron, dtype=None, max_file_bytes=4 * GB, advance=advance)
    stored = MegatronFolder(megatron)
    padded = stored_architecture(arch, stored)
    with progress_bar("to Hugging Face", num_bytes) as advance:
        folders.megatron_to_hf(
            iter_stored_as_hf(padded, stored),
            padded,
            back,
            dtypes=stored_hf_dtypes(padded, stored),
            like=model,
            max_shard_bytes=5 * GB,
            advance=advance,
        )
    again = HFFolder(back)
    count = folders.compare(folder.get, dtypes, ((name, again.get(name)) for name in again.names()), lambda _: None)
    _report(f"folders, heads for tp={tp}", f"{count} tensors bit-exact")


def _on_ranks(model: Path, folder: Path, layout: tuple[int, int, int]) -> int:
    """The number of tensors, equal on rank 0 to the model's after a trip through all ranks."""
    import torch.multiprocessing as mp

    tp, pp, ep = layout
    world_size = tp * pp * ep
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(  # type: ignore[no-untyped-call]
            _rank, args=(world_size, f"{meeting}/rendezvous", model, folder, layout), nprocs=world_size
        )
        return int((Path(meeting) / "rendezvous.count").read_text(encoding="utf-8"))


def _rank(rank: int, world_size: int, meeting: str, model: Path, folder: Path, layout: tuple[int, int, int]) -> None:
    import torch
    import torch.distributed as dist

    from aer_megatron.actor.conversion_check import build_gpt, load_distributed
    from aer_megatron.actor.weights import iter_hf_weights
    from aer_megatron.convert import folders
    from aer_megatron.parallel.platform import install_platform
    from aer_megatron.parallel.topology import destroy_topology, initialize_topology

    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    install_platform()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    tp, pp, ep = layout
    topology = initialize_topology(tp=tp, pp=pp, ep=ep, seed=0)
    source, arch = folders.checked_hf_folder(model, tp)
    gpt = build_gpt(arch, topology)
    load_distributed(gpt, folder)
    stream = iter_hf_weights(gpt, arch, topology, bucket_bytes=BUCKET_BYTES)
    if rank == 0:
        # fp32 holds every stored dtype exactly
        dtypes = dict.fromkeys(folders.hf_dtypes(source, arch), torch.float32)
        count = folders.compare(source.get, dtypes, stream, lambda _: None)
        Path(f"{meeting}.count").write_text(str(count), encoding="utf-8")
    else:
        for _ in stream:
            pass
    dist.barrier()
    destroy_topology()


def _layout(text: str) -> tuple[int, int, int]:
    sizes = [int(part) for part in text.split("x")] if text.replace("x", "").isdigit() else []
    if len(sizes) not in (2, 3):
        raise ValueError(f"--layouts: {text!r} must look like TPxPP or TPxPPxEP, such as 2x1")
    return sizes[0], sizes[1], sizes[2] if len(sizes) == 3 else 1


def _report(what: str, text: str) -> None:
    print(f"{what:24s} {text}", flush=True)


if __name__ == "__main__":
    main()
