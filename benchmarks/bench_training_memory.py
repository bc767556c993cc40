"""Peak memory of one policy update of the actor, by form of the head: textbook, given logits, fused.

Run from the repository's root; writes training_memory.md into --out:
    python -m benchmarks.bench_training_memory

One rank, fp32, a two-layer Qwen3 with SmolLM2's width and vocabulary (576, 49,152) and one micro-batch of --sequences
x --length tokens. Peaks are sums of live tensor storages above what exists before the update (weights, gradient
buffers, optimizer state), so activations and the head's temporaries count and nothing else does. `textbook` is
log_softmax through autograd on the same logits. The three losses are printed too: they are the same numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from aer_megatron.actor.actor import Actor
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.random_weights import random_hf_weights
from aer_megatron.parallel.platform import install_platform
from aer_megatron.parallel.topology import initialize_topology
from tests.support.policies import policy_config
from tests.support.spawn import run_distributed
from tests.support.storage_tracker import StorageTracker
from tests.support.updates import live_tensors, textbook, uniform_batch

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 576, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
FORMS = ("textbook", "logits", "fused")


def measure(rank: int, world_size: int, form: str, sequences: int, length: int) -> dict[str, float]:
    """Returns the peak in bytes and the losses of one update."""
    install_platform()
    config = policy_config(
        model={"head": "fused" if form == "fused" else "logits"},
        parallel={"micro_batch_size": sequences},
        optimizer={"lr": 1e-6},
    )
    topology = initialize_topology(tp=1, pp=1, seed=0)
    arch = architecture_from_hf_config(HF_CONFIG)
    actor = Actor(arch, config, topology, device=torch.device("cpu"), optimizer=config.optimizer, num_updates_planned=2)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(HF_CONFIG), encoding="utf-8")
        actor.load_hf_weights(random_hf_weights(folder, 0))
    given = uniform_batch(sequences, length, vocab_size=HF_CONFIG["vocab_size"], old_logprob=-10.8)
    patch = mock.patch("aer_megatron.actor.model.vocab_parallel_logprob_entropy", textbook)
    with patch if form == "textbook" else mock.MagicMock():
        actor.train(given, seed=0, entropy_gradient=True)  # makes the optimizer's state
        with StorageTracker(*live_tensors()) as tracker:
            stats = actor.train(given, seed=0, entropy_gradient=True)
    return {
        "peak_bytes": float(tracker.peak_bytes),
        "policy_loss": stats.mean("policy_loss"),
        "token_entropy": stats.mean("token_entropy"),
        "grad_norm": stats.grad_norm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = {
        form: run_distributed(measure, 1, form, options.sequences, options.length, timeout_s=600)[0] for form in FORMS
    }
    logits_bytes = 4.0 * options.sequences * (options.length - options.length // 4) * int(HF_CONFIG["vocab_size"])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    lines = [
        "# Peak memory of one policy update, by form of the head",
        "",
        f"- command: `python -m benchmarks.bench_training_memory --sequences {options.sequences} "
        f"--length {options.length}`",
        f"- commit: `{commit.stdout.strip()}`; torch `{torch.__version__}`; fp32, one rank",
        f"- U: the response rows' logits, {logits_bytes / 1e6:.0f} MB; the peak is what the update adds to weights, "
        "gradient buffers and optimizer state",
        "",
        "| head | peak, MB | peak, U | textbook / this | policy loss | token entropy | gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for form, row in rows.items():
        ratio = rows["textbook"]["peak_bytes"] / row["peak_bytes"]
        lines.append(
            f"| {form} | {row['peak_bytes'] / 1e6:.0f} | {row['peak_bytes'] / logits_bytes:.2f} | {ratio:.1f} | "
            f"{row['policy_loss']:+.6f} | {row['token_entropy']:.6f} | {row['grad_norm']:.6f} |"
        )
    text = "\n".join(lines) + "\n"
    (options.out / "training_memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
