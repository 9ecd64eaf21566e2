#!/usr/bin/env bash
# Start train.py on one or several nodes with torchrun.
set -euo pipefail
script=torchrun.sh

usage() {
  cat <<END
Usage: launch_scripts/torchrun.sh [-g PROCESSES] [-n NODES -r RANK -a ADDRESS [-p PORT]] CONFIG [train.py arguments]

  -g  processes on this node (default: \$NPROC_PER_NODE, else its GPUs, or 1 without)
  -n  nodes (default: \$NNODES, else 1); then on every node also
  -r  its number, from 0 (\$NODE_RANK)
  -a  host name of node 0 (\$MASTER_ADDR)
  -p  port on node 0 (default: \$MASTER_PORT, else 20000 + \$SLURM_JOB_ID % 10000, else 29500)

  launch_scripts/torchrun.sh configs/groupmixformer/tiny_224.yaml --data-path DIR
  launch_scripts/torchrun.sh -n 2 -r 0 -a HOST -g 8 configs/groupmixformer/tiny_224.yaml --data-path DIR --batch-size 32  # and -r 1 on the other

\$PYTHON names the interpreter (default: .venv/bin/python, else python3).

$(network_note)
END
}

root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=launch_scripts/start.sh
. "$root/launch_scripts/start.sh"

processes=${NPROC_PER_NODE:-$(count_gpus)} nodes=${NNODES:-1} rank=${NODE_RANK:-} address=${MASTER_ADDR:-} port=${MASTER_PORT:-$(default_port)}
option_value() {
  case $1 in g) processes=$2 ;; n) nodes=$2 ;; r) rank=$2 ;; a) address=$2 ;; p) port=$2 ;; esac
}
take_options g:n:r:a:p: "$@"; shift "$taken"
[ $# -ge 1 ] || die "no CONFIG given"
need_numbers "$processes" "$nodes"
need_port "$port"
find_config "$1"; shift
find_python

if [ "$nodes" -eq 1 ]; then
  rendezvous=(--standalone)
else
  [ -n "$address" ] || die "several nodes need -a ADDRESS of node 0"
  [ -n "$rank" ] || die "several nodes need -r RANK, this node's number from 0"
  need_numbers "$rank"
  [ "$rank" -lt "$nodes" ] || die "-r $rank must be below -n $nodes"
  need_address "$address"
  rendezvous=(--nnodes "$nodes" --node_rank "$rank" --master_addr "$address" --master_port "$port")
fi
command=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$processes" "$root/train.py" --cfg "$config" "$@")
say_command "${command[@]}"
trap "" USR1 # the early warning of a cluster is for train.py, which handles it; it would kill torchrun
exec "${command[@]}"
