#!/usr/bin/env bash
# Trains and generates on one node: SGLang servers on its last GPUs, training ranks on its first ones.
#   bash examples/single_node/launch.sh [RUN.toml] [--section.key=value ...]
#
# Environment (defaults in brackets):
#   GPUS_PER_NODE  [8]
#   SERVER_COUNT   [half of GPUS_PER_NODE] GPUs that serve, one server each; the others train
#   SERVER_PORT    [30000] port of the first server; they listen on 127.0.0.1
#   SGLANG_PYTHON  [python] interpreter of SGLang's environment
#   SERVER_START_TIMEOUT_S [1200] how long to wait for the servers
#   SERVER_OPTIONS [--mem-fraction-static 0.85] further options of the servers
#
# Ends the servers that it started when the training ends, in whatever way, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=examples/single_node/qwen3-4b-base.toml
case ${1:-} in
*.toml)
    run=$1
    shift
    ;;
esac
[ -f "$run" ] || {
    echo "launch: run file $run does not exist in $PWD" >&2
    exit 2
}
gpus=${GPUS_PER_NODE:-8}
serving=${SERVER_COUNT:-$((gpus / 2))}
training=$((gpus - serving))
((serving > 0 && training > 0)) || {
    echo "launch: SERVER_COUNT=$serving must lie between 1 and GPUS_PER_NODE - 1 = $((gpus - 1))" >&2
    exit 2
}
port=${SERVER_PORT:-30000}
model=$(python3 -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["model"]["path"])' "$run")
for argument in "$@"; do
    case $argument in
    --model.path=*) model=${argument#*=} ;;
    esac
done
urls=()
for ((server = 0; server < serving; server++)); do
    urls+=("http://127.0.0.1:$((port + server))")
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

children=()
# shellcheck disable=SC2329 # called by the traps below
end_children() {
    trap - EXIT
    for child in "${children[@]}"; do
        kill -TERM "$child" 2>/dev/null || true
    done
    wait
}
trap end_children EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 129' HUP

IFS=' ' read -r -a options <<<"${SERVER_OPTIONS:---mem-fraction-static 0.85}"
echo "launch: $run, $training ranks on GPUs 0-$((training - 1)), $serving servers on GPUs $training-$((gpus - 1))"
SERVER_GPUS=$(seq -s, "$training" $((gpus - 1))) SERVER_HOST=127.0.0.1 SERVER_PORT=$port \
    bash examples/multinode_torchrun/serve.sh "$model" "${options[@]}" &
children+=($!)
python3 examples/multinode_torchrun/await_servers.py "${SERVER_START_TIMEOUT_S:-1200}" "${urls[@]}" &
children+=($!)
wait -n "${children[@]}" || exit 1 # a server that ends is a failure, too
torchrun --standalone --nproc-per-node="$training" \
    -m aer_megatron.train "$run" "--sglang.urls=[$(printf '"%s",' "${urls[@]}")]" "$@" &
children+=($!)
wait "${children[2]}" # the servers' end is the trainer's to notice: it goes on with those that are left
