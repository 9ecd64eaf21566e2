# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034
# Functions shared by the launch scripts, which set $script (their name) and $root (the repository), and define usage, before.

# Seconds that torchrun lets processes save after a SIGTERM (older releases ignore it: 30 s); a scheduler may have a lower limit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# Prints the warning that belongs to each --help.
network_note() {
  cat <<END
Trusted network only: the processes open ports (the one above or a free one, and others), without authentication or encryption, and
who can connect to torchrun's can run code as you. docs/clusters.md, Networks, lists the ports and says how to restrict them.
END
}

# Prints a line; names and values may hold control characters, which a terminal would obey.
say() { printf '%s: %s\n' "$script" "${*//[[:cntrl:]]/?}"; }

die() { say "$*" >&2; usage >&2; exit 2; }

stop() { say "$*" >&2; exit 1; }

# Bash evaluates the text in arithmetic, commands in subscripts included: each value passes here, or is_number, before.
need_numbers() {
  local number
  for number; do is_number "$number" || die "not a number: $number"; done
}

# Succeeds for up to 10 digits, without a leading zero, which would make the number octal.
is_number() { [[ $1 =~ ^(0|[123456789][0123456789]{0,9})$ ]]; }

# Checks the variables of SLURM, those of them that are set.
need_slurm_numbers() {
  local name
  for name in SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NNODES SLURM_NTASKS SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE; do
    [ -z "${!name:-}" ] || is_number "${!name}" || die "not a number: $name=${!name}"
  done
}

# Prints the port that follows from the job's number, or 29500 outside a job.
default_port() {
  [ -n "${SLURM_JOB_ID:-}" ] || { echo 29500; return; }
  need_numbers "$SLURM_JOB_ID"
  echo $((20000 + SLURM_JOB_ID % 10000))
}

# Ends the script unless a value is the number of a port.
need_port() {
  is_number "$1" || die "not a port number: $1"
  if [ "$1" -lt 1 ] || [ "$1" -gt 65535 ]; then die "not a port number: $1"; fi
}

# Parses the options before CONFIG with getopts; calls option_value with each flag and its value.
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

# Prints the run directory that train.py creates or continues with these arguments.
run_directory() { PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m tools.run_dir "$@"; }

# Prints an unused port of this machine, starting from 20000 + job id % 10000, so that two jobs try different ones first.
free_port() {
  local port
  need_numbers "$1"
  for port in $((20000 + $1 % 10000)) $((30000 + $1 % 10000)) $((40000 + $1 % 10000)) $((50000 + $1 % 10000)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  stop "no free port for job $1: 2, 3, 4 and 5 x 10000 + $(($1 % 10000)) are all in use; set MASTER_PORT"
}

# Succeeds if SLURM ends the whole job. Its TERM may reach this script a moment after the steps have ended.
is_cancelled() { sleep 2; [ "$termed" = 1 ]; }

# Runs the shell command $stage once on each node of the job, before training.
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

# Prints the exit status of the job and exits with it, or requeues the job if the run is to be continued.
end_job() {  # STATUS
  say "ended with status $1 at $(date '+%F %T')"
  if [ -f "$run/done" ]; then
    rm -f "$run/requeues"
  elif [ -f "$run/preempted" ] && ! is_cancelled; then
    requeue_job preempted
  fi
  exit "$1"
}

# Writes a line to the file of requeues, by a new file: a link there is replaced, not followed.
write_requeues() {
  local new
  new=$(mktemp "$run/.requeues.XXXXXXXX.tmp" 2>/dev/null) || return 1
  # =rw without a class of users: as the umask says.
  if { echo "$1" >"$new" && chmod '=rw' "$new" && mv -fT "$new" "$run/requeues"; } 2>/dev/null; then return 0; fi
  rm -f "$new"
  return 1
}

# Makes the folder for the output of the nodes; refuses links, by which srun would write elsewhere.
make_logs() {
  local folder
  for folder in "$run/logs" "$logs"; do
    if [ -L "$folder" ] || { [ -e "$folder" ] && [ ! -d "$folder" ]; }; then stop "$folder is no folder but a link or a file; remove it"; fi
  done
  mkdir -p "$logs"
  [ -z "$(find "$logs" -mindepth 1 ! -type f -print -quit)" ] || stop "$logs holds links or folders; remove them"
}

# Requeues the job, unless it was requeued 5 times without a newer checkpoint.
requeue_job() {  # WHY
  local newest job="" count=0 before=""
  newest=$(find "$run/checkpoints" -maxdepth 1 -name 'update-[0-9]*.pt' 2>/dev/null | sort -V | tail -n 1) || true
  newest=${newest//[[:cntrl:]]/?}
  if [ -f "$run/requeues" ] && [ ! -L "$run/requeues" ]; then
    read -r job count before < <(head -c 4096 -- "$run/requeues" 2>/dev/null | tr -d '\0') || true
  fi
  if [ "$job" != "$SLURM_JOB_ID" ] || [ "$before" != "$newest" ] || ! is_number "$count"; then count=0; fi
  if [ "$count" -ge 5 ]; then
    stop "$1; job $SLURM_JOB_ID has come back $count times and saved nothing since ${newest:-its beginning}: it stays out of the queue. Give it more --time"
  fi
  write_requeues "$SLURM_JOB_ID $((count + 1)) $newest" ||
    say "$run/requeues cannot be written: the requeues of the job are not counted" >&2
  say "$1; job $SLURM_JOB_ID goes back into the queue and continues $run"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until SLURM ends this script
}

# Checked early: an unknown head node is an error after a minute only (torchrun) or half an hour (srun).
need_address() { getent ahosts -- "$1" >/dev/null || stop "the name of the head node, $1, does not resolve here; set MASTER_ADDR"; }

say_command() { printf '%q ' "$@"; echo; }
