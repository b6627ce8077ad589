#!/bin/sh
# Builds csrc without Python and runs its tests: as they are, under the address and undefined-behaviour sanitizers, and under valgrind
# where it is installed. valgrind knows no AVX-512 and no AMX: it sees what a processor without them would run.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}

build() {
  cmake -S "$here" -B "$work/$1" -DHALFBIN_NATIVE_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="$2" >/dev/null
  cmake --build "$work/$1" -j 2 >/dev/null
}

build plain ""
"$work/plain/matmul_test"
"$work/plain/linear_test"
"$work/plain/moments_test"
build sanitized "-fsanitize=address,undefined -fno-sanitize-recover=all"
"$work/sanitized/matmul_test"
"$work/sanitized/linear_test"
"$work/sanitized/moments_test"
if command -v valgrind >/dev/null; then
  valgrind --quiet --error-exitcode=1 "$work/plain/matmul_test"
  valgrind --quiet --error-exitcode=1 "$work/plain/linear_test"
  valgrind --quiet --error-exitcode=1 "$work/plain/moments_test"
else
  echo "valgrind is not installed: left out"
fi
