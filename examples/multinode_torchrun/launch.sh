#!/usr/bin/env bash
# Starts this node's ranks. The same command on every training node, in any order:
#   MASTER_ADDR=node0 NNODES=2 bash examples/multinode_torchrun/launch.sh [RUN.toml] [--section.key=value ...]
#
# Environment (defaults in brackets):
#   NNODES         training nodes
#   MASTER_ADDR    one of them, by name or address, as the others reach it; it holds the rendezvous, on that address alone
#   MASTER_PORT    [29400] a free port there, open to the other training nodes and to nobody else
#   NODE_RANK      [SLURM_NODEID; 0 on MASTER_ADDR, 1 on the other one of two] number of this node, 0 is MASTER_ADDR
#   GPUS_PER_NODE  [8] ranks that this node starts
#   RUN_ID         [aer] keeps apart runs that are given one MASTER_ADDR and MASTER_PORT by mistake
#   LOCAL_ADDR     [the address that the route to MASTER_ADDR leaves from] this node, as the others reach it
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  [the interface of LOCAL_ADDR]
#   SGLANG_URLS    [none] servers started by serve.sh, separated by commas: http://node2:30000,http://node2:30001
#   SERVER_API_KEY [none] their key, as for serve.sh
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
network=$(python3 "$here/network.py" "$MASTER_ADDR" ${LOCAL_ADDR:+"$LOCAL_ADDR"})
read -r local_addr interface is_host <<<"$network"
node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
if [ -z "$node_rank" ]; then
    [ "$is_host" = true ] || [ "$NNODES" = 2 ] ||
        fail "NODE_RANK is not set; number the training nodes from 0, which is MASTER_ADDR, to NNODES - 1"
    node_rank=$([ "$is_host" = true ] && echo 0 || echo 1)
fi
if [ "$interface" != - ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # "=": this one, not all that begin like it
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "${SGLANG_URLS:-}" ]; then
    IFS=, read -r -a urls <<<"$SGLANG_URLS"
    python3 "$here/await_servers.py" "${SERVER_START_TIMEOUT_S:-1200}" "${urls[@]}"
    [ -z "${SERVER_API_KEY:-}" ] || set -- --sglang.api_key_env=SERVER_API_KEY "$@"
    # rank 0's node, whichever it is, gives the servers its own
    set -- "--sglang.urls=[\"${SGLANG_URLS//,/\",\"}\"]" "--sglang.trainer_address=$local_addr" "$@"
fi
echo "launch: $run on $local_addr (${GLOO_SOCKET_IFNAME:-any interface}), node $node_rank of $NNODES x ${GPUS_PER_NODE:-8} ranks, rendezvous at $MASTER_ADDR:$port"
exec aer launch \
    --nnodes="$NNODES" \
    --node-rank="$node_rank" \
    --nproc="${GPUS_PER_NODE:-8}" \
    --master-addr="$MASTER_ADDR" \
    --master-port="$port" \
    --run-id="${RUN_ID:-aer}" \
    --join-timeout="${JOIN_TIMEOUT_S:-600}" \
    "$run" "$@"
