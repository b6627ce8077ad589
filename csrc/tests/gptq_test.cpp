// GPTQ's loop over columns on every instruction set that this processor runs, against one weight after the other, to the bit; NaN and
// infinity among the weights too, which must stay what they are. Prints what differs; exit code 1 then.
#include "gptq/columns.h"

#include "sets.h"

namespace {

using namespace halfbin;
using tests::Hostile;
using tests::Same;

struct Case {
  size_t num_columns, num_rounded, num_rows, num_tiles;
  bool one_scale, zeros, hostile;
};

int Wrong(RoundColumnsKernel kernel, const Case& c, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> around(0.5f, 1.5f);
  CodeFormat format;
  format.qmin = -8;
  format.qmax = 7;
  std::vector<float> columns = Hostile(c.num_columns * c.num_rows, c.hostile ? 3 * seed : 3 * seed + 1);
  if (c.hostile) {
    columns[generator() % columns.size()] = std::numeric_limits<float>::quiet_NaN();
    columns[generator() % columns.size()] = -std::numeric_limits<float>::infinity();
  }
  std::vector<float> upper(c.num_columns * c.num_columns);
  for (float& u : upper) u = around(generator) - 0.7f;
  for (size_t j = 0; j < c.num_columns; ++j) upper[j * c.num_columns + j] = around(generator);
  const size_t per_row = c.one_scale ? 1 : c.num_rows;
  std::vector<float> scale(c.num_tiles * per_row), zero(scale.size());
  for (float& s : scale) s = around(generator) / 4;
  for (float& z : zero) z = static_cast<float>(static_cast<int>(generator() % 16) - 8);
  std::vector<int64_t> tiles(c.num_rounded);
  for (int64_t& tile : tiles) tile = static_cast<int64_t>(generator() % c.num_tiles);

  std::vector<float> expected = columns;
  std::vector<uint8_t> expected_codes(c.num_rounded * c.num_rows), codes(expected_codes.size());
  for (size_t j = 0; j < c.num_rounded; ++j) {
    for (size_t row = 0; row < c.num_rows; ++row) {
      const size_t tile = static_cast<size_t>(tiles[j]) * per_row + (c.one_scale ? 0 : row);
      const int z = c.zeros ? static_cast<int>(zero[tile]) : 0;
      float& x = expected[j * c.num_rows + row];
      float steps = x / scale[tile];
      steps = steps > -131072.0f ? steps : -131072.0f;  // NaN too
      steps = steps < 131072.0f ? steps : 131072.0f;
      const int code = std::min(std::max(static_cast<int>(std::nearbyint(steps)) + z, format.qmin), format.qmax);
      expected_codes[j * c.num_rows + row] = static_cast<uint8_t>(code);
      x = (x - static_cast<float>(code - z) * scale[tile]) / upper[j * c.num_columns + j];
      for (size_t k = j + 1; k < c.num_columns; ++k) {
        float& later = expected[k * c.num_rows + row];
        later = std::fma(-upper[j * c.num_columns + k], x, later);
      }
    }
  }
  kernel({columns.data(), c.num_columns, c.num_rounded, c.num_rows, upper.data(), c.num_columns, scale.data(),
          c.zeros ? zero.data() : nullptr, per_row, tiles.data(), codes.data()},
         format);
  const int wrong = !Same(columns, expected) + (codes != expected_codes);
  if (wrong) std::printf("%zu of %zu columns, %zu rows: wrong\n", c.num_rounded, c.num_columns, c.num_rows);
  return wrong;
}

int WrongWith(const char* set) {
  const RoundColumnsKernel kernel = RoundColumnsOf(set);
  int wrong = 0;
  uint32_t seed = 0;
  for (const size_t num_rows : {1, 15, 16, 17, 63, 64, 65, 130}) {
    for (const size_t num_columns : {1, 2, 33, 128}) {
      for (const bool one_scale : {false, true}) {
        for (const bool zeros : {false, true}) {
          for (const bool hostile : {false, true}) {
            const size_t num_rounded = num_columns - seed % std::min<size_t>(num_columns, 3);
            wrong += Wrong(kernel, {num_columns, num_rounded, num_rows, 3, one_scale, zeros, hostile}, ++seed);
          }
        }
      }
    }
  }
  return wrong;
}

}  // namespace

int main() { return halfbin::tests::OnEverySet(WrongWith); }
