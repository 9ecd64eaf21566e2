#!/usr/bin/env bash
# Start eval.py on the GPUs of this node; every image is counted exactly once.
set -euo pipefail
script=eval.sh

usage() {
  cat <<END
Usage: launch_scripts/eval.sh [-g PROCESSES] CONFIG --checkpoint FILE [eval.py arguments]

  -g  processes (default: \$NPROC_PER_NODE, else the GPUs of this node, or 1 without)

  launch_scripts/eval.sh configs/stvit/small_224.yaml --data-path DIR --checkpoint output/stvit_small_224/best_raw.safetensors

\$PYTHON names the interpreter (default: .venv/bin/python, else python3).

$(network_note)
END
}

root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=launch_scripts/start.sh
. "$root/launch_scripts/start.sh"

processes=${NPROC_PER_NODE:-$(count_gpus)}
option_value() { processes=$2; }
take_options g: "$@"; shift "$taken"
[ $# -ge 1 ] || die "no CONFIG given"
need_numbers "$processes"
find_config "$1"; shift
case " $* " in *" --checkpoint"[\ =]*) ;; *) die "no --checkpoint FILE given" ;; esac
find_python

command=("$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$root/eval.py" --cfg "$config" "$@")
say_command "${command[@]}"
exec "${command[@]}"
