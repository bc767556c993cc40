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
# SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 go to the training, which finishes its step, saves and ends; a second one is handed on, too.
set -euo pipefail
set -m # process groups of their own: Ctrl-C reaches this script alone, and the servers live until the training has saved
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

SERVER_API_KEY=${SERVER_API_KEY:-$(python3 -c 'import secrets; print(secrets.token_hex(32))')}
export SERVER_API_KEY # other users of this machine reach 127.0.0.1, too
set -- --sglang.api_key_env=SERVER_API_KEY "$@"

children=()
trainer=
# shellcheck disable=SC2329 # called by the traps below
end_children() {
    trap - EXIT
    for child in "${children[@]}"; do
        kill -TERM "$child" 2>/dev/null || true
    done
    wait
}
# shellcheck disable=SC2329
hand_on() { # SIGNAL EXIT_CODE
    [ -n "$trainer" ] || exit "$2"
    again=1
    kill "-$1" "$trainer" 2>/dev/null || true
}
trap end_children EXIT
trap 'hand_on TERM 143' TERM
trap 'hand_on INT 130' INT
trap 'hand_on USR1 0' USR1
trap '' HUP # a lost terminal ends nothing

IFS=' ' read -r -a options <<<"${SERVER_OPTIONS:---mem-fraction-static 0.85}"
echo "launch: $run, $training ranks on GPUs 0-$((training - 1)), $serving servers on GPUs $training-$((gpus - 1))"
SERVER_GPUS=$(seq -s, "$training" $((gpus - 1))) SERVER_HOST=127.0.0.1 SERVER_PORT=$port \
    bash examples/multinode_torchrun/serve.sh "$model" "${options[@]}" &
children+=($!)
python3 examples/multinode_torchrun/await_servers.py "${SERVER_START_TIMEOUT_S:-1200}" "${urls[@]}" &
children+=($!)
wait -n "${children[@]}" || exit 1 # a server that ends is a failure, too
aer launch --nproc "$training" "$run" "--sglang.urls=[$(printf '"%s",' "${urls[@]}")]" "$@" &
trainer=$!
again=1
while [ -n "$again" ]; do # a signal ends the wait, not the training
    again=
    code=0
    wait "$trainer" || code=$? # the servers' end is the trainer's to notice: it goes on with those that are left
done
exit "$code"
