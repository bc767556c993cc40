#!/usr/bin/env bash
# Starts this node's ranks. The same command on every training node, in any order:
#   MASTER_ADDR=node0 NNODES=2 bash examples/multinode_torchrun/launch.sh [RUN.toml] [--section.key=value ...]
#
# Environment (defaults in brackets):
#   NNODES         training nodes
#   MASTER_ADDR    one of them, by name or address, as the others reach it; it holds the rendezvous
#   MASTER_PORT    [29400] a free port there, open to the other nodes
#   GPUS_PER_NODE  [8] ranks that this node starts
#   RUN_ID         [aer] tells runs apart that share MASTER_ADDR and MASTER_PORT
#   LOCAL_ADDR     [the address that the route to MASTER_ADDR leaves from] this node, as the others reach it
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  [the interface of LOCAL_ADDR]
#   SGLANG_URLS    [none] servers started by serve.sh, separated by commas: http://node2:30000,http://node2:30001
#   SERVER_START_TIMEOUT_S [1200] how long to wait for those servers
#   JOIN_TIMEOUT_S [600] how long the nodes wait for one another
#
# A node that is lost ends the run on the others (docs/multinode.md); the same command goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/multinode_torchrun

fail() {
    echo "launch: $*" >&2
    exit 2
}

[ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is not set; give the name of one training node, the same on all of them"
[ -n "${NNODES:-}" ] || fail "NNODES is not set; give the number of training nodes"
run=$here/qwen3-8b-base.toml
case ${1:-} in
*.toml)
    run=$1
    shift
    ;;
esac
[ -f "$run" ] || fail "run file $run does not exist in $PWD"

port=${MASTER_PORT:-29400}
network=$(python3 "$here/network.py" "$MASTER_ADDR" "$port" "${JOIN_TIMEOUT_S:-600}" ${LOCAL_ADDR:+"$LOCAL_ADDR"})
read -r local_addr interface is_host <<<"$network"
if [ "$interface" != - ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # "=": this one, not all that begin like it
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "${SGLANG_URLS:-}" ]; then
    IFS=, read -r -a urls <<<"$SGLANG_URLS"
    python3 "$here/await_servers.py" "${SERVER_START_TIMEOUT_S:-1200}" "${urls[@]}"
    # rank 0 is on the node with the smallest address; whichever that is, it gives the servers its own
    set -- "--sglang.urls=[\"${SGLANG_URLS//,/\",\"}\"]" "--sglang.trainer_address=$local_addr" "$@"
fi
echo "launch: $run on $local_addr (${GLOO_SOCKET_IFNAME:-any interface}), $NNODES nodes x ${GPUS_PER_NODE:-8} ranks, rendezvous at $MASTER_ADDR:$port"
# read_timeout bounds how long this node's torchrun outlives a network that is gone
# no restarts by torchrun: a lost node needs a new one first, and then the same command is the restart
exec torchrun \
    --nnodes="$NNODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --max-restarts=0 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:$port" \
    --rdzv-id="${RUN_ID:-aer}" \
    --rdzv-conf="is_host=$is_host,join_timeout=${JOIN_TIMEOUT_S:-600},read_timeout=15" \
    --local-addr="$local_addr" \
    -m aer_megatron.train "$run" "$@"
