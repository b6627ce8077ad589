#include "floats/weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/threads.h"

namespace halfbin::floats {
namespace {

size_t ScaleBytes(Float type) { return type == Float::kFloat32 ? 4 : 2; }

// Where the code of row 0 lies in a block, by its column; those of other rows `stride` bytes further each.
struct Place {
  size_t byte;
  unsigned shift, mask;
};

constexpr size_t kTableStride = 4, kFloat8Stride = 2;

Place PlaceOf(Kind kind, size_t column) {
  if (kind == Kind::kTable) return {column / 8 * 256 + column % 8 / 2, static_cast<unsigned>(column % 2 * 4), 0xf};
  return {column / 2 * 128 + column % 2, 0, 0xff};
}

size_t StrideOf(Kind kind) { return kind == Kind::kTable ? kTableStride : kFloat8Stride; }

// The rows of a panel and the columns of a group.
struct Part {
  size_t first_row, rows, first_column, columns;
};

Part PartOf(const Header& h, size_t panel, size_t group) {
  const size_t row = panel * kPanelRows, column = group * h.group_size;
  return {row, std::min(kPanelRows, static_cast<size_t>(h.n) - row), column, std::min<size_t>(h.group_size, h.k - column)};
}

// One block. Neighbouring columns of all rows before the next ones: both sides stay in the cache.
size_t PackBlock(const Weights& w, const Source& source, size_t panel, size_t group, uint8_t* block, uint8_t* not_numbers) {
  const Header& h = w.header;
  const Part part = PartOf(h, panel, group);
  const size_t stride = StrideOf(h.kind), scale_bytes = ScaleBytes(h.scale_type);
  std::memset(block, 0, w.block_bytes);
  size_t wrong = 0;
  for (size_t first = 0; first < part.columns; first += kColumnStep) {
    const size_t last = std::min(part.columns, first + kColumnStep);
    for (size_t r = 0; r < part.rows; ++r) {
      const uint8_t* row = source.codes + (part.first_row + r) * h.k + part.first_column;
      for (size_t c = first; c < last; ++c) {
        const Place p = PlaceOf(h.kind, c);
        if (h.kind == Kind::kTable) wrong += row[c] >= h.num_values;
        if (h.kind == Kind::kE4m3) not_numbers[r] |= static_cast<uint8_t>((row[c] & 0x7f) == 0x7f);
        block[w.codes_at + p.byte + r * stride] |= static_cast<uint8_t>((row[c] & p.mask) << p.shift);
      }
    }
  }
  for (size_t r = 0; r < part.rows; ++r) {
    const size_t at = (part.first_row + r) * w.groups + group;
    std::memcpy(block + r * scale_bytes, static_cast<const uint8_t*>(source.scales) + at * scale_bytes, scale_bytes);
  }
  return wrong;
}

void UnpackBlock(const Weights& w, const Target& target, size_t panel, size_t group, const uint8_t* block) {
  const Header& h = w.header;
  const Part part = PartOf(h, panel, group);
  const size_t stride = StrideOf(h.kind), scale_bytes = ScaleBytes(h.scale_type);
  for (size_t first = 0; first < part.columns; first += kColumnStep) {
    const size_t last = std::min(part.columns, first + kColumnStep);
    for (size_t r = 0; r < part.rows; ++r) {
      uint8_t* row = target.codes + (part.first_row + r) * h.k + part.first_column;
      for (size_t c = first; c < last; ++c) {
        const Place p = PlaceOf(h.kind, c);
        row[c] = static_cast<uint8_t>(block[w.codes_at + p.byte + r * stride] >> p.shift & p.mask);
      }
    }
  }
  for (size_t r = 0; r < part.rows; ++r) {
    const size_t at = (part.first_row + r) * w.groups + group;
    std::memcpy(static_cast<uint8_t*>(target.scales) + at * scale_bytes, block + r * scale_bytes, scale_bytes);
  }
}

}  // namespace

Weights View(const Header& header, const uint8_t* buffer) {
  Weights w{};
  w.header = header;
  const bool one_group = header.group_size >= header.k;
  const size_t columns = one_group ? header.k : header.group_size;
  w.groups = one_group ? 1 : (header.k - 1) / header.group_size + 1;
  w.padded = (columns + kColumnStep - 1) / kColumnStep * kColumnStep;
  w.codes_at = kPanelRows * ScaleBytes(header.scale_type);
  w.block_bytes = w.codes_at + kPanelRows * w.padded * CodeBits(header.kind) / 8;
  w.panel_bytes = w.groups * w.block_bytes;
  w.num_panels = (header.n + kPanelRows - 1) / kPanelRows;
  w.bytes = kHeaderBytes + w.num_panels * (w.panel_bytes + kPanelRows);
  if (buffer != nullptr) {
    w.panels = buffer + kHeaderBytes;
    w.not_numbers = w.panels + w.num_panels * w.panel_bytes;
  }
  return w;
}

size_t Pack(const Header& header, const Source& source, uint8_t* buffer, size_t num_threads) {
  const Weights w = View(header, buffer);
  std::memset(buffer, 0, kHeaderBytes);
  uint8_t* panels = buffer + kHeaderBytes;
  uint8_t* not_numbers = panels + w.num_panels * w.panel_bytes;
  std::memset(not_numbers, 0, w.num_panels * kPanelRows);
  std::atomic<size_t> wrong{0};
  ParallelFor(num_threads, w.num_panels, [&](size_t panel) {
    size_t here = 0;
    for (size_t group = 0; group < w.groups; ++group) {
      uint8_t* block = panels + panel * w.panel_bytes + group * w.block_bytes;
      here += PackBlock(w, source, panel, group, block, not_numbers + panel * kPanelRows);
    }
    wrong.fetch_add(here, std::memory_order_relaxed);
  });
  Header made = header;
  made.has_not_numbers = std::any_of(not_numbers, not_numbers + w.num_panels * kPanelRows, [](uint8_t marked) { return marked != 0; });
  std::memcpy(buffer, &made, sizeof made);
  return wrong.load();
}

void Unpack(const Weights& weights, const Target& target, size_t num_threads) {
  ParallelFor(num_threads, weights.num_panels, [&](size_t panel) {
    for (size_t group = 0; group < weights.groups; ++group) {
      UnpackBlock(weights, target, panel, group, weights.panels + panel * weights.panel_bytes + group * weights.block_bytes);
    }
  });
}

}  // namespace halfbin::floats
