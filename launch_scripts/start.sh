# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034
# What the launch scripts share. They set $script (their name) and $root (the repository), and define usage, before they read it.

# How long torchrun (where it reads this; 30 s in older releases) lets processes save after a SIGTERM; a scheduler's own limit comes before.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

die() { echo "$script: $*" >&2; usage >&2; exit 2; }

stop() { echo "$script: $*" >&2; exit 1; }

need_numbers() {
  local number
  for number; do [[ $number =~ ^[0-9]+$ ]] || die "not a number: $number"; done
}

# The options before CONFIG, for getopts; option_value is called with each flag.
take_options() {  # LETTERS ARGUMENTS...
  local letters=$1 flag; shift
  OPTIND=1
  while getopts ":${letters}h-:" flag; do
    case $flag in
      h) usage; exit 0 ;;
      -) [ "$OPTARG" = help ] && { usage; exit 0; }; die "unknown option --$OPTARG before CONFIG" ;;
      :) die "option -$OPTARG needs a value" ;;
      \?) die "unknown option -$OPTARG" ;;
      *) option_value "$flag" "$OPTARG" ;;
    esac
  done
  taken=$((OPTIND - 1))
}

# Sets config to a file: as given, or below the repository.
find_config() {
  config=$1
  [ -f "$config" ] || config=$root/$config
  [ -f "$config" ] || die "config ${config#"$root"/} does not exist"
}

# Sets python: $PYTHON, or the repository's environment, or python3.
find_python() {
  python=${PYTHON:-$root/.venv/bin/python}
  [ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
  command -v "$python" >/dev/null || stop "no interpreter $python; run make install, or set PYTHON"
}

# Prints the GPUs of this node, or 1 without.
count_gpus() {
  local gpus
  gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  echo $((gpus > 0 ? gpus : 1))
}

# Prints the directory of the run that train.py makes or continues with these arguments.
run_directory() { PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m tools.run_dir "$@"; }

# Prints a port of this machine that nobody listens on: 20000 + the job's number, so that two jobs look at different ones first.
free_port() {
  local port
  for port in $((20000 + $1 % 10000)) $((30000 + $1 % 10000)) $((40000 + $1 % 10000)) $((50000 + $1 % 10000)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  stop "no free port for job $1: 2, 3, 4 and 5 x 10000 + $(($1 % 10000)) are all in use; set MASTER_PORT"
}

# Whether SLURM ends the whole job. Its TERM may reach this script a moment later than it ends the steps.
is_cancelled() { sleep 2; [ "$termed" = 1 ]; }

# The shell command $stage, once on each node of the job, before training.
stage_nodes() {
  local command status=0
  [ -n "$stage" ] || return 0
  command=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$stage")
  say_command "${command[@]}"
  "${command[@]}" || status=$?
  case $status in
    0) return ;;
    138 | 143) is_cancelled || requeue_job "interrupted while it staged its data" ;; # by USR1, by TERM
  esac
  stop "staging failed"
}

# Says how the job ended and ends this script, or puts it back into the queue if the run is to be continued.
end_job() {  # STATUS
  echo "$script: ended with status $1 at $(date '+%F %T')"
  if [ -f "$run/done" ]; then
    rm -f "$run/requeues"
  elif [ -f "$run/preempted" ] && ! is_cancelled; then
    requeue_job preempted
  fi
  exit "$1"
}

# Puts the job back into the queue, unless it has come back 5 times without a newer checkpoint.
requeue_job() {  # WHY
  local newest job="" count=0 before=""
  newest=$(find "$run/checkpoints" -name 'update-*.pt' 2>/dev/null | sort -V | tail -n 1) || true
  [ ! -f "$run/requeues" ] || read -r job count before <"$run/requeues" || true
  if [ "$job" != "$SLURM_JOB_ID" ] || [ "$before" != "$newest" ]; then count=0; fi
  if [ "$count" -ge 5 ]; then
    stop "$1; job $SLURM_JOB_ID has come back $count times and saved nothing since ${newest:-its beginning}: it stays out of the queue. Give it more --time"
  fi
  echo "$SLURM_JOB_ID $((count + 1)) $newest" >"$run/requeues"
  echo "$script: $1; job $SLURM_JOB_ID goes back into the queue and continues $run"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until SLURM ends this script
}

# A head node whose name is unknown costs a minute (torchrun) or half an hour (srun) before anything is said.
need_address() { getent ahosts "$1" >/dev/null || stop "the name of the head node, $1, does not resolve here; set MASTER_ADDR"; }

say_command() { printf '%q ' "$@"; echo; }
