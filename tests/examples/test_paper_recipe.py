"""The paper's recipe in small: a dry run that counts what it evaluates on each benchmark, and a rehearsal."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.runs import ROOT, metric_lines, train
from tests.support.tiny_models import tiny_model

DATA = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "examples" / "paper" / "qwen3-4b-base.toml"
SETS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500}

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the project"),
    pytest.mark.processes,
    pytest.mark.integration,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3 of two layers and a tokenizer of bytes with a chat template."""
    folder = tmp_path_factory.mktemp("paper") / "model"
    vocabulary = {text: index for index, text in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    whole.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shape = {"vocab_size": len(vocabulary), "max_position_embeddings": 32_768, "eos_token_id": 0}
    tiny_model("qwen3", **shape).save_pretrained(folder)
    whole.save_pretrained(folder)
    return folder


def options(model: Path, output: Path) -> list[str]:
    """Returns what the recipe is given here: a model and data of this machine, one rank, generation in it."""
    return [
        f"--model.path={model}",
        f"--run.output_dir={output}",
        f"--data.train.path={DATA}/dapo_math_17k_dedup.jsonl",
        *(f"--eval.sets.{name}.source.path={DATA}/{name}.jsonl" for name in SETS),
        "--parallel.tp=1",
        "--parallel.sequence_parallel=false",
        "--parallel.tokens_per_micro_batch=0",
        "--data.max_prompt_tokens=6000",  # bytes
        "--rollout.engine=embedded",
    ]


def test_the_dry_run_counts_the_four_benchmarks(model: Path, tmp_path: Path) -> None:
    done = train(RECIPE, "--dry-run", *options(model, tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    for name, num_prompts in SETS.items():
        num_samples = 4 if name == "math500" else 16
        assert (
            f"{name}: {num_prompts} prompts x {num_samples} = {num_prompts * num_samples} sequences of <= 8,192 tokens "
            "at temperature 1, 17 times" in done.stdout
        )


def test_a_rehearsal_reports_every_benchmark_by_itself(model: Path, tmp_path: Path) -> None:
    small = [
        "--run.num_steps=1",
        "--run.checkpoint_every=0",
        "--rollout.prompts_per_step=4",
        "--rollout.group_size=2",
        "--rollout.max_new_tokens=6",
        "--algo.num_minibatches=1",
        "--model.dtype=fp32",
        *(f"--eval.sets.{name}.num_prompts=3" for name in SETS),
        "--report.picture=false",
        '--report.sinks=["console"]',
    ]
    done = train(RECIPE, *options(model, tmp_path / "out"), *small)
    assert done.returncode == 0, done.stderr
    first, last = metric_lines(tmp_path / "out")
    for line in (first, last):
        for name in SETS:
            num_samples, largest = (4, 4) if name == "math500" else (16, 16)
            found = {key.removeprefix(f"eval/{name}/") for key in line if key.startswith(f"eval/{name}/")}
            assert {"pass@1", f"pass@{largest}", f"pass@{largest}_low", f"pass@{largest}_high"} <= found
            assert {f"avg@{num_samples}", f"maj@{largest}", "response_length_mean", "truncated"} <= found
            assert "maj@1" not in found
    assert "reward/mean" in first and "reward/mean" not in last
