#!/usr/bin/env bash
# Copy a data set to a local disk, once per node: the first caller copies, the others wait.
set -euo pipefail
script=stage.sh

usage() {
  cat <<END
Usage: launch_scripts/stage.sh SOURCE TARGET

  SOURCE  folder, or .tar file (the fastest on a parallel file system: one large file instead of a million small ones)
  TARGET  folder on a local disk that comes to hold what SOURCE holds; kept if a copy of SOURCE is complete there already

  sbatch ... launch_scripts/slurm.sbatch -s "launch_scripts/stage.sh /shared/imagenet.tar /local/imagenet" CONFIG --data-path /local/imagenet
END
}

root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=launch_scripts/start.sh
. "$root/launch_scripts/start.sh"

option_value() { :; }
take_options "" "$@"; shift "$taken"
[ $# -eq 2 ] || die "SOURCE and TARGET wanted, got $# arguments"
source=$(realpath -s -- "$1") target=$2
[ -e "$source" ] || stop "$source does not exist on $(hostname)"
while [[ $target == ?*/ ]]; do target=${target%/}; done
mkdir -p -- "$(dirname -- "$target")"

lock=$target.lock part=$target.part # names that others may have taken first, where the folder is one like /tmp
if [ -L "$lock" ] || { [ -e "$lock" ] && [ ! -f "$lock" ]; }; then stop "$lock on $(hostname) is no lock file of this script; remove it, or name another TARGET"; fi
if [ -L "$part" ] || { [ -e "$part" ] && [ ! -d "$part" ]; }; then stop "$part on $(hostname) is no folder of this script; remove it, or name another TARGET"; fi
[ ! -e "$lock" ] || [ -w "$lock" ] || stop "$lock on $(hostname) belongs to another user; name another TARGET, in a folder of your own"
exec 9>>"$lock" # not >, which would empty the file
flock 9
mark=$target/.complete # written last; holds the path of SOURCE
if [ -f "$mark" ]; then
  origin=$(head -c 4096 -- "$mark" | tr -d '\0')
  [ "$origin" = "$source" ] || stop "$target on $(hostname) is a copy of $origin, not of $source; remove it, or name another TARGET"
  say "$target is complete on $(hostname)"
  exit 0
fi
rmdir "$target" 2>/dev/null || [ ! -e "$target" ] || stop "$target on $(hostname) is not a complete copy that this script made; remove it, or name another TARGET"
# The copy is renamed when it is complete, so that an interrupted one is repeated.
[ ! -e "$part" ] || chmod -R u+rwX "$part" # copies of read-only folders are read-only, too
rm -rf "$part"
mkdir "$part"
if [ -d "$source" ]; then command=(cp -a -- "$source/." "$part"); else command=(tar -xf "$source" -C "$part"); fi
say_command "${command[@]}"
"${command[@]}"
chmod u+w "$part" # SOURCE may be read-only
echo "$source" >"$part/.complete"
mv -T -- "$part" "$target"
say "$target is ready on $(hostname)"
