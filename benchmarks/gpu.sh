#!/usr/bin/env bash
# Run the main benchmarks on one GPU, in under eight minutes, into one folder with a summary.md.
#
#   benchmarks/gpu.sh [--out DIR] [--models A,B] [--baseline SPEC] [--parts a,b] [--seconds N] [--small]
#
# The most important parts come first. Each has its own time limit, so that one that fails or hangs does not affect the others, and
# none begins after N seconds (default 470); every row and the summary are written as they come. The exit status is 1 if a part failed.
# SPEC names a baseline (step.py). --small runs small versions on the CPU.
# Parts, in order: machine tests step trainer compile memory kernels fp16 dali
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python}
out=output/benchmark-$(date +%Y%m%d-%H%M%S) models=sgformer_small,groupmixformer_tiny,stvit_small
parts=machine,tests,step,trainer,compile,memory,kernels,fp16,dali small="" baselines=() seconds=470
while [ $# -gt 0 ]; do
    case $1 in
        --small) small=yes; shift; continue ;;
        --out | --models | --parts | --seconds | --baseline | --opponent) ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
    [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
    case $1 in
        --out) out=$2 ;;
        --models) models=$2 ;;
        --parts) parts=$2 ;;
        --seconds) seconds=$2 ;;
        --baseline | --opponent) baselines+=(--baseline "$2") ;;
    esac
    shift 2
done
[[ $seconds =~ ^[1-9][0-9]{0,5}$ ]] || { echo "gpu.sh: --seconds $seconds: a number of seconds is needed" >&2; exit 2; }
mkdir -p "$out" || exit 2
if [ "$small" ]; then
    export CUDA_VISIBLE_DEVICES=""
    measured=(--batch 2 --size 64 --rounds 1 --seconds 0)
    trained=(--cfg configs/groupmixformer/mobile_64.yaml --batch 2 --updates 2 --rounds 1)
    memory=(--models groupmixformer_mobile --size 64 --gib 1)
    kernels=(env TRITON_INTERPRET=1 "$PYTHON" benchmarks/kernels.py --models stvit_small --batch 1 --size 32 --channels 8 --rounds 1 --span 0 --no-compile)
    pictures=16 compile=(--backend aot_eager --modes infer) scale=4 seconds=$((4 * seconds)) few=${models%%,*} # fp16 is slow on a CPU
else
    measured=(--batch 128 --rounds 5 --seconds 0.3)
    trained=(--cfg configs/stvit/small_224.yaml --batch 128 --updates 20 --rounds 5 --opts TRAIN.CLIP_GRAD 5.0 TRAIN.COMPILE off)
    memory=(--models "$models" --gib 80)
    kernels=("$PYTHON" benchmarks/kernels.py --rounds 3)
    pictures=64 compile=(--modes train) scale=1 few=$models
fi
"$PYTHON" -c 'import pytest, rich, safetensors, timm, yacs.config' || { # required by every part
    echo "gpu.sh: $PYTHON lacks a package (above): $PYTHON -m pip install timm yacs rich safetensors pytest. Without a" >&2
    echo "network, install the same on another machine with pip install --target DIR, copy DIR, and run PYTHONPATH=DIR $0" >&2
    exit 2
}
step=("$PYTHON" benchmarks/step.py "${measured[@]}" ${baselines[@]+"${baselines[@]}"})
failed=0 began=$(date +%s)

part() { # name, limit in seconds, command ...
    local name=$1 limit=$(($2 * scale)) start status
    shift 2
    case ,$parts, in *,"$name",*) ;; *) return ;; esac
    start=$(date +%s)
    if [ $((start - began + 20)) -gt "$seconds" ]; then # too little time for anything
        echo "$name: not begun, the $seconds s are over" | tee -a "$out/parts.txt"
        failed=1
        return
    fi
    [ "$limit" -le $((seconds - start + began)) ] || limit=$((seconds - start + began))
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $name:$status in
        *:0 | tests:5) said="done" ;; # pytest's 5: no test was selected
        *:124) said="stopped after its limit of $limit s" failed=1 ;;
        *) said="failed with status $status" failed=1 ;;
    esac
    echo "$name: $said ($(($(date +%s) - start)) s)" | tee -a "$out/parts.txt"
    summarise
}

summarise() { # write all that there is into summary.md
    {
        echo "# One GPU, $(date +%Y-%m)"
        echo
        sed 's/^/- /' "$out/parts.txt"
        echo "- all: $(($(date +%s) - began)) s"
        for name in machine step compile fp16 kernels trainer memory dali tests; do
            [ -f "$out/$name.log" ] || continue
            printf '\n## %s\n\n' "$name"
            if [ -f "$out/$name.md" ]; then sed 's/^# /### /' "$out/$name.md"; else tail -n 25 "$out/$name.log" | sed 's/^/    /'; fi
        done
    } >"$out/summary.md"
}

# shellcheck disable=SC2317 # called through bash -c, as the three below
each() { # seconds for a model, models with commas, command ...: a process for each, their rows in one file
    local limit=$(($1 * scale)) given=$2 status=0 model one
    shift 2
    for model in ${given//,/ }; do
        timeout --foreground --kill-after=10 "$limit" "$@" --models "$model" --append
        one=$?
        [ "$one" = 124 ] && echo "$model: stopped after its limit of $limit s"
        [ "$one" = 0 ] || status=$one
    done
    return "$status"
}

# shellcheck disable=SC2317
tests() { # those that need a GPU, without torch.compile's
    local files
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    "$PYTHON" -m pytest -q -m gpu -k 'not compile' "${files[@]}"
}

# shellcheck disable=SC2317
pictures() { # the loaders, DALI's on the GPU too, on the demo's pictures
    "$PYTHON" -m tools.demo "$out/pictures" --train "$pictures" --val 10 &&
        "$PYTHON" benchmarks/loader.py --data "$out/pictures" --images $((pictures * 4)) --rounds 2 --batch "$pictures" \
            --only decode torch_uint8 dali_cpu dali_gpu --out "$out/dali"
}

# shellcheck disable=SC2317
machine() {
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv
    "$PYTHON" -c 'from benchmarks import record; print(record.hardware(), record.commit())' && "$PYTHON" -m torch.utils.collect_env
}

: >"$out/parts.txt"
export PYTHON out pictures scale
export -f pictures machine each tests
count=$(tr ',' '\n' <<<"$models" | grep -c .) shorter=$(tr ',' '\n' <<<"$few" | grep -c .)
part machine 15 bash -c machine
part tests 60 bash -c tests
part step $((45 * count)) bash -c 'each 45 "$@"' each "$models" "${step[@]}" --precision bf16 --out "$out/step"
part trainer 50 "$PYTHON" benchmarks/trainer.py "${trained[@]}" --out "$out/trainer"
part compile $((60 * shorter)) bash -c 'each 60 "$@"' each "$few" "${step[@]}" --precision bf16 --compile all ${compile[@]+"${compile[@]}"} --out "$out/compile"
part memory 60 "$PYTHON" benchmarks/memory.py "${memory[@]}" --out "$out/memory"
part kernels 45 "${kernels[@]}" --out "$out/kernels"
part fp16 $((30 * shorter)) bash -c 'each 30 "$@"' each "$few" "${step[@]}" --precision fp16 --modes train --out "$out/fp16"
if "$PYTHON" -c 'import nvidia.dali' 2>/dev/null; then part dali 40 bash -c pictures; else echo "dali: not installed" >>"$out/parts.txt"; fi
summarise
echo "written to $out/summary.md"
exit $failed
