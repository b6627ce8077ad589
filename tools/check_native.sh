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

tests="matmul linear experts floats moments packing rounding gptq hqq"
build plain ""
for test in $tests; do "$work/plain/${test}_test"; done
build sanitized "-fsanitize=address,undefined -fno-sanitize-recover=all"
for test in $tests; do "$work/sanitized/${test}_test"; done
if command -v valgrind >/dev/null; then
  for test in $tests; do valgrind --quiet --error-exitcode=1 "$work/plain/${test}_test"; done
else
  echo "valgrind is not installed: left out"
fi
