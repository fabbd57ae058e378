#!/usr/bin/env bash
# Makes .venv ready for everything in this repository, and does nothing when it already is.
#
# No compiler is needed: where pip finds no wheel of mmcv with compiled operators, mmcv comes without, and e3va_mm brings
# those that detectors and segmentors need (e3va_mm/ops).
#
# PYTHON         interpreter to start from (default: python3; 3.10 to 3.13)
# PIP_FIND_LINKS folders with ready wheels, as pip reads it
# MMCV_OPS       build: compile mmcv's operators, which takes a C++ compiler, and nvcc for a GPU
# TORCH_CUDA_ARCH_LIST   GPUs to compile them for (default: those that are there; without one, all that torch knows)
# MMCV_VERSION   version of onedl-mmcv
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
mmcv_version=${MMCV_VERSION:-2.3.6}
mmcv_ops=${MMCV_OPS:-}
venv=.venv
stamp=$venv/ready-$(cat requirements/pinned.txt setup.py tools/setup.sh | cksum | cut -d' ' -f1)-$mmcv_version${mmcv_ops:+-$mmcv_ops}
[ -f "$stamp" ] && exit 0

say() { printf '\n[setup] %s\n' "$*"; }
die() { printf '\n[setup] error: %s\n' "$*" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# A person sees pip's own progress; a log does not need it.
install() { if [ -t 1 ]; then pip install "$@"; else pip install --quiet "$@"; fi; }

has_ops() { "$venv/bin/python" -c 'import torch, mmcv._ext' 2>/dev/null; }
torch_has_cuda() { "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.version.cuda)'; }
ops_have_cuda() {
    "$venv/bin/python" -c 'import sys, torch, mmcv._ext as e; sys.exit(e.get_compiling_cuda_version() == "not available")'
}
# Operators for the CPU alone would be in the way beside a torch with CUDA, unless no others can be built: e3va_mm's run
# on a GPU.
has_fitting_ops() {
    has_ops || return
    ops_have_cuda || ! torch_has_cuda || { [ "$mmcv_ops" = build ] && ! can_build_cuda; }
}

check_machine() {
    [ -z "$mmcv_ops" ] || [ "$mmcv_ops" = build ] || die "MMCV_OPS=$mmcv_ops is not known; leave it out, or say build"
    command -v "$python" >/dev/null || die "$python not found; set PYTHON to a Python 3.10 to 3.13"
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
        die "$("$python" --version) is not 3.10 to 3.13; set PYTHON to one that is"
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    say "making a virtual environment in $venv"
    "$python" -m venv "$venv" || die "$python -m venv failed (on Debian: apt-get install python3-venv)"
}

install_pinned() {
    say 'installing the pinned packages (torch, mmengine, mmdetection, mmsegmentation, tools)'
    install --requirement requirements/pinned.txt
    if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
        say 'opencv-python needs libGL, which is missing here: taking the headless build'
        install --force-reinstall --no-deps opencv-python-headless==4.12.0.88
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
    torch_has_cuda && command -v nvcc >/dev/null
}

# --no-cache-dir: pip's own cache knows nothing of the torch that a wheel was built against.
install_ready_mmcv() {
    pip install --quiet --no-cache-dir --only-binary=:all: --find-links "$(wheel_cache)" \
        "onedl-mmcv==$mmcv_version" 2>/dev/null && has_fitting_ops
}

# Built apart from torch, which is what makes it a wheel without operators: seconds, and no compiler.
install_plain_mmcv() {
    say "installing mmcv $mmcv_version without compiled operators; e3va_mm brings those that it needs"
    MMCV_WITH_OPS=0 install --no-cache-dir --no-deps --no-binary onedl-mmcv "onedl-mmcv==$mmcv_version"
    install "onedl-mmcv==$mmcv_version"  # what it depends on
}

# Without a GPU in sight torch's build tools find none to compile for, and end in an IndexError.
gpus_to_build_for() {
    "$venv/bin/python" -c '
import re, torch
if not torch.cuda.is_available():
    print(";".join(f"{a}.{b}" for a, b in re.findall(r"sm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")))'
}

build_mmcv() {
    local cores started=$SECONDS log=$venv/mmcv-build.log
    cores=$(nproc)
    command -v "${CXX:-c++}" >/dev/null || die 'no C++ compiler found, which MMCV_OPS=build needs (on Debian: apt-get install g++)'
    local -a flags=(MMCV_WITH_OPS=1 "MAX_JOBS=$cores" CFLAGS=-g0 CXXFLAGS=-g0)
    if can_build_cuda; then
        flags+=(FORCE_CUDA=1)
        local gpus=${TORCH_CUDA_ARCH_LIST:-$(gpus_to_build_for)}
        if [ -n "$gpus" ]; then flags+=("TORCH_CUDA_ARCH_LIST=$gpus"); fi
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
if ! has_fitting_ops; then
    say 'looking for a ready wheel of mmcv with compiled operators'
    if ! install_ready_mmcv; then
        pip uninstall --quiet --yes onedl-mmcv 2>/dev/null || true
        if [ "$mmcv_ops" = build ]; then build_mmcv; else install_plain_mmcv; fi
    fi
fi
say 'installing e3va_mm from this folder'
install --no-deps --no-build-isolation --editable .
touch "$stamp"
say "ready: $venv"
