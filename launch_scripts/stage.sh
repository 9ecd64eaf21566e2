#!/usr/bin/env bash
# Bring a data set to a local disk: once for a node, whoever asks first; the others wait.
set -euo pipefail
script=stage.sh

usage() {
  cat <<END
Usage: launch_scripts/stage.sh SOURCE TARGET

  SOURCE  folder, or .tar file (the fastest on a parallel file system: one large file instead of a million small ones)
  TARGET  folder on a local disk that comes to hold what SOURCE holds; kept if it is complete already

  sbatch ... launch_scripts/slurm.sbatch -s "launch_scripts/stage.sh /shared/imagenet.tar /local/imagenet" CONFIG --data-path /local/imagenet
END
}

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch_scripts/start.sh
. "$root/launch_scripts/start.sh"

option_value() { :; }
take_options "" "$@"; shift "$taken"
[ $# -eq 2 ] || die "SOURCE and TARGET wanted, got $# arguments"
source=$1 target=$2
[ -e "$source" ] || stop "$source does not exist on $(hostname)"
mkdir -p "$(dirname "$target")"

exec 9>"$target.lock"
flock 9
if [ -d "$target" ]; then
  echo "$script: $target is complete on $(hostname)"
  exit 0
fi
part=$target.part # renamed when it is complete, so that a node that was cut off starts anew
rm -rf "$part"
mkdir "$part"
if [ -d "$source" ]; then command=(cp -a "$source/." "$part"); else command=(tar -xf "$source" -C "$part"); fi
say_command "${command[@]}"
"${command[@]}"
mv "$part" "$target"
echo "$script: $target is ready on $(hostname)"
