"""Makes the FP8 checkpoint from which SGLang servers of ``rollout.quantization = "fp8"`` are started.

    python tools/convert_hf_to_fp8.py MODEL OUTPUT [--dtype bfloat16]

Projections become float8_e4m3fn with one scale per block of 128 x 128; the rest stays in --dtype, which is the run's
model.dtype. A run that launches its servers (sglang.num_servers) does this itself; those of sglang.urls need it.
Tensors are read and written one at a time. OUTPUT appears when it is complete and flushed, or not at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversion_cli import GB, plain_errors, progress_bar, torch_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of the unquantised model")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is not FP8; default %(default)s"
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of one output file; default %(default)s")
    options = parser.parse_args()
    with plain_errors("convert_hf_to_fp8"):
        convert(options)
        print(options.output)


def convert(options: argparse.Namespace) -> None:
    from aer_megatron.convert.folders import HFConfig, check_space
    from aer_megatron.convert.fp8_folder import fp8_bytes, write_fp8_folder
    from aer_megatron.convert.hf_config import architecture_from_hf_config

    dtype = torch_dtype(options.dtype)
    num_bytes = fp8_bytes(architecture_from_hf_config(HFConfig(options.model).table), dtype)
    check_space(options.output, num_bytes)
    with progress_bar("quantise", num_bytes) as advance:
        write_fp8_folder(
            options.model,
            options.output,
            dtype=dtype,
            max_shard_bytes=int(options.max_shard_gb * GB),
            advance=advance,
        )


if __name__ == "__main__":
    main()
