"""What a stand-in for a server does with weights: reads them, joins them as the server does, and hashes them."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

# what the real server's unpickler lets pass, as far as the trainer writes it
ALLOWED_GLOBALS = frozenset(
    {
        ("builtins", "dict"),
        ("collections", "OrderedDict"),
        ("types", "SimpleNamespace"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("torch", "float32"),
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


def served_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """The parameters of a dense model as the server holds them, by its own names (NumPy: the double starts at once)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"no safetensors in {folder}")
    return joined({name: tensor for file in files for name, tensor in load_file(file).items()})


def joined(hf: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The served parameters that can be made of Hugging Face tensors."""
    served: dict[str, NDArray[Any]] = {}
    for name in list(hf):
        if name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            continue
        tensor = hf[name]
        if any(other not in hf for other in _neighbours(name)):
            continue
        if name.endswith("q_proj.weight"):
            tensor = np.concatenate([tensor, *(hf[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))])
            name = name.replace("q_proj", "qkv_proj")
        elif name.endswith("gate_proj.weight"):
            tensor = np.concatenate([tensor, hf[name.replace("gate_proj", "up_proj")]])
            name = name.replace("gate_proj", "gate_up_proj")
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
    if name.endswith("q_proj.weight"):
        return [name.replace("q_proj", other) for other in ("k_proj", "v_proj")]
    return [name.replace("gate_proj", "up_proj")] if name.endswith("gate_proj.weight") else []


def join_group(body: dict[str, Any]) -> Any:
    """Joins under the names that SGLang's torch uses; by hand, because the trainer may be in the same process."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

    name, wait = body["group_name"], timedelta(seconds=20)
    address, port = body["master_address"], body["master_port"]
    store: Store = TCPStore(address, port, body["world_size"], is_master=False, timeout=wait)
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
