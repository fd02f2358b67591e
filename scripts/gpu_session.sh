#!/usr/bin/env bash
# scripts/gpu_session.sh - the harness on a GPU machine that is lent for minutes, reaches no network
# and keeps nothing: data and earlier results go in by parts, what comes out is few, small files.
#
#   python scripts/pack_images.py cifar10.npz cifar10.packed    at home: 60 % of the size, ...
#   split -b 45M cifar10.packed cifar10.packed.       ... or the .npz itself, in parts to be carried
#   scripts/gpu_session.sh keep cifar10.packed.aa     there, a call a part: kept for the calls after it
#   scripts/gpu_session.sh check OUT                  tests and benchmarks marked gpu; OUT/check.log
#   scripts/gpu_session.sh run OUT 8m full sfp pp3 q4 these variants, until the time is over
#   scripts/gpu_session.sh run OUT 8m                 all ten
#
# `run` ends with 0 when all is done and 124 when work is left: the same call goes on. It leaves in OUT
#   state.tar.*        results, unfinished work, then what took longest to build, as much as fits;
#                      `keep` them on the next machine, before its first run: it goes on from there.
#                      PARTS (4) and PART_BYTES (14000000) say how much is kept; at width 64 training
#                      that is unfinished takes 90 MB
#   published.tar.xz   what scripts/publish.py keeps: report, raw predictions, perturbations
# A harness.toml that was kept is the experiment; else it is PRESET (paper-fast) on DATASET
# (cifar10.npz). Everything is the machine's own python3: nothing is installed.
set -euo pipefail
tree=$(cd "$(dirname "$0")/.." && pwd)
root=${GPU_SESSION:-$HOME/gpu-session}
dataset=${DATASET:-cifar10.npz}
part_bytes=${PART_BYTES:-14000000}
parts=${PARTS:-4}
python=${PYTHON:-python3}
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# The store as one small file, and back.
pack_results='
import lzma, pathlib, sqlite3
pathlib.Path("packed.db").unlink(missing_ok=True)
sqlite3.connect("results.db").execute("VACUUM INTO ?", ("packed.db",))
pathlib.Path("results.db.xz").write_bytes(lzma.compress(pathlib.Path("packed.db").read_bytes()))
pathlib.Path("packed.db").unlink()
'
unpack_results='
import lzma, pathlib
packed = pathlib.Path("results.db.xz")
if packed.exists():
    pathlib.Path("results.db").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
'

keep() {
    local file
    mkdir -p "$root/kept"
    for file in "$@"; do
        # The first part of another state: those of the one before do not belong to it.
        case $file in *state.tar.aa) rm -f "$root"/kept/state.tar.?? ;; esac
    done
    if [ -d "$root/workspace/cache" ] && [[ " $* " == *state.tar.* ]]; then
        echo "this machine has a workspace already: the state is not used" >&2
    fi
    cp -- "$@" "$root/kept/"
    ls -l "$root/kept"
}

check() {
    mkdir -p "$1"
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' |
        tee "$1/check.log"
    (cd "$tree" && "$python" -m pytest -m gpu -rs -s --benchmark-enable tests/gpu \
        tests/benchmarks) 2>&1 | tee -a "$1/check.log"
}

# join NAME: the parts NAME.aa, NAME.ab, ... that were kept, as one file on standard output.
join() {
    compgen -G "$root/kept/$1.??" >/dev/null || {
        echo "error: no part of $1 was kept: scripts/gpu_session.sh keep $1.aa (DATASET names it)" >&2
        exit 1
    }
    cat -- "$root/kept/$1".??
}

workspace() {
    mkdir -p "$root/workspace"
    local packed=${dataset%.npz}.packed
    if [ ! -f "$root/workspace/$dataset" ] && compgen -G "$root/kept/$packed.??" >/dev/null; then
        join "$packed" >"$root/joining"
        "$python" "$tree/scripts/pack_images.py" --unpack "$root/joining" "$root/unpacked.npz"
        mv "$root/unpacked.npz" "$root/workspace/$dataset"
        rm "$root/joining"
    elif [ ! -f "$root/workspace/$dataset" ]; then
        join "$dataset" >"$root/joining"
        mv "$root/joining" "$root/workspace/$dataset"
    fi
    if compgen -G "$root/kept/state.tar.??" >/dev/null && [ ! -d "$root/workspace/cache" ]; then
        # All of it or nothing: half a state would be taken for a whole one.
        rm -rf "$root/unpacking"
        mkdir "$root/unpacking"
        if ! join state.tar | tar -x -C "$root/unpacking" ||
            ! (cd "$root/unpacking" && "$python" -c "$unpack_results"); then
            rm -rf "$root/unpacking"
            echo "error: the parts of state.tar are not one whole state: keep all of it anew" >&2
            exit 1
        fi
        cp -r "$root/unpacking/." "$root/workspace/"
        rm -rf "$root/unpacking"
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
    state "$out" # however it ended: what was built must come back
    if [ -f "$root/workspace/results.db" ]; then
        if "$python" "$tree/scripts/publish.py" "$root/workspace" "$root/published" \
            --title "${TITLE:-$dataset}" --note "${NOTE:-}" \
            --command "harness run${models[*]+ ${models[*]}}"; then
            (cd "$root" && "$python" -m tarfile -c "$out/published.tar.xz" published)
        else
            echo "nothing to report yet" >&2
        fi
    fi
    return "$ended"
}

# state OUT: what is to go on elsewhere, in PARTS parts of PART_BYTES at most.
state() {
    local files=() file size bytes=0 room=$((part_bytes * parts - 20480)) # tar's own end
    cd "$root/workspace"
    if [ -f results.db ]; then
        "$python" -c "$pack_results"
    fi
    # Full before its children; what is quick to build again comes last.
    for file in results.db.xz cache/*_eps*.pt cache/.partial/* cache/full.pt cache/sfp*.pt \
        cache/q?.pt cache/pp?.pt cache/*.json cache/*.onnx; do
        [ -f "$file" ] || continue
        case " ${files[*]-} " in *" $file "*) continue ;; esac
        size=$(($(stat -c %s "$file") + 1536)) # with tar's header and padding
        if [ $((bytes + size)) -gt "$room" ]; then
            echo "no room for $file: it will be built again" >&2
            continue
        fi
        bytes=$((bytes + size))
        files+=("$file")
    done
    rm -f "$1"/state.tar.??
    [ "${#files[@]}" = 0 ] || tar -c "${files[@]}" | split -b "$part_bytes" - "$1/state.tar."
    rm -f results.db.xz
    cd - >/dev/null
}

usage() {
    sed -n '2,/^set /{/^set /d;p}' "$tree/scripts/gpu_session.sh" >&2
    exit 2
}

case ${1:-} in
    keep) [ $# -ge 2 ] || usage; "$@" ;;
    check) [ $# = 2 ] || usage; check "$(realpath -m -- "$2")" ;;
    run) [ $# -ge 3 ] || usage; out=$(realpath -m -- "$2"); shift 2; run "$out" "$@" ;;
    *) usage ;;
esac
