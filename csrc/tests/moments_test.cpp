// Checksums, second moments and norms on every instruction set that this processor runs, without Python: for sanitizers and valgrind.
// Memory of each size is allocated exactly. Prints what differs; exit code 1 then.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checksum/crc32.h"
#include "cpu/features.h"
#include "moments/syrk.h"
#include "norms/norms.h"

namespace {

using namespace halfbin;

std::mt19937 generator(1);

int WrongChecksums(Crc32Kernel kernel) {
  int wrong = 0;
  for (size_t size = 0; size < 300; ++size) {
    std::vector<uint8_t> bytes(size);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
    uint32_t expected = ~0u;  // bit by bit
    for (const uint8_t byte : bytes) {
      expected ^= byte;
      for (int bit = 0; bit < 8; ++bit) expected = expected >> 1 ^ ((expected & 1u) != 0 ? 0xedb88320u : 0u);
    }
    wrong += Crc32(kernel, 0, bytes.data(), size) != ~expected;
  }
  return wrong;
}

int WrongMoments(SyrkKernel kernel) {
  int wrong = 0;
  for (const size_t n : {1, 7, 48, 50, 400}) {
    for (const size_t num_tokens : {1, 3, 257}) {
      std::vector<float> x(n * num_tokens), product(n * n);
      for (float& v : x) v = static_cast<float>(static_cast<int>(generator() % 15) - 7);  // sums are exact
      std::vector<double> sum(n * n, 1.0);
      const Strip strip{0, n, sum.data()};
      AddToStrips(kernel, {x.data(), num_tokens, n}, &strip, 1, 2);
      UpperProduct(kernel, {x.data(), num_tokens, n}, product.data(), 1);
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = i; j < n; ++j) {
          double expected = 0;
          for (size_t t = 0; t < num_tokens; ++t) expected += static_cast<double>(x[t * n + i]) * x[t * n + j];
          wrong += product[i * n + j] != expected || sum[i * n + j] != expected + 1;
        }
      }
    }
  }
  return wrong;
}

// Of float32, against float64: at most eight roundings apart. Of bfloat16, against the plain loop, to the bit.
int WrongNorms(RmsNormKernel kernel) {
  int wrong = 0;
  for (const size_t n : {1, 15, 16, 17, 33, 100}) {
    constexpr size_t kTokens = 3;
    std::vector<float> x(kTokens * n), weight(n), y(kTokens * n);
    for (float& v : x) v = static_cast<float>(static_cast<int>(generator() % 2001) - 1000) / 100;
    for (float& v : weight) v = static_cast<float>(static_cast<int>(generator() % 2001) - 1000) / 500;
    for (const bool one_plus : {false, true}) {
      RunRmsNorm(kernel, {x.data(), weight.data(), y.data(), kTokens, n, 1e-5f, one_plus, false}, 2);
      for (size_t i = 0; i < kTokens * n; ++i) {
        double squares = 0;
        for (size_t j = 0; j < n; ++j) squares += std::pow(x[i / n * n + j], 2.0);
        const double scaled = x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5);
        const double magnitude = std::abs(scaled) * (std::abs(weight[i % n]) + one_plus);
        wrong += std::abs(y[i] - scaled * (weight[i % n] + one_plus)) > 8 * 0x1p-24 * magnitude;
      }
      std::vector<uint16_t> half(kTokens * n), half_weight(n), got(kTokens * n), plain(kTokens * n);
      for (size_t i = 0; i < half.size(); ++i) std::memcpy(&half[i], reinterpret_cast<const char*>(&x[i]) + 2, 2);
      for (size_t i = 0; i < n; ++i) std::memcpy(&half_weight[i], reinterpret_cast<const char*>(&weight[i]) + 2, 2);
      RunRmsNorm(kernel, {half.data(), half_weight.data(), got.data(), kTokens, n, 1e-5f, one_plus, true}, 2);
      RunRmsNorm(kRmsNormPortable, {half.data(), half_weight.data(), plain.data(), kTokens, n, 1e-5f, one_plus, true}, 1);
      wrong += got != plain;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  const std::vector<std::string> here = CpuFeatures();
  int wrong = 0;
  for (const char* name : {"portable", "pclmul", "neon_crc", "avx2", "avx512"}) {
    if (std::string(name) != "portable" && std::find(here.begin(), here.end(), name) == here.end()) continue;
    const Crc32Kernel crc32 = Crc32Of(name);
    const SyrkKernel syrk = SyrkOf(name);
    const RmsNormKernel norm = RmsNormOf(name);
    const int found = (crc32 ? WrongChecksums(crc32) : 0) + (syrk ? WrongMoments(syrk) : 0) + (norm ? WrongNorms(norm) : 0);
    std::printf("%s: %d wrong\n", name, found);
    wrong += found;
  }
  return wrong != 0;
}
