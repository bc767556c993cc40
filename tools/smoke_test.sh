#!/usr/bin/env bash
# Ten supervised steps, then two AER steps on two tensor-parallel ranks, on the CPU: does this installation train?
# Usage: smoke_test.sh [PYTHON]; writes to a temporary folder and removes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=""

train() {
    "$python" -m aer_megatron.cli launch --nproc 2 \
        examples/quickstart/countdown.toml "--model.path=$work/base" "--run.output_dir=$work/run" \
        --sft.num_steps=10 --run.num_steps=2 --eval.sets={} '--report.sinks=["tensorboard"]' "$@"
}
train --stage=sft --parallel.tp=1
train
"$python" - "$work/run/metrics.jsonl" <<'CHECK'
import json
import sys

lines = [json.loads(line) for line in open(sys.argv[1])]
assert [line["step"] for line in lines] == [0, 1], lines
difference = max(line["rollout/logprob_diff_max"] for line in lines)
assert difference < 1e-3, difference
print(f"smoke test: two steps, H {lines[-1]['entropy/token_mean']:.3f} nats, largest rollout/train difference {difference:.1e}")
CHECK
