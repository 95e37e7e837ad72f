#!/bin/sh
# gpu.sh [FOLDER] -- on a machine with an NVIDIA GPU, nvcc and PyTorch: build, check and measure everything, in under eight
# minutes.  What it says and the JSON files go to FOLDER (default build/gpu); then copy them into benchmarks/.  barelm and
# what its tests want are installed beside that PyTorch, in an environment of their own (pip's PIP_FIND_LINKS and
# PIP_NO_INDEX help where there is no network).
#   ARCH  what nvcc compiles for (default 90a-real: an H100 or H200; 90-real: there without Hopper's own kernels)
#   PYTHON  (default python3)
#   LLMC  llm.c's program and its options, if steps are to be measured beside it: "llm.c/train_gpt2cu -r 0"
#   ONLY  a part: build, tests, sanitizers, peers, operators or steps
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
python=$PWD/build/gpu/venv/bin/python
export BARELM_CUDA_LIBRARY=$PWD/build/gpu/cuda/libbarelm_cuda.so PYTHONUNBUFFERED=1
began=$(date +%s) failed=""

part() { # name, command ...: its output goes to a file of that name, its end to the screen
    name=$1 && shift
    case ${ONLY:-$name} in *"$name"*) ;; *) return ;; esac
    at=$(date +%s)
    if "$@" >"$out/$name.txt" 2>&1; then said=passed; else said=FAILED failed="$failed $name"; fi
    printf '\n==== %s: %s, %s s (%s s in all)\n' "$name" "$said" $(($(date +%s) - at)) $(($(date +%s) - began))
    tail -n 40 "$out/$name.txt"
}

# An environment that sees what $1 has, pip too, even where that is an environment itself.
environment() {
    "$1" -m venv --clear --without-pip build/gpu/venv &&
        "$1" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
            >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
}

build() {
    environment "${PYTHON:-python3}" && "$python" -m pip install -q ".[test]" &&
        cmake -S cuda -B build/gpu/cuda -DBARELM_WERROR=ON "-DCMAKE_CUDA_ARCHITECTURES=${ARCH:-90a-real}" &&
        cmake --build build/gpu/cuda -j8 && "$python" -m barelm doctor
}

# Each has a limit: what waits for ever on the device must not cost what comes after.
tests() { timeout 240 "$python" -m pytest -q --maxfail 20 -k "not planted" tests/test_emulate.py tests/test_emulate_sm90.py tests/test_cuda.py tests/test_cuda_attention.py tests/test_cuda_model.py; }

# each tool over kernels of every file, and a whole step of both families
sanitizers() {
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all "$python" -m pytest -q -x -p no:cacheprovider \
            tests/test_cuda_model.py -k "same_bits_under_every_schedule or session_decodes" || return
        timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py \
            -k "not planted and (odd or smallest) and not big" || return
    done
}

peers() { timeout 120 "$python" -m pytest -q -m peers tests/test_peers_cuda.py; }
operators() { timeout 180 "$python" benchmarks/bench_cuda.py --json "$out/h200-operators.json"; }
steps() { timeout 240 "$python" benchmarks/bench_model.py --device cuda --only gpt2\ 64 --rounds 5 --llmc "${LLMC:-}" --json "$out/h200-steps.json"; }

part build build
part tests tests
part operators operators
part steps steps
part peers peers
part sanitizers sanitizers
test -z "$failed" || { echo "failed:$failed" && exit 1; }
