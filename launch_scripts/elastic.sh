#!/usr/bin/env bash
# Start train.py with torchrun on nodes that may join and leave: the run continues on those that remain.
set -euo pipefail
script=elastic.sh

usage() {
  cat <<END
Usage: launch_scripts/elastic.sh -n MIN:MAX -a ADDRESS [-p PORT] [-i ID] [-m RESTARTS] [-g PROCESSES] CONFIG [train.py arguments]

The same command on every node, also on one that joins later.

  -n  smallest and largest number of nodes, e.g. 1:4
  -a  host name of the node that they meet at; if that one dies, start the command again with another
  -p  port there (default: \$MASTER_PORT, else 20000 + \$SLURM_JOB_ID % 10000, else 29500)
  -i  name of the rendezvous, another one for each run (default: the config's name)
  -m  restarts after the death of a worker or a node before torchrun gives up (default: 100)
  -g  processes on this node (default: \$NPROC_PER_NODE, else its GPUs, or 1 without)

  launch_scripts/elastic.sh -n 1:4 -a HOST configs/stvit/small_224.yaml --data-path DIR --opts CHECKPOINT.EVERY_UPDATES 200

A restart continues from the last checkpoint: CHECKPOINT.EVERY_UPDATES says how much can be lost. A number of processes that the
global batch cannot be divided among trains on as many as it can; the others stand by. \$RDZV_CONF replaces torchrun's patience,
$patience.

$(network_note)
END
}
patience=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3

root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=launch_scripts/start.sh
. "$root/launch_scripts/start.sh"

nodes="" address="" port=${MASTER_PORT:-$(default_port)} id="" restarts=100 processes=${NPROC_PER_NODE:-$(count_gpus)}
option_value() {
  case $1 in n) nodes=$2 ;; a) address=$2 ;; p) port=$2 ;; i) id=$2 ;; m) restarts=$2 ;; g) processes=$2 ;; esac
}
take_options n:a:p:i:m:g: "$@"; shift "$taken"
[ $# -ge 1 ] || die "no CONFIG given"
if [[ $nodes != *:* ]] || ! is_number "${nodes%%:*}" || ! is_number "${nodes#*:}"; then die "-n wants MIN:MAX nodes, e.g. 1:4, got '$nodes'"; fi
if [ "${nodes%%:*}" -lt 1 ] || [ "${nodes%%:*}" -gt "${nodes#*:}" ]; then die "-n $nodes: MIN must lie between 1 and MAX"; fi
[ -n "$address" ] || die "no -a ADDRESS given"
need_numbers "$restarts" "$processes"
need_port "$port"
[ "$restarts" -ge 1 ] || die "-m 0: nothing would be restarted; use torchrun.sh"
find_config "$1"; shift
find_python
need_address "$address"

[ -n "$id" ] || { id=${config##*/}; id=${id%.yaml}; }
command=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "RETOKEN_MEETING=$address:$port" "$python" -m torch.distributed.run
  --nnodes "$nodes" --nproc_per_node "$processes" --max_restarts "$restarts"
  --rdzv_backend c10d --rdzv_endpoint "$address:$port" --rdzv_id "$id" --rdzv_conf "${RDZV_CONF:-$patience}"
  "$root/train.py" --cfg "$config" "$@")
say_command "${command[@]}"
trap "" USR1 # the early warning of a cluster is for train.py, which handles it; it would kill torchrun
exec "${command[@]}"
