#!/usr/bin/env bash
# Makes .venv ready for everything in this repository, and does nothing when it already is.
#
# PYTHON         interpreter to start from (default: python3; 3.10 to 3.12)
# PIP_FIND_LINKS folders with ready wheels, as pip reads it
# MMCV_VERSION   version of onedl-mmcv
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
mmcv_version=${MMCV_VERSION:-2.3.6}
venv=.venv
stamp=$venv/ready-$(cat requirements/pinned.txt setup.py tools/setup.sh | cksum | cut -d' ' -f1)-$mmcv_version
[ -f "$stamp" ] && exit 0

say() { printf '\n[setup] %s\n' "$*"; }
die() { printf '\n[setup] error: %s\n' "$*" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
has_ops() { "$venv/bin/python" -c 'import torch, mmcv._ext' 2>/dev/null; }

check_machine() {
    command -v "$python" >/dev/null || die "$python not found; set PYTHON to a Python 3.10, 3.11 or 3.12"
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
        die "$("$python" --version) is not 3.10 to 3.12; set PYTHON to one that is"
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    say "making a virtual environment in $venv"
    "$python" -m venv "$venv" || die "$python -m venv failed (on Debian: apt-get install python3-venv)"
}

install_pinned() {
    say 'installing the pinned packages (torch, mmengine, mmdetection, mmsegmentation, tools)'
    pip install --quiet setuptools wheel
    pip install --quiet --requirement requirements/pinned.txt
    if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
        say 'opencv-python needs libGL, which is missing here: taking the headless build'
        pip install --quiet --force-reinstall --no-deps opencv-python-headless==4.12.0.88
    fi
}

# A wheel of mmcv's ops fits one torch build on one Python, so the cache is kept by both.
wheel_cache() {
    local build
    build=$("$venv/bin/python" -c 'import sys, torch; print(f"torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}")')
    if can_build_cuda; then build=$build-cuda-ops; fi
    echo "${XDG_CACHE_HOME:-$HOME/.cache}/e3va_mm/wheels/$build"
}

can_build_cuda() {
    [ "$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")')" != '' ] && command -v nvcc >/dev/null
}

# --no-cache-dir: pip's own cache knows nothing of the torch that a wheel was built against.
install_ready_mmcv() {
    pip install --quiet --no-cache-dir --only-binary=:all: --find-links "$(wheel_cache)" \
        "onedl-mmcv==$mmcv_version" 2>/dev/null && has_ops
}

build_mmcv() {
    local cores started=$SECONDS log=$venv/mmcv-build.log
    cores=$(nproc)
    command -v "${CXX:-c++}" >/dev/null || die 'no C++ compiler found; mmcv has ops to build (on Debian: apt-get install g++)'
    local -a flags=(MMCV_WITH_OPS=1 "MAX_JOBS=$cores" CFLAGS=-g0 CXXFLAGS=-g0)
    if can_build_cuda; then
        flags+=(FORCE_CUDA=1)
        say "building mmcv $mmcv_version with CUDA ops on $cores cores; this can take half an hour. Log: $log"
    else
        flags+=(CUDA_VISIBLE_DEVICES= FORCE_CUDA=0)
        say "building mmcv $mmcv_version with CPU ops on $cores cores; about 5 minutes on 2. Log: $log"
        "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' &&
            say 'note: torch has CUDA but there is no nvcc, so mmcv gets CPU ops only'
    fi
    env PATH="$PWD/$venv/bin:$PATH" "${flags[@]}" "$venv/bin/python" -m pip wheel --verbose --no-cache-dir --no-deps \
        --no-build-isolation --no-binary onedl-mmcv --wheel-dir "$(wheel_cache)" "onedl-mmcv==$mmcv_version" \
        >"$log" 2>&1 || { tail -n 30 "$log" >&2; die "building mmcv failed, see $log"; }
    say "built mmcv in $((SECONDS - started)) s; the wheel is kept in $(wheel_cache)"
    pip install --quiet --no-cache-dir --only-binary=:all: --force-reinstall --no-deps \
        "$(wheel_cache)"/onedl_mmcv-"$mmcv_version"-*.whl
    has_ops || die "mmcv was built, but its ops can not be imported; see $log"
}

check_machine
make_venv
install_pinned
say 'looking for a ready wheel of mmcv'
install_ready_mmcv || { pip uninstall --quiet --yes onedl-mmcv 2>/dev/null || true; build_mmcv; }
pip install --quiet --no-deps --no-build-isolation --editable .
touch "$stamp"
say "ready: $venv"
