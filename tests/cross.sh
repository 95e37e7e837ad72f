#!/bin/sh
# Compile every C file for 64-bit ARM, Linux and macOS, with warnings as errors: cross.sh PYTHON, which has ziglang (clang
# with the headers of both).
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
folder=build/cross
export python folder
for target in aarch64-linux-gnu aarch64-macos; do
    mkdir -p "$folder/$target"
    for file in csrc/*.c; do echo "$target $file"; done
done | xargs -P 2 -L 1 sh -c '"$python" -m ziglang cc -target "$0" -O1 -std=gnu11 -ffp-contract=off -Wall -Wextra -Werror \
    "-DBARELM_ISAS=X(neon)" -c "$1" -o "$folder/$0/$(basename "$1" .c).o" || exit 255'
