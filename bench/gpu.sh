#!/usr/bin/env bash
# The one command for a machine with a GPU: builds the native code where that is possible, runs the GPU tests, holds the
# laws of every op and backend, tunes, times every GPU case and writes bench/results/<device>.json and kernels/*/tuned.json.
# The persistent sampler is tried alone first, as one that waits for itself would wait forever: if its tests do not pass in
# time, the library of CUDA kernels is set aside for the rest of the call, and everything else goes on without it.
#
#     bash bench/gpu.sh            PYTHON=python3.12 bash bench/gpu.sh
#
# Needs Python with torch, numpy and pytest; no network, no install: fastvid is taken from this checkout. Done within
# 9 minutes. Each finished step is remembered for this device and these sources under out/gpu/, with its log, so that a
# second call does only what is left. Exit codes: 0 all done; 1 a step failed; 3 no CUDA device; 4 out of time.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
deadline=$((SECONDS + 530))

if ! told=$("$python" -c 'import torch
print(torch.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'); then
    echo "gpu.sh: $python cannot import torch; name one that can: PYTHON=... bash bench/gpu.sh"
    exit 1
fi
{ read -r version; read -r device; } <<<"$told"
if [ -z "$device" ]; then
    echo "gpu.sh: no CUDA device was found by torch $version; nothing was run."
    exit 3
fi

sources=$(find CMakeLists.txt pyproject.toml fastvid kernels bench tests -type f \
    -regex '.*\.\(py\|c\|cpp\|cu\|h\|sh\|txt\|toml\)' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
state=out/gpu/$(printf %s "$device" | tr -c 'A-Za-z0-9' '-')-$sources
mkdir -p "$state"
echo "gpu.sh: $device; steps are remembered in $state"

failed=() late=()

# step NAME SECONDS COMMAND...: runs a command once, within its own limit and what is left of the whole
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code
    shift 2
    if [ -e "$state/$name.done" ]; then
        echo "== $name: done before ($(cat "$state/$name.done"))"
        return
    fi
    if [ "$left" -lt 10 ]; then
        late+=("$name")
        echo "== $name: no time left"
        return
    fi
    local cut=
    [ "$limit" -lt "$left" ] || { limit=$left; cut=yes; }
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$state/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" = 0 ]; then
        echo "$((SECONDS - started)) s" >"$state/$name.done"
    elif [ "$code" = 124 ] && [ -n "$cut" ]; then
        late+=("$name")
    else
        failed+=("$name (exit code $code$([ "$code" = 124 ] && echo ", over $limit s"))")
    fi
}

build() {
    if ! command -v cmake >/dev/null; then
        echo "no cmake: no native code, everything works through torch and Triton"
        return
    fi
    local generator=()
    command -v ninja >/dev/null && generator=(-G Ninja)
    # the libraries land beside the package, where a checkout looks for them
    cmake -S . -B build/gpu "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native &&
        cmake --build build/gpu -j "$(nproc)" && cmake --install build/gpu --prefix .
}

pytest_gpu() {
    "$python" -m pytest -q -m "gpu and not slow and not long" -p no:cacheprovider -rs "$@"
}

gpu_tests() {
    local files parallel=()
    mapfile -t files < <("$python" bench/gpu_tests.py | grep -vxF "$persistent")
    [ "${#files[@]}" -gt 0 ] || { echo "no test names a GPU"; return 1; }
    # most of the time goes into compiling kernels, which many processes do faster
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
    pytest_gpu "${parallel[@]}" "${files[@]}"
}

cuda=fastvid/libfastvid_cuda.so aside=$state/libfastvid_cuda.so
put_back() { [ ! -e "$aside" ] || mv "$aside" "$cuda"; }

# cases PATTERN: times the GPU cases whose name fits
cases() {
    local case
    for case in $(awk -v fits="$1" '$1 ~ /_gpu/ && $1 ~ fits { print $1 }' <<<"$list"); do
        step "$case" 100 "$python" bench/run.py --case "$case" --json bench/results/
    done
}
persistent=tests/ops/test_pixelcnn_sampler_cuda.py
export -f build pytest_gpu gpu_tests
export python persistent

put_back # a call that was killed may have left it there
trap put_back EXIT
step build 150 bash -c build
if [ -e "$persistent" ] && [ -e "$cuda" ]; then
    step persistent 60 bash -c 'pytest_gpu "$persistent"'
    if [ ! -e "$state/persistent.done" ]; then
        mv "$cuda" "$aside"
        echo "the library of CUDA kernels is set aside"
    fi
fi
step tests 200 bash -c gpu_tests
step verify 120 "$python" bench/status.py --verify --json bench/results/
list=$("$python" bench/run.py --list)
[[ $list == *_gpu* ]] || failed+=("list of cases")
cases '^sample_'
step tune 180 "$python" bench/run.py --tune
cases '^[^s]'

[ "${#late[@]}" = 0 ] || echo "gpu.sh: not done in time: ${late[*]}; call it again to go on."
[ "${#failed[@]}" = 0 ] || { printf 'gpu.sh: failed: %s\n' "${failed[@]}"; exit 1; }
[ "${#late[@]}" = 0 ] || exit 4
echo "gpu.sh: all done in $SECONDS s; results are in bench/results/ and kernels/*/tuned.json"
echo "gpu.sh: to put them into the README: $python bench/status.py --write"
