"""``aer convert check``: a model through all conversions and layouts and back, bit for bit, and its logits."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aer_megatron.actor.weights import iter_hf_weights
from aer_megatron.console.standard_streams import say
from aer_megatron.conversion.checkpoint import open_checkpoint
from aer_megatron.conversion.logits import build_gpt, load_distributed
from aer_megatron.conversion.progress import progress_bar
from aer_megatron.conversion.verify import verify_logits
from aer_megatron.convert import folders
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.hf_writer import MAX_SHARD_BYTES
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.convert.safetensors_writer import total_bytes
from aer_megatron.parallel.platform import install_platform
from aer_megatron.parallel.topology import destroy_topology, initialize_topology

_BUCKET_BYTES = 256 * 10**6
_MAX_FILE_BYTES = 4 * 10**9


def check_round_trip(model: Path, layouts: Sequence[str], parent: Path | None) -> None:
    """Says one line per check; the copies lie in a temporary folder of ``parent``.

    Raises ValueError for a layout that is none or does not fit; RuntimeError naming the first tensor that differs.
    """
    sizes = [_layout(text) for text in layouts]
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        scratch = Path(folder)
        # a checkpoint for every number of padded heads
        _, whole = folders.checked_hf_folder(model, 1)
        for tp in sorted({1, *(tp for tp, _, _ in sizes)}):
            _, arch = folders.checked_hf_folder(model, tp)
            if tp > 1 and arch == whole:
                continue  # the checkpoint of one rank serves this size as well
            _there_and_back(model, scratch, tp)
        for tp, pp, ep in sizes:
            padded = scratch / f"megatron-tp{tp}"
            started = time.monotonic()
            count = _on_ranks(model, padded if padded.is_dir() else scratch / "megatron-tp1", (tp, pp, ep))
            seconds = time.monotonic() - started
            _report(f"{tp}x{pp}x{ep}", f"{count} tensors bit-exact through GPTModel, {seconds:.0f} s")


def _there_and_back(model: Path, scratch: Path, tp: int) -> None:
    """Makes the distributed checkpoint of ``model`` with heads for ``tp`` and compares its bits and its logits."""
    megatron, back = scratch / f"megatron-tp{tp}", scratch / f"hf-tp{tp}"
    folder, arch = folders.checked_hf_folder(model, tp)
    dtypes = folders.hf_dtypes(folder, arch)
    num_bytes = total_bytes(hf_specs(arch, dtypes))
    folders.check_space(megatron, 2 * num_bytes)
    with progress_bar("to Megatron", num_bytes) as advance:
        folders.hf_to_megatron(folder, arch, megatron, dtype=None, max_file_bytes=_MAX_FILE_BYTES, advance=advance)
    stored = open_checkpoint(megatron, megatron)
    with progress_bar("to Hugging Face", num_bytes) as advance:
        folders.megatron_to_hf(
            stored.tensors(),
            stored.arch,
            back,
            dtypes=stored.dtypes,
            like=model,
            max_shard_bytes=MAX_SHARD_BYTES,
            advance=advance,
        )
    again = HFFolder(back)
    count = folders.compare(folder.get, dtypes, ((name, again.get(name)) for name in again.names()), lambda _: None)
    _report(f"folders, heads for tp={tp}", f"{count} tensors bit-exact")
    _report("1x1", verify_logits(model, arch, lambda gpt, _: load_distributed(gpt, megatron)))


def _on_ranks(model: Path, folder: Path, layout: tuple[int, int, int]) -> int:
    """The number of tensors, equal on rank 0 to the model's after a trip through all ranks."""
    tp, pp, ep = layout
    world_size = tp * pp * ep
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(  # type: ignore[no-untyped-call]
            _rank, args=(world_size, f"{meeting}/rendezvous", model, folder, layout), nprocs=world_size
        )
        return int((Path(meeting) / "rendezvous.count").read_text(encoding="utf-8"))


def _rank(rank: int, world_size: int, meeting: str, model: Path, folder: Path, layout: tuple[int, int, int]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    install_platform()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    tp, pp, ep = layout
    topology = initialize_topology(tp=tp, pp=pp, ep=ep, seed=0)
    source, arch = folders.checked_hf_folder(model, tp)
    gpt = build_gpt(arch, topology)
    load_distributed(gpt, folder)
    stream = iter_hf_weights(gpt, arch, topology, bucket_bytes=_BUCKET_BYTES)
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
    say(f"{what:24s} {text}")
