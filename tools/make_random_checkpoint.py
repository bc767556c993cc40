"""Writes a Hugging Face folder of random weights in a model's true shapes, for measuring; it generates nonsense.

    python tools/make_random_checkpoint.py qwen3-8b OUTPUT [--seed 0] [--max-shard-gb 5]

Sizes: qwen3-0.6b, qwen3-4b, qwen3-8b, or the path of any config.json that docs/checkpoints.md lists as supported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aer_megatron.console.failures import run_command
from aer_megatron.conversion.progress import progress_bar
from aer_megatron.convert.folders import check_space
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_writer import config_with_dtype, write_hf_folder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.convert.safetensors_writer import total_bytes

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151936,
}
SIZES = {
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": _QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", help=f"{', '.join(SIZES)}, or the path of a config.json")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default %(default)s")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of one output file; default %(default)s")
    options = parser.parse_args()
    sys.exit(run_command(lambda edge: make(options)))


def make(options: argparse.Namespace) -> int:
    if options.size not in SIZES and not Path(options.size).is_file():
        raise ValueError(f"{options.size!r} is neither one of {', '.join(SIZES)} nor a config.json")
    config = SIZES.get(options.size) or json.loads(Path(options.size).read_text(encoding="utf-8"))
    dtype = getattr(torch, options.dtype)
    arch = architecture_from_hf_config(config)
    specs = hf_specs(arch, dtype)
    num_bytes = total_bytes(specs)
    check_space(options.output, num_bytes)
    generator = torch.Generator().manual_seed(options.seed)
    # one block of normal numbers, read from another place for every tensor: drawing 8 billion would take minutes
    block = (
        torch.empty((1 << 24) + 1).normal_(0.0, config.get("initializer_range", 0.02), generator=generator).to(dtype)
    )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, spec in specs.items():
            start = int(torch.randint(len(block), (), generator=generator))
            size = torch.Size(spec.shape).numel()
            values = block.roll(start).repeat(-(-size // len(block)))[:size].view(spec.shape)
            yield name, 1.0 + values if name.endswith("norm.weight") else values

    with progress_bar("writing", num_bytes) as advance:
        write_hf_folder(
            options.output,
            tensors(),
            specs,
            config=config_with_dtype(config, dtype),
            like=None,
            max_shard_bytes=int(options.max_shard_gb * 10**9),
            advance=advance,
        )
    print(options.output)
    return 0


if __name__ == "__main__":
    main()
