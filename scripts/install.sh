#!/usr/bin/env bash
# scripts/install.sh VENV EXTRAS - a virtual environment with the harness in it, at the versions
# of constraints.txt. Done again only when pyproject.toml or constraints.txt changed.
# Without an NVIDIA GPU, PyTorch comes in its CPU build: the default one pulls gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
extras=$2
python=${PYTHON:-python3}

stamp="$venv/.installed-$extras-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
[ -f "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        # Debian and Ubuntu ship venv apart from python3.
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        root=""
        [ "$(id -u)" = 0 ] || root="sudo -n"
        echo "installing python$version-venv" >&2
        $root apt-get update -qq >&2 && $root apt-get install -y -qq "python$version-venv" >&2 || {
            echo "error: no venv module; run: sudo apt-get install python$version-venv" >&2
            exit 1
        }
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check)
torch=$(sed -n 's/^torch==//p' constraints.txt)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    # Wherever a CPU build is to be had: the configured indexes, then PyTorch's own.
    "${pip[@]}" install -q -c constraints.txt "torch==$torch+cpu" 2>/dev/null ||
        "${pip[@]}" install -q -c constraints.txt --retries 0 --timeout 15 \
            --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null ||
        echo "no CPU build of PyTorch $torch found: installing the default build (large)" >&2
fi
target=.
[ "$extras" = none ] || target=".[$extras]"
echo "installing the harness into $venv" >&2
"${pip[@]}" install -q -c constraints.txt -e "$target"
touch "$stamp"
