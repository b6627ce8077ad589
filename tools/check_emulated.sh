#!/bin/sh
# Builds csrc for other processors and runs its tests under emulation. 64-bit Arm: on a model with matrix products of bytes, on one with
# dot products only, and on one with neither, where the plain loops must be chosen. 32-bit Arm and x86 have the plain loops alone.
#
# On Debian: apt-get install qemu-user g++-aarch64-linux-gnu g++-arm-linux-gnueabihf g++-i686-linux-gnu
#
#   tools/check_emulated.sh [FOLDER]     where to build; a folder of its own otherwise
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}

build() {  # processor, target's name
  cmake -S "$here" -B "$work/$1" -DHALFBIN_NATIVE_TESTS=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR="$1" -DCMAKE_CXX_COMPILER="$2-g++" >/dev/null
  cmake --build "$work/$1" -j 2 >/dev/null
}

check() {  # emulator, processor, target's name, model, instruction sets that must be found
  emulator=$1 tests=$work/$2 libraries=/usr/$3 model=$4
  shift 4
  echo "$model: $*"
  "$emulator" -cpu "$model" -L "$libraries" "$tests/linear_test" "$@"
  for test in matmul experts floats packing rounding gptq hqq; do "$emulator" -cpu "$model" -L "$libraries" "$tests/${test}_test"; done
}

build aarch64 aarch64-linux-gnu
check qemu-aarch64 aarch64 aarch64-linux-gnu max neon_i8mm neon_dotprod portable
check qemu-aarch64 aarch64 aarch64-linux-gnu cortex-a76 neon_dotprod portable
check qemu-aarch64 aarch64 aarch64-linux-gnu cortex-a53 portable
build arm arm-linux-gnueabihf
check qemu-arm arm arm-linux-gnueabihf max portable
build i686 i686-linux-gnu
check qemu-i386 i686 i686-linux-gnu max portable
