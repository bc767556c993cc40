"""A server that only takes weights, into memory that it has already, as SGLang does; for bench_weight_sync.

python -m benchmarks.weight_receiver --model-path FOLDER --host HOST --port PORT
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from numpy.typing import NDArray
from safetensors import safe_open

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import hf_names
from aer_megatron.sglang.served_weights import ServedChecksums
from tests.support.sglang_double import SGLangDouble


class WeightReceiver(SGLangDouble):
    """Holds Hugging Face tensors; the checksums of what a server would make of them are computed when asked for."""

    def __init__(self, model_path: Path, *, host: str, port: int) -> None:
        super().__init__(model_path, host=host, port=port, without_weights=True)
        self._arch = architecture_from_hf_config(json.loads((model_path / "config.json").read_text()))
        self._buffer = np.ones(0, np.uint8)
        self.held: dict[str, NDArray[Any]] = {
            name: np.ones(shape, np.float32) for name, shape in hf_names(self._arch).items()
        }

    def buffer(self, size: int) -> NDArray[Any]:
        if len(self._buffer) < size:
            self._buffer = np.ones(size, np.uint8)
        return self._buffer[:size]

    def _load_received(self, body: dict[str, Any]) -> web.Response:
        for name, array in self.received.items():
            np.copyto(self.held[name], array)
        self.received.clear()
        self.weight_version = body["weight_version"]
        return web.json_response({"success": True, "message": ""})

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        for file in Path(body["model_path"]).glob("*.safetensors"):
            with safe_open(file, "np") as tensors:  # mapped, not read: one copy, into the weights
                for name in tensors.keys():  # noqa: SIM118
                    np.copyto(self.held[name], tensors.get_tensor(name))
        self.weight_version = body["weight_version"]
        return web.json_response({"success": True, "message": ""})

    async def _checksums(self, request: web.Request) -> web.Response:
        digest = ServedChecksums(self._arch, tp_size=1)
        for name, array in self.held.items():
            digest.add(name, torch.from_numpy(array))
        info = [{"role": "target", "tp_rank": 0, "tp_size": 1}]
        ranks = [{"checksums": digest.result()[0], "parallelism_info": info}]
        return web.json_response({"success": True, "message": "", "ranks": ranks})


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    torch.set_num_threads(1)
    with WeightReceiver(**vars(parser.parse_args())):
        threading.Event().wait()


if __name__ == "__main__":
    main()
