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

# A head node whose name is unknown costs a minute (torchrun) or half an hour (srun) before anything is said.
need_address() { getent ahosts "$1" >/dev/null || stop "the name of the head node, $1, does not resolve here; set MASTER_ADDR"; }

say_command() { printf '%q ' "$@"; echo; }
