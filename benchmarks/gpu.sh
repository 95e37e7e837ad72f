#!/bin/sh
# gpu.sh [FOLDER] -- on a machine with an NVIDIA GPU, nvcc and PyTorch: build, check and measure.  What it says goes to
# FOLDER (default build/gpu), a file for each group of parts, with the JSON files; then copy those into benchmarks/.
# barelm is installed beside that PyTorch, in an environment of its own, without a network where all it needs is there.
# Whatever fails or hangs, the rest goes on; at the end stands what passed.
#   ONLY  parts or groups, by name (default all): build, tests (or of them test_emulate_sm90 ..), operators, steps, peers,
#         sanitizers (or of them memcheck racecheck synccheck initcheck)
#   BARELM_CUDA_LIBRARY  the kernels, where they have been built: then they are not
#   ARCH  what nvcc compiles for (default 90a-real: an H100 or H200; 90-real: there without Hopper's own kernels)
#   PYTHON  (default python3)
#   BARELM_TEST_DATA  real text, for one test of peers, which says where it is missing
#   LLMC  llm.c's program and its options, if steps are to be measured beside it: "llm.c/train_gpt2cu -r 0"
# All in one takes up to half an hour.  In calls of at most ten minutes, each of which builds where nothing is kept:
#   ONLY="build tests"    ONLY="build operators steps peers"    ONLY="build memcheck"    .. and so on
set -u
cd "$(dirname "$0")/.." || exit
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
python=$PWD/build/gpu/venv/bin/python
given=${BARELM_CUDA_LIBRARY:+$(realpath "$BARELM_CUDA_LIBRARY")}
export BARELM_CUDA_LIBRARY="${given:-$PWD/build/gpu/cuda/libbarelm_cuda.so}" PYTHONUNBUFFERED=1
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer
began=$(date +%s) passed="" failed=""

wanted() { # its names: is one of them in ONLY?
    for name in ${ONLY:-$*}; do
        case " $* " in *" $name "*) return 0 ;; esac
    done
    return 1
}

# As Ctrl-C first: then tests say what failed so far.
limited() { timeout -s INT -k 20 "$limit" "$@"; }

# names, seconds, command ...: what it says is added to the file of its first name, how it ended is said here
part() {
    names=$1 limit=$2 && shift 2
    # shellcheck disable=SC2086 # words
    wanted $names || return 0
    at=$(date +%s) part=$(echo "${names#* }" | tr ' ' -)
    "$@" >"$out/now.txt" 2>&1
    code=$?
    case $code in
    0) said=passed passed="$passed $part" ;;
    124 | 137) said="FAILED, after its $limit s" failed="$failed $part" ;;
    *) said="FAILED, $code" failed="$failed $part" ;;
    esac
    said="==== $part: $said, $(($(date +%s) - at)) s ($(($(date +%s) - began)) s in all)"
    { cat "$out/now.txt" && echo "$said"; } >>"$out/${names%% *}.txt"
    if test $code = 0; then tail -n 8 "$out/now.txt"; else tail -n 40 "$out/now.txt"; fi
    echo "$said"
    rm "$out/now.txt"
}

# An environment that sees what $1 has, pip too, even where that is an environment itself.
environment() {
    "$1" -m venv --clear --without-pip build/gpu/venv &&
        "$1" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
            >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
}

# With what is there already; else with what can be fetched.
install() {
    limited "$python" -m pip install -q --no-build-isolation --no-deps . &&
        "$python" -c "import barelm.__main__, hypothesis, pytest, regex, xdist" && return
    echo "something is missing here: pip fetches it"
    limited "$python" -m pip install -q --retries 1 --timeout 10 ".[test]"
}

# What BARELM_WERROR stops, but for warnings: spilled registers, and tensor cores that wait for each other.
kernels() {
    cmake -S cuda -B build/gpu/cuda "-DCMAKE_CUDA_ARCHITECTURES=${ARCH:-90a-real}" \
        "-DCMAKE_CUDA_FLAGS=-Xptxas --warn-on-spills,--warning-as-error" \
        "-DCMAKE_CUDA_COMPILER_LAUNCHER=sh;$PWD/cuda/checked.sh" &&
        limited cmake --build build/gpu/cuda "-j$(nproc)"
}

build() {
    nvidia-smi
    "${CUDACXX:-nvcc}" --version
    environment "${PYTHON:-python3}" && install && { test -n "$given" || kernels; } && "$python" -m barelm doctor
}

# What hangs or loses the GPU costs its own test: another process goes on with the rest (-n 1).  Skips are listed, with
# what is missing.  Warnings of another Python or NumPy than ours are not failures.
tested() { # file, seconds that each of its tests has
    limited "$python" -m pytest -q -n 1 --max-worker-restart 50 -W default -p no:cacheprovider -k "not planted" \
        -o faulthandler_timeout="$2" -o faulthandler_exit_on_timeout=true "tests/$1.py"
}

# A tool over the few tests of a file that reach kernels of every kind.
sanitized() { # tool, file, which of its tests
    level=$(test "$1" = racecheck && echo "--racecheck-detect-level error")
    # shellcheck disable=SC2086 # words
    limited compute-sanitizer --tool "$1" $level --error-exitcode 9 --print-limit 20 "$python" -m pytest -q -W default \
        -p no:cacheprovider -p no:xdist -k "not planted and ($3)" "tests/$2.py"
}

operators() { limited "$python" benchmarks/bench_cuda.py --json "$out/h200-operators.json"; }
steps() {
    limited "$python" benchmarks/bench_model.py --device cuda --only "gpt2 64" --rounds 5 --llmc "${LLMC:-}" \
        --json "$out/h200-steps.json"
}

part build 420 build
for file in test_emulate_sm90:90 test_emulate:60 test_cuda_runtime:60 test_cuda:120 test_cuda_attention:120 test_cuda_model:90; do
    part "tests ${file%:*}" "${file#*:}" tested "${file%:*}" 30
done
part operators 180 operators
part steps 240 steps
part peers 120 tested test_peers_cuda 60
for tool in memcheck racecheck synccheck initcheck; do
    part "sanitizers $tool attention" 100 sanitized $tool test_cuda_attention \
        "((bf16-64 or bf16-128) and not (three or documents or long)) or (fill and more)"
    part "sanitizers $tool operators" 100 sanitized $tool test_cuda "(odd or smallest or edges or bytes) and every_schedule"
    part "sanitizers $tool model" 100 sanitized $tool test_cuda_model "in_bf16_is_close or session_decodes"
done
echo "passed:${passed:- nothing}"
test -z "$failed" || { echo "FAILED:$failed" && exit 1; }
