"""Runs with FP8 rollouts from the command line: the embedded engine's mismatch is seen, launched servers get FP8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.double_runs import double_python
from tests.support.runs import MODEL, metric_lines, train, write_run_file

OPTIONS = ["--run.num_steps=2", "--eval.sets={}", "--run.checkpoint_every=0", '--report.sinks=["console"]']
FP8 = ["--rollout.quantization=fp8", "--rollout.logprob_gate=0"]


def base_model(folder: Path, dtype: torch.dtype, **sizes: int) -> Path:
    """Returns a folder with the quick start's model, changed, and random weights whose rounding shows."""
    shutil.copytree(MODEL, folder)
    table = json.loads((folder / "config.json").read_text()) | {"initializer_range": 0.1} | sizes
    (folder / "config.json").write_text(json.dumps(table))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fp8_rollouts")
    base_model(made / "base", torch.float32)
    write_run_file(made)
    return made


def test_the_embedded_engine_s_rounding_shows_in_the_metrics(folder: Path) -> None:
    """Without the option the run file's gate of 1e-3 would stop a difference of this size."""
    result = train(folder / "run.toml", *OPTIONS, *FP8)
    assert result.returncode == 0, result.stderr
    for line in metric_lines(folder / "out"):
        assert 1e-3 < line["rollout/logprob_diff_mean"] < 0.1
        assert 0 < line["rollout/mismatch_kl"] < 0.1
        assert 0.5 < line["rollout/sample_size"] < 1
        assert line["train/importance_sample_size"] < 1


def test_a_gate_on_the_difference_is_refused_before_anything_runs(folder: Path) -> None:
    result = train(folder / "run.toml", "--rollout.quantization=fp8", f"--run.output_dir={folder / 'none'}")
    assert result.returncode == 2
    assert "set rollout.logprob_gate=0" in result.stderr and not (folder / "none").exists()


def test_launched_servers_start_from_fp8_and_are_given_fp8(folder: Path) -> None:
    """Doubles, which report what they hold as real servers do; the model has whole blocks."""
    output = folder / "served"
    base = base_model(
        folder / "whole", torch.bfloat16, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=2
    )
    servers = ["--rollout.engine=sglang", f"--sglang.python={double_python(folder)}", "--sglang.num_servers=1"]
    places = [f"--model.path={base}", "--model.dtype=bf16", f"--run.output_dir={output}"]
    result = train(folder / "run.toml", *OPTIONS, *FP8, *servers, *places)
    assert result.returncode == 0, result.stderr
    assert "does not take weights" not in result.stderr
    assert len(metric_lines(output)) == 2
    log = (output / "sglang" / "server-0.log").read_text()
    assert f"--model-path {output / 'fp8_model'} " in log and "--dtype bfloat16" in log
    with safe_open(output / "fp8_model" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.up_proj.weight_scale_inv" in file.keys()  # noqa: SIM118
