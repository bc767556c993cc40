#!/usr/bin/env bash
# Serves rollouts from this node's GPUs: one SGLang server per SERVER_TP of them. Ends when one of its servers ends, and ends
# all of them then, or on SIGTERM, SIGINT and SIGHUP; no other process.
#   bash examples/multinode_torchrun/serve.sh MODEL_FOLDER [sglang options]
#
# Environment (defaults in brackets):
#   SERVER_GPUS    [0 to GPUS_PER_NODE - 1] GPU numbers, separated by commas
#   GPUS_PER_NODE  [8]
#   SERVER_TP      [1] GPUS of one server
#   SERVER_HOST    [0.0.0.0] address to listen on
#   SERVER_API_KEY [none] key that every client has to have; must be set unless SERVER_HOST is this machine's own, because whoever
#                  may call a server can change its weights. It is on no command line and in no log
#   SERVER_PORT    [30000] port of the first server; the next ones take the ports after it
#   SGLANG_PYTHON  [python] interpreter of SGLang's environment
set -euo pipefail
set -m # every server gets a process group of its own, so that its children end with it

fail() {
    echo "serve: $*" >&2
    exit 2
}

[ $# -ge 1 ] || fail "give the model's folder"
model=$1
shift
[ -f "$model/config.json" ] || fail "$model has no config.json; give a Hugging Face folder"
size=${SERVER_TP:-1}
IFS=, read -r -a gpus <<<"${SERVER_GPUS:-$(seq -s, 0 $((${GPUS_PER_NODE:-8} - 1)))}"
((${#gpus[@]} % size == 0)) || fail "SERVER_TP=$size must divide the number of GPUs, ${#gpus[@]}"
host=${SERVER_HOST:-0.0.0.0}
key=${SERVER_API_KEY:-}
unset SERVER_API_KEY # a server gets it as a file
case $host in
127.0.0.1 | localhost | ::1) ;;
*) [ -n "$key" ] || fail "SERVER_API_KEY is not set and SERVER_HOST=$host is open to other machines; set both there and for launch.sh: \$(openssl rand -hex 32)" ;;
esac
# a server asks its own address before it is ready, with a client that obeys proxies
export no_proxy="${no_proxy:-${NO_PROXY:-}},127.0.0.1,localhost,::1,[::1],$host"
export NO_PROXY=$no_proxy
start=(-m sglang.launch_server)
keys=$(mktemp -d)
if [ -n "$key" ]; then
    start=("$(dirname "${BASH_SOURCE[0]}")/../../aer_megatron/sglang/start_server.py" sglang.launch_server --aer-key-file)
fi

servers=()
# shellcheck disable=SC2329 # called by the traps below
end_servers() {
    trap - EXIT
    for server in "${servers[@]}"; do
        kill -TERM -- "-$server" 2>/dev/null || true
    done
    for _ in $(seq 100); do # ten seconds to end in order
        [ -n "$(jobs -pr)" ] || break
        sleep 0.1
    done
    for server in "${servers[@]}"; do
        kill -KILL -- "-$server" 2>/dev/null || true
    done
    rm -f "$keys"/[0-9]*
    rmdir "$keys"
}
trap end_servers EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 129' HUP

for ((first = 0; first < ${#gpus[@]}; first += size)); do
    group=("${gpus[@]:first:size}")
    port=$((${SERVER_PORT:-30000} + first / size))
    if [ -n "$key" ]; then
        (umask 077 && printf %s "$key" >"$keys/$port") # removed by the server once it has read it
    fi
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${group[*]}") "${SGLANG_PYTHON:-python}" "${start[@]}" ${key:+"$keys/$port"} \
        --model-path "$model" --host "$host" --port "$port" --tp-size "$size" "$@" &
    servers+=($!)
    echo "serve: port $port, GPUs ${group[*]}, process $!"
done
wait -n || true
echo "serve: a server has ended; ending the others" >&2
exit 1
