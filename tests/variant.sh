#!/bin/sh
# Build the extension in another way beside the package and run quick tests on that copy.
#   variant.sh asan|tsan|neon PYTHON [pytest arguments]
# asan, tsan: with sanitizers.  Their run time must be in the process before Python starts, hence LD_PRELOAD.
# neon: with the kernels of 64-bit ARM, which SIMDe makes run here; as no other is built, every test takes them.
set -eu
kind=$1 python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2") preload=
shift 2
cd "$(dirname "$0")/.."
folder=build/$kind
case $kind in
asan)
    option=-DBARELM_SANITIZE=ON runs=$("$python" -c "import barelm._core; print(*barelm._core.backends())")
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    # Python itself leaks by design; everything else stops the run.
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$PWD/$folder/report UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    # all that calls C, but files and whole runs of the command line: what they call is called by the rest; and the
    # emulation, which changes stacks
    for name in assistant bench_cuda bench_growth bench_llmc checkpoint choice cuda cuda_attention cuda_attention_sm90 cuda_model \
        cuda_runtime cuda_sm90 documents emulate emulate_sm90 ends folders formats guard import_export incontext init loop \
        ngram plan prepare regurgitate report sentencepiece shards tasks tokenizer train trust vocabulary; do
        set -- --ignore "tests/test_$name.py" "$@"
    done
    # every character of Unicode, and counts by thread (tsan has them), are long loops of what short texts do too
    set -- --deselect tests/test_bpe.py::test_every_character_is_what_tiktoken_takes_it_for \
        --deselect tests/test_bpe.py::test_every_character_is_what_regex_takes_it_for \
        --deselect "tests/test_bpe.py::test_counts_do_not_depend_on_threads_or_batches[gpt4]" "$@"
    # Not the plain loops: in make test, as here, arrays of operators end at pages that cannot be read.
    set -- -m "not slow and not peers" \
        -k "not ref-" "$@"
    ;;
tsan)
    option=-DBARELM_TSAN=ON runs=avx2
    preload=$(gcc -print-file-name=libtsan.so)
    export TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:report_signal_unsafe=0:log_path=$PWD/$folder/report
    export OPENBLAS_NUM_THREADS=1 # NumPy's own threads are not built with the sanitizer: it would accuse them
    # what runs on several threads; avx2 stands for all, for the threads are the same, and plain loops have none
    export BARELM_ISA=$runs
    set -- -m "not slow and not peers" -k "(thread or fork or same_bits) and not ref-" tests/test_threads.py tests/test_model.py \
        tests/test_ops.py tests/test_bpe.py tests/test_session.py tests/test_packed.py "$@"
    ;;
neon)
    option=-DBARELM_SIMDE=ON runs=neon
    set -- -m "not slow and not peers" -k "not ref-" tests/test_ops.py tests/test_model.py tests/test_packed.py tests/test_session.py \
        tests/test_sampling.py tests/test_held.py tests/test_lora.py tests/test_threads.py "$@"
    ;;
*) echo "variant.sh: asan, tsan or neon, not $kind" >&2 && exit 2 ;;
esac
# Left out: what measures the process itself, whose memory and time are the sanitizer's here; and of what runs long one of
# two patterns, which are the same code.
set -- --deselect "tests/test_bpe.py::test_counts_do_not_depend_on_threads_or_batches[gpt2]" \
    --deselect tests/test_model.py::test_memory_is_what_the_process_takes \
    --deselect tests/test_session.py::test_memory_does_not_grow_over_thousands_of_rows \
    --deselect tests/test_session_load.py::test_a_process_holds_little_more_than_packed_weights_and_cache \
    --deselect tests/test_bpe.py::test_too_little_memory_is_an_error \
    --deselect tests/test_threads.py::test_ctrl_c_ends_a_long_call \
    --deselect tests/test_threads.py::test_a_handler_may_ask_the_model_that_computes "$@"
"$python" -m pip install --quiet --disable-pip-version-check pybind11 cmake
bin=$(dirname "$python")
for name in avx512_bf16 avx512 avx2; do # what cannot run here is compiled, with all warnings, when barelm is installed
    case " $runs " in *" $name "*) ;; *) option="$option -DBARELM_CAN_BUILD_$name=0" ;; esac
done
# As a user builds without pip: with whatever cmake takes by itself.
"$bin/cmake" -S . -B "$folder" -DPython_EXECUTABLE="$python" -DBARELM_WERROR=ON $option >/dev/null
"$bin/cmake" --build "$folder" -j2
rm -rf "$folder/package"
mkdir -p "$folder/package"
cp -r python/barelm "$folder/package/"
rm -f "$folder"/package/barelm/_core*
cp "$folder"/_core*.so "$folder/package/barelm/"
# Address space randomisation with many bits collides with the thread sanitizer's fixed map.
run=$(command -v setarch >/dev/null && echo "setarch -R" || echo)
rm -f "$folder"/report*
PYTHONPATH=$folder/package $run env LD_PRELOAD="$preload" "$python" -m pytest -q "$@" && exit
cat "$folder"/report* 2>/dev/null
exit 1
