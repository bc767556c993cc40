"""What --verify reads back: every bit of the converted model, and the logits of a fixed prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from aer_megatron.conversion import logits
from aer_megatron.conversion.checkpoint import Checkpoint
from aer_megatron.conversion.progress import progress_bar
from aer_megatron.convert import folders
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.convert.megatron_folder import MegatronFolder
from aer_megatron.convert.safetensors_writer import total_bytes
from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes
from aer_megatron.parallel.platform import install_platform
from aer_megatron.parallel.topology import Topology

_GB = 10**9
LOGITS_TOLERANCE = 1e-5  # of the largest logit; fp32 rounding in two implementations usually stays below 4e-6
ROUNDING_TOLERANCE = 2.0  # of transformers' own fp32 rounding, where that is larger


def verify_megatron_folder(model: HFFolder, arch: ModelArchitecture, output: Path) -> Iterator[str]:
    """Yields a line per check of the distributed checkpoint ``output`` made of ``model``; RuntimeError if one fails."""
    stored = MegatronFolder(output)
    padded = stored_architecture(arch, stored)
    dtypes = stored_hf_dtypes(padded, stored)
    with progress_bar("verifying", total_bytes(hf_specs(padded, dtypes))) as advance:
        count = folders.compare(model.get, dtypes, iter_stored_as_hf(padded, stored), advance)
    yield f"verified: {count} tensors, names, shapes and bits"
    if dtypes != folders.hf_dtypes(model, arch):
        yield "logits not compared: --dtype changed the numbers"
        return
    yield verify_logits(model.path, padded, lambda gpt, _: logits.load_distributed(gpt, output))


def verify_hf_folder(source: Checkpoint, output: Path) -> Iterator[str]:
    """Yields a line per check of the Hugging Face folder ``output`` made of ``source``; RuntimeError if one fails."""
    written, _ = folders.checked_hf_folder(output, 1)
    dtypes = folders.hf_dtypes(written, source.arch)
    converted = ((name, tensor.to(dtypes[name])) for name, tensor in source.tensors())
    with progress_bar("verifying", total_bytes(hf_specs(source.arch, dtypes))) as advance:
        count = folders.compare(written.get, dtypes, converted, advance)
    yield f"verified: {count} tensors, names, shapes and bits"
    if dtypes != source.dtypes:
        yield "logits not compared: --dtype changed the numbers"
        return
    from_hf = logits.load_from_hf(source.arch, written.get)
    from_checkpoint = lambda gpt, _: logits.load_distributed(gpt, source.path)  # noqa: E731
    yield verify_logits(output, source.arch, from_checkpoint if source.is_distributed else from_hf)


def verify_logits(hf_folder: Path, arch: ModelArchitecture, load: Callable[[GPTModel, Topology], None]) -> str:
    """Returns a line about the logits of a fixed prompt in Megatron-Core and in transformers.

    Raises RuntimeError where they differ by more than fp32 rounding. Some models (Qwen2.5: key biases of some 200)
    amplify rounding a thousandfold, so beyond a small tolerance transformers in fp64 is the judge. A model that does
    not fit into memory is not compared, and the line says so.
    """
    from transformers.utils.logging import disable_progress_bar

    # without room for it the kernel would end the process
    needed, available = 1.3 * total_bytes(hf_specs(arch, torch.float32)), _available_memory()
    if needed > available:
        sizes = f"fp32 needs {needed / _GB:.1f} GB of memory, {available / _GB:.1f} GB are available"
        return f"logits not compared: {sizes}"
    warnings.simplefilter("ignore")
    disable_progress_bar()
    prompts = [logits.fixed_prompt(arch.vocab_size)]
    # both implementations in fp32
    expected = logits.transformers_logits(hf_folder, prompts)
    install_platform()
    found = logits.megatron_logits(arch, prompts, load)
    apart = logits.logits_difference(expected, found)
    text = (
        f"logits of {apart.num_positions} tokens, fp32: largest difference from transformers {apart.max_abs:.1e} "
        f"(largest logit {apart.largest:.3g}), most likely token differs at {apart.num_other_argmax} positions"
    )
    if not apart.num_other_argmax and apart.max_abs <= LOGITS_TOLERANCE * max(1.0, apart.largest):
        return text
    # fp64 tells rounding from other mathematics
    if 2 * needed > _available_memory():
        raise RuntimeError(
            f"verification failed: {text}; fp64, which would tell rounding, needs {2 * needed / _GB:.1f} GB"
        )
    exact = logits.transformers_logits(hf_folder, prompts, dtype=torch.float64)
    theirs, ours = logits.logits_difference(exact, expected), logits.logits_difference(exact, found)
    text += f"; from transformers in fp64: {ours.max_abs:.1e}, transformers in fp32: {theirs.max_abs:.1e}"
    if ours.num_other_argmax > theirs.num_other_argmax or ours.max_abs > ROUNDING_TOLERANCE * theirs.max_abs:
        raise RuntimeError(f"verification failed: {text}")
    return text


def _available_memory() -> float:
    """Returns bytes, infinity where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
