// What the tests of the sixteen lanes share: every instruction set that this processor runs, threads that must not matter, hostile
// numbers. Memory of each size is allocated exactly, so that sanitizers and valgrind see a read or write past its end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/features.h"

namespace halfbin::tests {

// Counts mistakes with each set, says how many, and returns the exit code.
template <class WrongWith>
int OnEverySet(const WrongWith& wrong_with) {
  const std::vector<std::string> here = CpuFeatures();
  int wrong = 0;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (std::string(name) != "portable" && std::find(here.begin(), here.end(), name) == here.end()) continue;
    const int found = wrong_with(name);
    std::printf("%s: %d wrong\n", name, found);
    wrong += found;
  }
  return wrong != 0;
}

// Heavy tails, ties of a grid, zeros of both signs, subnormals, and in some rows one number that dwarfs the others.
inline std::vector<float> Hostile(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (size_t i = 0; i < count; ++i) {
    const float v = normal(generator);
    const float values[] = {v * v * v, std::nearbyint(2 * v) / 2, 0.0f, -0.0f, v * 1e-41f, v};
    x[i] = values[generator() % 6];
  }
  if (seed % 3 == 0 && count) x[generator() % count] = 3e38f;
  return x;
}

// NaN is NaN, and other numbers agree to the bit, but for the sign of zero: valgrind 3.19 emulates -a * b + c as -(a * b - c).
inline bool Same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }
inline bool Same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) { return Same(x, y); });
}

}  // namespace halfbin::tests
