#!/usr/bin/env bash
# Everything that has to be seen on a device, in one run and one report: on a machine with one or more H100s
#   bash tools/gpu_acceptance.sh [--dry-run] [--out FOLDER]
#
# Runs the tests with the marker gpu; the entropy head against its peers; policy updates in bf16 and FP8 (time, MFU, memory against
# the plan); FP8 against bf16 in entropy and gradients; a run with SGLang servers (time of a step, weight transfer), if SGLANG_PYTHON is
# set. A part that fails does not stop the others; the report says which. --dry-run lists the commands and runs nothing.
#
# Environment (defaults in brackets): PYTHON_BIN [python], SGLANG_PYTHON [none], GPU [h100: whose data sheet], PART_TIMEOUT_S [3600]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/gpu_acceptance
dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry_run=1 ;;
    --out)
        [ $# -ge 2 ] || { echo "gpu_acceptance: --out needs a folder" >&2; exit 2; }
        out=$2
        shift
        ;;
    *)
        echo "gpu_acceptance: $1 is not an option; use --dry-run or --out FOLDER" >&2
        exit 2
        ;;
    esac
    shift
done
python=${PYTHON_BIN:-python}
gpu=${GPU:-h100}
failed=0
update=(-m benchmarks.bench_gpu update --gpu "$gpu" --sequences 16 --length 4096)
small=(--config examples/plan/qwen3-4b-base/config.json --layers 12)
large=(--config examples/plan/qwen3-8b-base/config.json --layers 8)

part() { # NAME COMMAND...: runs it, its output in NAME.log
    local name=$1 began code=0
    shift
    if [ -n "$dry_run" ]; then
        echo "$name: $*"
        return
    fi
    began=$SECONDS
    echo "gpu_acceptance: $name"
    timeout --kill-after=30 "${PART_TIMEOUT_S:-3600}" "$@" >"$out/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "$name $code $((SECONDS - began))" >>"$out/parts.txt"
}

if [ -z "$dry_run" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu_acceptance: torch sees no CUDA device; --dry-run lists what would run" >&2
        exit 2
    }
    mkdir -p "$out"
    rm -f "$out"/*.json "$out"/*.log "$out/parts.txt"
    nvidia-smi >"$out/nvidia-smi.txt"
    "$python" -m pip freeze >"$out/packages.txt"
fi

part tests "$python" -m pytest -q -m gpu
part head "$python" -m benchmarks.bench_gpu head --out "$out/head.json"
part update-bf16-4b "$python" "${update[@]}" "${small[@]}" --out "$out/update-bf16-4b.json"
part update-bf16-8b "$python" "${update[@]}" "${large[@]}" --out "$out/update-bf16-8b.json"
part update-recompute-8b "$python" "${update[@]}" "${large[@]}" --micro-batch 4 --out "$out/update-recompute-8b.json" \
    --set megatron.recompute_granularity=full --set megatron.recompute_method=uniform --set megatron.recompute_num_layers=1
for recipe in delayed tensorwise blockwise; do
    part "update-fp8-$recipe" "$python" "${update[@]}" "${large[@]}" --out "$out/update-fp8-$recipe.json" \
        --set megatron.fp8=hybrid --set "megatron.fp8_recipe=$recipe"
done
part quickstart-base "$python" -m aer_megatron.cli launch --nproc 1 \
    examples/quickstart/countdown.toml --stage=sft --parallel.tp=1 "--model.path=$out/base" '--report.sinks=["tensorboard"]'
part quickstart "$python" -m aer_megatron.cli launch --nproc 1 \
    examples/quickstart/countdown.toml --parallel.tp=1 "--model.path=$out/base" "--run.output_dir=$out/quickstart" \
    --run.num_steps=20 --eval.sets={} '--report.sinks=["tensorboard"]'
part fp8-parity "$python" -m aer_megatron.cli fp8-parity examples/quickstart/countdown.toml --steps 20 --parallel.tp=1 \
    "--model.path=$out/base" --model.dtype=bf16
if [ -n "${SGLANG_PYTHON:-}" ]; then
    for transport in disk distributed; do
        part "sglang-$transport" "$python" -m aer_megatron.cli launch --nproc 1 \
            examples/quickstart/countdown.toml --parallel.tp=1 "--model.path=$out/base" "--run.output_dir=$out/sglang-$transport" \
            --run.num_steps=10 --eval.sets={} '--report.sinks=["tensorboard"]' --model.dtype=bf16 --rollout.engine=sglang \
            --sglang.num_servers=1 "--sglang.python=$SGLANG_PYTHON" "--sglang.transport=$transport" \
            --sglang.launch.mem_fraction_static=0.2
    done
fi
part report "$python" tools/gpu_report.py "$out"
[ -z "$dry_run" ] || exit 0
echo "gpu_acceptance: $failed parts failed; $out/report.md"
[ "$failed" = 0 ]
