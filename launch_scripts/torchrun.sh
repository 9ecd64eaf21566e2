#!/usr/bin/env bash
# Start train.py on one or several nodes with torchrun.
set -euo pipefail

usage() {
  cat <<EOF
Usage: launch_scripts/torchrun.sh [-g PROCESSES] [-n NODES -r RANK -a ADDRESS [-p PORT]] CONFIG [train.py arguments]

  -g  processes on this node (default: its GPUs, or 1 without)
  -n  nodes (default 1); then on every node also
  -r  its number, from 0
  -a  host name of node 0
  -p  port on node 0 (default 29500)

  launch_scripts/torchrun.sh configs/groupmixformer/tiny_224.yaml --data-path DIR
EOF
}

die() { echo "torchrun.sh: $*" >&2; usage >&2; exit 2; }

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
processes=$((gpus > 0 ? gpus : 1)) nodes=1 rank=0 address="" port=29500
while getopts ":g:n:r:a:p:h-:" flag; do
  case $flag in
    g) processes=$OPTARG ;; n) nodes=$OPTARG ;; r) rank=$OPTARG ;; a) address=$OPTARG ;; p) port=$OPTARG ;;
    h) usage; exit 0 ;;
    -) [ "$OPTARG" = help ] && { usage; exit 0; }; die "unknown option --$OPTARG before CONFIG" ;;
    *) die "unknown option or missing value: -$OPTARG" ;;
  esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || die "no CONFIG given"
config=$1; shift
for number in "$processes" "$nodes" "$rank" "$port"; do
  [[ $number =~ ^[0-9]+$ ]] || die "not a number: $number"
done
root=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$config" ] || config=$root/$config
[ -f "$config" ] || die "config ${config#"$root"/} does not exist"

if [ "$nodes" -eq 1 ]; then
  rendezvous=(--standalone)
else
  [ -n "$address" ] || die "several nodes need -a ADDRESS of node 0"
  [ "$rank" -lt "$nodes" ] || die "-r $rank must be below -n $nodes"
  rendezvous=(--nnodes "$nodes" --node_rank "$rank" --master_addr "$address" --master_port "$port")
fi
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
command=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$processes" "$root/train.py" --cfg "$config" "$@")
echo "${command[*]}"
exec "${command[@]}"
