#!/bin/sh
# Fuzz the readers by libFuzzer with the extension built by sanitizers: fuzz.sh PYTHON [arguments of fuzz_guided.py]
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
sh tests/sanitize.sh asan "$python" --collect-only >/dev/null # builds it
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=8 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" PYTHONPATH=build/asan/package
exec "$python" tests/fuzz_guided.py -artifact_prefix=build/asan/ "$@" # where what it finds is kept
