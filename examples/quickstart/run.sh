#!/usr/bin/env bash
# Warm start (cached by the hash of its configuration), then GRPO + AER with TP=2 on two cores.
# Extra arguments go to the RL stage: bash examples/quickstart/run.sh --algo.entropy.kind=none --run.output_dir=runs/none
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON_BIN:-.venv/bin/python}
export OMP_NUM_THREADS=1 # one thread per rank: more of them spin for minutes on two cores
export HF_HUB_OFFLINE=1
run="examples/quickstart/countdown.toml"

launch() {
    "$python" -m aer_megatron.cli launch --nproc 2 "$run" "$@"
}

echo "quickstart: two stages, 5 to 8 minutes on two quiet cores; Ctrl-C saves, and the same command goes on"
echo "quickstart: warm start (skipped when its result is there)"
launch --stage=sft --parallel.tp=1
echo "quickstart: GRPO + AER, two tensor-parallel ranks"
launch "$@"
case " $* " in
    *" --dry-run "*) ;;
    *) "$python" examples/quickstart/summary.py "$run" "$@" ;;
esac
