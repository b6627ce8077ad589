#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace halfbin {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers Cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_max(0, nullptr) < leaf) return r;
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool Bit(uint32_t word, int bit) { return (word >> bit & 1u) != 0; }

// The register states that the operating system saves, XCR0: bits 1 and 2 for AVX, 5 to 7 for AVX-512, 17 and 18 for AMX.
uint64_t SavedStates() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux lends the tile registers to a process that asks for them.
bool AskForTiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

}  // namespace

std::vector<std::string> CpuFeatures() {
  std::vector<std::string> found;
  [[maybe_unused]] const auto add = [&found](bool here, const char* name) {
    if (here) found.emplace_back(name);
  };
#if defined(__x86_64__)
  const Registers one = Cpuid(1, 0), seven = Cpuid(7, 0), more = Cpuid(7, 1);
  add(Bit(one.ecx, 1) && Bit(one.ecx, 19), "pclmul");  // with SSE4.1; its registers are saved on every x86-64
  if (!Bit(one.ecx, 27)) return found;  // OSXSAVE: xgetbv may be asked
  const uint64_t saved = SavedStates();
  const auto saves = [saved](uint64_t states) { return (saved & states) == states; };
  const bool avx2 = saves(0x6) && Bit(one.ecx, 12) && Bit(one.ecx, 29) && Bit(seven.ebx, 5);  // with FMA and F16C
  const bool avx512 = avx2 && saves(0xe6) && Bit(seven.ebx, 16) && Bit(seven.ebx, 17) && Bit(seven.ebx, 30) &&
                      Bit(seven.ebx, 31);  // F, DQ, BW, VL
  add(avx2, "avx2");
  add(avx2 && Bit(more.eax, 4), "avx_vnni");
  add(avx512, "avx512");
  add(avx512 && Bit(seven.ecx, 11), "avx512_vnni");
  add(avx512 && Bit(seven.ecx, 1), "avx512_vbmi");
  add(avx512 && Bit(more.eax, 5), "avx512_bf16");
  const bool tiles = avx512 && saves(0x60000) && Bit(seven.edx, 24) && Bit(seven.edx, 25) && AskForTiles();
  add(tiles, "amx_int8");
  add(tiles && Bit(seven.edx, 22), "amx_bf16");
#elif defined(__aarch64__)
  add(true, "neon");
#if defined(__linux__)
  const unsigned long capabilities = getauxval(AT_HWCAP), capabilities2 = getauxval(AT_HWCAP2);
  add((capabilities >> 7 & 1ul) != 0, "neon_crc");
  add((capabilities >> 20 & 1ul) != 0, "neon_dotprod");
  add((capabilities2 >> 13 & 1ul) != 0, "neon_i8mm");
#elif defined(__APPLE__)
  add(true, "neon_crc");  // these two on every Apple processor that runs Python 3.11
  add(true, "neon_dotprod");
#endif
#endif
  return found;
}

}  // namespace halfbin
