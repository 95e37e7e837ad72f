#!/bin/sh
# Fuzz the readers by libFuzzer with the extension built by sanitizers: fuzz.sh PYTHON [arguments of fuzz_guided.py]
# What it finds is kept in build/asan.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
sh tests/variant.sh asan "$python" --version >/dev/null # builds it
# The sanitizers bring functions by the names of libFuzzer's, which do nothing: libFuzzer must be in the process before
# them, and atheris' mutator, which it looks for when it is loaded.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
g++ -shared -o build/asan/libfuzzer.so -Wl,--whole-archive "$packages"/libclang_rt.fuzzer_no_main.a -Wl,--no-whole-archive
# Half of the time was the sanitizer's: to remember the stack of every allocation, and to fill it.
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=8:verify_asan_link_order=0
export ASAN_OPTIONS="$ASAN_OPTIONS:malloc_context_size=1:max_malloc_fill_size=0"
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=build/asan/package
preload="$PWD/build/asan/libfuzzer.so $(echo "$packages"/atheris/custom_mutator.*.so)"
preload="$preload $(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
exec env LD_PRELOAD="$preload" "$python" tests/fuzz_guided.py -artifact_prefix=build/asan/ "$@"
