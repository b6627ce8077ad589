#include "matmul/weights.h"

#include <cstring>

#include "cpu/threads.h"

namespace halfbin::matmul {
namespace {

size_t Up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

size_t ScaleBytes(Float type) { return type == Float::kFloat32 ? 4 : 2; }

// Where u of row 0 lies in a block, by its column; those of other rows 4 bytes further each.
struct Place {
  size_t byte;
  unsigned shift, mask;
};

Place PlaceOf(uint32_t bits, size_t column) {
  const size_t per_run = 32 / bits;  // columns that share 256 bytes
  return {column / per_run * 256 + column % 4, static_cast<unsigned>(column % per_run / 4 * bits), (1u << bits) - 1};
}

// One block: up to 64 rows from first_row on, `columns` columns of one group.
void PackBlock(const Weights& w, const Source& source, size_t first_row, size_t group, uint8_t* block) {
  const Header& h = w.header;
  const size_t rows = first_row + kPanelRows <= h.n ? kPanelRows : h.n - first_row;
  const size_t first = group * h.group_size, columns = first + h.group_size <= h.k ? h.group_size : h.k - first;
  std::memset(block, 0, w.block_bytes);
  const size_t scale_bytes = ScaleBytes(h.scale_type);
  int32_t sums[kPanelRows] = {};
  for (size_t r = 0; r < rows; ++r) {
    const uint8_t* row = source.codes + (first_row + r) * h.k + first;
    const size_t at = (first_row + r) * w.groups + group;
    uint8_t* out = block + r * 4;
    int32_t sum = 0;
    for (size_t c = 0; c < columns; ++c) {
      const uint8_t u = static_cast<uint8_t>(row[c] - source.least);
      sum += w.has_table ? h.table[u] : u;
      const Place p = PlaceOf(h.bits, c);
      out[p.byte] |= static_cast<uint8_t>(u << p.shift);
    }
    std::memcpy(block + w.code_bytes + r * scale_bytes, static_cast<const uint8_t*>(source.scales) + at * scale_bytes, scale_bytes);
    const int32_t zero = h.has_zeros ? source.zero_points[at] - source.least : h.zero;
    if (h.has_zeros) block[w.zeros_at + r] = static_cast<uint8_t>(zero);
    sums[r] = sum - zero * static_cast<int32_t>(columns);
  }
  if (h.has_sums) std::memcpy(block + w.sums_at, sums, sizeof sums);
}

void UnpackBlock(const Weights& w, const Target& target, size_t first_row, size_t group, const uint8_t* block) {
  const Header& h = w.header;
  const size_t rows = first_row + kPanelRows <= h.n ? kPanelRows : h.n - first_row;
  const size_t first = group * h.group_size, columns = first + h.group_size <= h.k ? h.group_size : h.k - first;
  const size_t scale_bytes = ScaleBytes(h.scale_type);
  for (size_t r = 0; r < rows; ++r) {
    uint8_t* row = target.codes + (first_row + r) * h.k + first;
    const size_t at = (first_row + r) * w.groups + group;
    const uint8_t* in = block + r * 4;
    for (size_t c = 0; c < columns; ++c) {
      const Place p = PlaceOf(h.bits, c);
      row[c] = static_cast<uint8_t>(static_cast<int32_t>(in[p.byte] >> p.shift & p.mask) + target.least);
    }
    std::memcpy(static_cast<uint8_t*>(target.scales) + at * scale_bytes, block + w.code_bytes + r * scale_bytes, scale_bytes);
    if (h.has_zeros) target.zero_points[at] = block[w.zeros_at + r] + target.least;
  }
}

}  // namespace

Weights View(const Header& header, const uint8_t* buffer) {
  Weights w{};
  w.header = header;
  for (const uint8_t value : header.table) w.has_table |= value != 0;
  const bool one_group = header.group_size >= header.k;
  w.groups = one_group ? 1 : (header.k + header.group_size - 1) / header.group_size;
  const size_t columns = one_group ? header.k : header.group_size;
  w.padded = columns % 64 == 32 ? columns : Up(columns, 64);
  w.code_bytes = kPanelRows * w.padded * header.bits / 8;
  w.zeros_at = w.code_bytes + kPanelRows * ScaleBytes(header.scale_type);
  w.sums_at = w.zeros_at + (header.has_zeros ? kPanelRows : 0);
  w.block_bytes = w.sums_at + (header.has_sums ? kPanelRows * 4 : 0);
  w.panel_bytes = w.groups * w.block_bytes;
  w.num_panels = (header.n + kPanelRows - 1) / kPanelRows;
  w.bytes = kHeaderBytes + w.num_panels * w.panel_bytes;
  w.panels = buffer == nullptr ? nullptr : buffer + kHeaderBytes;
  return w;
}

void Pack(const Header& header, const Source& source, uint8_t* buffer, size_t num_threads) {
  const Weights w = View(header, buffer);
  std::memset(buffer, 0, kHeaderBytes);
  std::memcpy(buffer, &header, sizeof header);
  ParallelFor(num_threads, w.num_panels, [&](size_t panel) {
    for (size_t group = 0; group < w.groups; ++group) {
      PackBlock(w, source, panel * kPanelRows, group, buffer + kHeaderBytes + panel * w.panel_bytes + group * w.block_bytes);
    }
  });
}

void ColumnOfCodes(const Weights& weights, const uint8_t* block, size_t column, uint8_t* out) {
  const Place p = PlaceOf(weights.header.bits, column);
  for (size_t r = 0; r < kPanelRows; ++r) {
    const uint8_t u = static_cast<uint8_t>(block[p.byte + r * 4] >> p.shift & p.mask);
    out[r] = weights.has_table ? weights.header.table[u] : u;
  }
}

void Unpack(const Weights& weights, const Target& target, size_t num_threads) {
  ParallelFor(num_threads, weights.num_panels, [&](size_t panel) {
    for (size_t group = 0; group < weights.groups; ++group) {
      const uint8_t* block = weights.panels + panel * weights.panel_bytes + group * weights.block_bytes;
      UnpackBlock(weights, target, panel * kPanelRows, group, block);
    }
  });
}

}  // namespace halfbin::matmul
