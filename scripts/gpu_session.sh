#!/usr/bin/env bash
# scripts/gpu_session.sh - the harness on a GPU machine that is lent for minutes, reaches no network
# and keeps nothing: data and earlier results go in by parts, what comes out is few, small files.
#
#   split -b 50M cifar10.npz cifar10.npz.             at home: parts small enough to be carried
#   scripts/gpu_session.sh keep cifar10.npz.aa        there, a call a part: kept for the calls after it
#   scripts/gpu_session.sh check OUT                  tests and benchmarks marked gpu; OUT/check.log
#   scripts/gpu_session.sh run OUT 8m full sfp pp3 q4 these variants, until the time is over
#   scripts/gpu_session.sh run OUT 8m                 all ten
#
# `run` ends with 0 when all is done and 124 when work is left: the same call goes on. It leaves in OUT
#   published.tar.xz   what scripts/publish.py keeps: report, raw predictions, perturbations
#   state.tar.*        checkpoints and exports, as many as fit; `keep` them on the next machine
# A harness.toml that was kept is the experiment; else it is PRESET (paper-fast) on DATASET
# (cifar10.npz). Everything is the machine's own python3: nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${GPU_SESSION:-$HOME/gpu-session}
dataset=${DATASET:-cifar10.npz}
part_bytes=${PART_BYTES:-15000000}
parts=${PARTS:-3}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

keep() {
    mkdir -p "$root/kept"
    cp -- "$@" "$root/kept/"
    ls -l "$root/kept"
}

check() {
    mkdir -p "$1"
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' |
        tee "$1/check.log"
    "$python" -m pytest -m gpu -rs -s --benchmark-enable tests/gpu tests/benchmarks 2>&1 |
        tee -a "$1/check.log"
}

# join NAME: the parts NAME.aa, NAME.ab, ... that were kept, as one file on standard output.
join() {
    cat -- "$root/kept/$1".??
}

workspace() {
    mkdir -p "$root/workspace"
    if [ ! -f "$root/workspace/$dataset" ]; then
        join "$dataset" >"$root/joining"
        mv "$root/joining" "$root/workspace/$dataset"
    fi
    if compgen -G "$root/kept/state.tar.??" >/dev/null && [ ! -d "$root/workspace/cache" ]; then
        join state.tar | tar -x -C "$root/workspace"
    fi
    if [ -f "$root/kept/harness.toml" ]; then
        cp "$root/kept/harness.toml" "$root/workspace/"
    elif [ ! -f "$root/workspace/harness.toml" ]; then
        (cd "$root/workspace" && "$python" -m harness init --preset "${PRESET:-paper-fast}" \
            --dataset "./$dataset")
    fi
}

run() {
    local out=$1 limit=$2 models=() ended=0 name
    shift 2
    mkdir -p "$out"
    for name in "$@"; do models+=(--model "$name"); done
    workspace
    (cd "$root/workspace" && "$python" -m harness run --time-limit "$limit" \
        ${models[@]+"${models[@]}"}) 2>&1 | tee -a "$out/run.log" || ended=${PIPESTATUS[0]}
    [ "$ended" = 0 ] || [ "$ended" = 124 ] || return "$ended"
    if [ -f "$root/workspace/results.db" ]; then
        "$python" scripts/publish.py "$root/workspace" "$root/published" \
            --title "${TITLE:-$dataset, ${PRESET:-paper-fast}}" --note "${NOTE:-}"
        tar -cJ -C "$root" -f "$out/published.tar.xz" published
    fi
    state "$out"
    return "$ended"
}

# state OUT: what was built, Full first since others start from it, in PARTS parts at most.
state() {
    local files=() file bytes=0 room=$((part_bytes * parts - 100000))
    cd "$root/workspace"
    for file in cache/full.pt cache/*.pt cache/*.onnx cache/*.json; do
        case " ${files[*]-} " in *" $file "*) continue ;; esac
        [ -f "$file" ] || continue
        bytes=$((bytes + $(stat -c %s "$file") + 1024))
        [ "$bytes" -le "$room" ] || { echo "no room for $file: not kept" >&2; bytes=$((bytes - $(stat -c %s "$file") - 1024)); continue; }
        files+=("$file")
    done
    cd - >/dev/null
    rm -f "$1"/state.tar.??
    [ "${#files[@]}" = 0 ] || tar -c -C "$root/workspace" "${files[@]}" | split -b "$part_bytes" - "$1/state.tar."
}

case ${1:-} in
    keep | check | run) "$@" ;;
    *) sed -n '2,18p' "$0" >&2; exit 2 ;;
esac
