#!/bin/sh
# checked.sh COMMAND.. -- run a compiler; fail where it says that tensor cores wait for each other or for registers.
# ptxas prints that (C7510 and its neighbours) as information, and no flag makes it an error.
set -eu
said=$(mktemp)
trap 'rm -f "$said"' EXIT
if "$@" >"$said" 2>&1; then status=0; else status=$?; fi
cat "$said" >&2
if grep -q 'C75[0-9][0-9]' "$said"; then
    echo "checked.sh: serialised tensor cores are an error here" >&2
    exit 1
fi
exit "$status"
