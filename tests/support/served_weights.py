"""What a stand-in for a server does with weights: reads them, joins them as the server does, and hashes them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# what the real server's unpickler lets pass, as far as the trainer writes it
ALLOWED_GLOBALS = frozenset(
    {
        ("builtins", "dict"),
        ("collections", "OrderedDict"),
        ("types", "SimpleNamespace"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("torch", "float32"),
        ("torch", "float8_e4m3fn"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
)


class AllowListed(pickle.Unpickler):
    """Reads what the real server reads: plain tensors in containers, and no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            import torch

            return lambda raw: torch.load(io.BytesIO(raw), weights_only=True)
        if (module, name) not in ALLOWED_GLOBALS:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return super().find_class(module, name)


# by the spellings of safetensors and of requests: bf16 and FP8 values as the bits that they are
NUMPY_DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8} | {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
}
_JOINED_PARTS = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
_JOINED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_WEIGHTS = (".weight", ".weight_scale_inv")


def served_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """The parameters of a dense model as the server holds them, by its own names (NumPy: the double starts at once)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"no safetensors in {folder}")
    return joined({name: tensor for file in files for name, tensor in read_safetensors(file).items()})


def read_safetensors(file: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file; what NumPy has no dtype for comes as ``NUMPY_DTYPES`` says. KeyError for another dtype."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    table.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], np.uint8)
        .view(NUMPY_DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in table.items()
    }


def joined(hf: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The served parameters that can be made of Hugging Face tensors."""
    served: dict[str, NDArray[Any]] = {}
    for name in list(hf):
        if _part(name) in ("k_proj", "v_proj", "up_proj"):
            continue
        tensor = hf[name]
        neighbours = _neighbours(name)
        if any(other not in hf for other in neighbours):
            continue
        if neighbours:
            tensor = np.concatenate([tensor, *(hf[other] for other in neighbours)])
            name = name.replace(_part(name), _JOINED_NAMES[_part(name)])
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padded = np.zeros((math.ceil(len(tensor) / 64) * 64, tensor.shape[1]), dtype=tensor.dtype)
            padded[: len(tensor)] = tensor
            tensor = padded
        served[name] = tensor
    return served


def incomplete(hf: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The Hugging Face tensors that still wait for those they are joined with."""

    def is_waiting(name: str) -> bool:
        first = re.sub(r"\b[kv]_proj\b", "q_proj", re.sub(r"\bup_proj\b", "gate_proj", name))
        return any(part not in hf for part in (first, *_neighbours(first)))

    return {name: array for name, array in hf.items() if is_waiting(name)}


def _neighbours(name: str) -> list[str]:
    part = _part(name)
    return [name.replace(part, other) for other in _JOINED_PARTS.get(part, ())]


def _part(name: str) -> str:
    """The projection whose weight or scales a tensor is, or ""."""
    return name.split(".")[-2] if name.endswith(_WEIGHTS) and name.count(".") else ""


def join_store(body: dict[str, Any]) -> Any:
    """Connects to the trainer's store, as the first step into a group."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = body["master_address"], body["master_port"]
    return TCPStore(address, port, body["world_size"], is_master=False, timeout=timedelta(seconds=20))


def join_group(body: dict[str, Any]) -> Any:
    """Joins under the names that SGLang's torch uses; by hand, because the trainer may be in the same process."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, ProcessGroupGloo, Store

    name, wait = body["group_name"], timedelta(seconds=20)
    store: Store = join_store(body)
    for prefix in (name, f"{name}/", "cpu/"):
        store = PrefixStore(prefix, store)
    return ProcessGroupGloo(store, body["rank_offset"], body["world_size"], wait)


def receive(group: Any, buffer: NDArray[Any]) -> NDArray[Any]:
    import torch

    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([torch.from_numpy(buffer)], options).wait()
    return buffer


def served_checksum(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()[:16]


def reported_checksums(served: dict[str, NDArray[Any]], skipped_words: list[str]) -> dict[str, str]:
    """What /weights_checker reports: of weights in blocks of FP8 their values in bf16, whatever is to be skipped."""
    checksums = {}
    for name, array in served.items():
        scales = served.get(f"{name}_scale_inv")
        if scales is not None:
            checksums[name] = served_checksum(_dequantized(array, scales))
        elif not name.endswith("_scale_inv") and not any(word in name for word in skipped_words):
            checksums[name] = served_checksum(array)
    return checksums


def _dequantized(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    """The bits of bf16(FP8 value * scale), by a server's rule for the block size: columns / columns of scales."""
    block = values.shape[1] // scales.shape[1]
    assert block * scales.shape[1] == values.shape[1]
    repeated = scales.repeat(block, axis=0).repeat(block, axis=1)[: len(values)]
    exact = _decoded_e4m3()[values] * repeated
    assert exact.dtype == np.float32
    bits = exact.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even


def _decoded_e4m3() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return np.where(code & 0x7F == 0x7F, np.nan, np.where(code & 0x80, -magnitude, magnitude)).astype(np.float32)
