#include "matmul/experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/caches.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace halfbin::matmul {
namespace {

// Results of a task lie together before they go where the router's order wants them; so many bytes stay in the cache.
constexpr size_t kTogetherBytes = 1 << 18;
// What reading an expert's codes costs, in tokens: how work is shared out, nothing else.
constexpr size_t kReadingInTokens = 4;

size_t BytesOf(Float type) { return type == Float::kFloat32 ? 4 : 2; }

// An expert that somebody chose.
struct Active {
  size_t expert;
  const size_t* choices;  // [m], rising: places in `chosen`
  size_t m;
  const InstructionSet* set;
  Inputs inputs;
  size_t parts;
};

struct Task {
  const Active* active;
  size_t first, last;  // panels
};

// Places in `chosen`, one expert's behind the other's, and where each expert's begin.
struct Sorted {
  std::vector<size_t> places, begins;
};

Sorted SortByExpert(const Experts& e) {
  const size_t choices = e.m * e.slots;
  Sorted sorted{std::vector<size_t>(choices), std::vector<size_t>(e.count + 1)};
  for (size_t i = 0; i < choices; ++i) ++sorted.begins[static_cast<size_t>(e.chosen[i]) + 1];
  for (size_t i = 0; i < e.count; ++i) sorted.begins[i + 1] += sorted.begins[i];
  std::vector<size_t> next(sorted.begins.begin(), sorted.begins.end() - 1);
  for (size_t i = 0; i < choices; ++i) sorted.places[next[static_cast<size_t>(e.chosen[i])]++] = i;
  return sorted;
}

// One token of `all`, whose tiles are of one token, as the inputs of one token.
Inputs Alone(const Inputs& all, size_t token, size_t run) {
  Inputs one = all;
  one.m = one.tiles = 1, one.run = run;
  one.codes += token * all.groups * all.padded;
  one.group_scales += token * all.groups, one.sums += token * all.groups;
  one.token_scales += token, one.zeros += token;
  return one;
}

template <size_t Run>
void CopyRuns(const int8_t* from, size_t bytes, size_t tile, int8_t* to) {
  for (size_t c = 0; c < bytes; c += Run) std::memcpy(to + c * tile, from + c, Run);
}

// The tokens of an expert from `all`, whose tiles are of one token, into tiles of its own.
void Gather(const Inputs& all, const Active& active, size_t slots) {
  const Inputs& to = active.inputs;
  const size_t bytes = to.groups * to.padded;
  const auto copy = to.run == 64 ? &CopyRuns<64> : to.run == 32 ? &CopyRuns<32> : to.run == 4 ? &CopyRuns<4> : nullptr;
  for (size_t i = 0; i < to.tiles * to.tile; ++i) {
    int8_t* codes = to.codes + i / to.tile * (bytes * to.tile) + i % to.tile * to.run;
    const auto at = [&](size_t g) { return to.At(i / to.tile, g) + i % to.tile; };
    if (i >= to.m) {
      for (size_t c = 0; c < bytes; c += to.run) std::memset(codes + c * to.tile, 0, to.run);
      for (size_t g = 0; g < to.groups; ++g) to.group_scales[at(g)] = 1.0f, to.sums[at(g)] = 0;
      to.token_scales[i] = 1.0f, to.zeros[i] = 0;
      continue;
    }
    const Inputs one = Alone(all, active.choices[i] / slots, to.run);
    if (copy != nullptr) {
      copy(one.codes, bytes, to.tile, codes);
    } else {
      for (size_t c = 0; c < bytes; c += to.run) std::memcpy(codes + c * to.tile, one.codes + c, to.run);
    }
    for (size_t g = 0; g < to.groups; ++g) to.group_scales[at(g)] = one.group_scales[g], to.sums[at(g)] = one.sums[g];
    to.token_scales[i] = *one.token_scales, to.zeros[i] = *one.zeros;
  }
}

// Panels of one expert, as a weight of these rows alone.
Weights Rows(const Experts& e, const Task& task) {
  const uint8_t* buffer = e.packed + task.active->expert * e.stride;
  Weights w = View(*reinterpret_cast<const Header*>(buffer), buffer);
  w.header.n = std::min<uint64_t>(w.header.n, task.last * kPanelRows) - task.first * kPanelRows;
  w.panels += task.first * w.panel_bytes;
  w.num_panels = task.last - task.first;
  w.bytes = kHeaderBytes + w.num_panels * w.panel_bytes;
  return w;
}

// `memory`: kProductMemory bytes, and behind them the task's results where its expert has several tokens.
void Do(const Experts& e, const Task& task, size_t n, uint8_t* memory) {
  const Active& active = *task.active;
  const size_t first = task.first * kPanelRows, element = BytesOf(e.y_type);
  Product product{Rows(e, task), active.inputs, e.bias, nullptr, e.y_type, SecondCacheBytes() / 4 * 3};
  const size_t rows = product.weights.header.n;
  if (e.bias.data != nullptr) {
    product.bias.data = static_cast<const uint8_t*>(e.bias.data) + (active.expert * n + first) * BytesOf(e.bias.type);
  }
  const auto to = [&](size_t i) { return static_cast<uint8_t*>(e.y) + (active.choices[i] * n + first) * element; };
  product.y = active.m == 1 ? to(0) : memory + kProductMemory;
  active.set->multiply(product, 0, product.weights.num_panels, memory);
  if (active.m == 1) return;
  for (size_t i = 0; i < active.m; ++i) {
    std::memcpy(to(i), memory + kProductMemory + i * rows * element, rows * element);
  }
}

}  // namespace

int64_t FirstUnknown(const Experts& e) {
  for (size_t i = 0; i < e.m * e.slots; ++i) {
    if (e.chosen[i] < 0 || e.chosen[i] >= static_cast<int64_t>(e.count)) return static_cast<int64_t>(i);
  }
  return -1;
}

size_t RunExperts(const Experts& e, const char* set_name, size_t num_threads) {
  if (e.m == 0 || e.slots == 0) return 0;
  const Weights w = View(*reinterpret_cast<const Header*>(e.packed), e.packed);
  const size_t n = w.header.n;
  if (n == 0) return 0;
  const Sorted sorted = SortByExpert(e);

  std::vector<Active> active;
  size_t work = 0;
  for (size_t expert = 0; expert < e.count; ++expert) {
    const size_t begin = sorted.begins[expert], m = sorted.begins[expert + 1] - begin;
    if (m == 0) continue;
    active.push_back({expert, sorted.places.data() + begin, m, Find(set_name, m), {}, 1});
    work += m + kReadingInTokens;
  }
  // A few tasks a thread, and the largest first: where another process holds up one thread, the others go on.
  size_t num_tasks = 0, results = 0, inputs = InputBytes(e.m, 1, w);
  for (Active& a : active) {
    const size_t share = num_threads <= 1 ? 1 : ((a.m + kReadingInTokens) * num_threads * 4 + work - 1) / work;
    const size_t fitting = a.m == 1 ? 1 : (a.m * n * BytesOf(e.y_type) + kTogetherBytes - 1) / kTogetherBytes;
    a.parts = std::min(w.num_panels, std::max(share, fitting));
    num_tasks += a.parts;
    if (a.m == 1) continue;
    const size_t panels = (w.num_panels + a.parts - 1) / a.parts;
    results = std::max(results, a.m * panels * kPanelRows * BytesOf(e.y_type));
    inputs += InputBytes(a.m, CutFor(a.m, *a.set, w).tile, w);
  }
  // The caller's own part of the work uses the memory before the inputs.
  const size_t own = (kProductMemory + results + 63) / 64 * 64;
  uint8_t* memory = Scratch(own + inputs) + own;

  const InstructionSet& rounding = *Find(set_name, e.m);
  const Product all{w, PlaceInputs(e.m, 1, CutFor(1, rounding, w).run, w, HasZeros(e.grid), memory), {}, nullptr,
                    e.y_type, 0};
  memory += InputBytes(e.m, 1, w);
  std::atomic<size_t> odd{0};
  ParallelFor(num_threads, (e.m + kRoundedTogether - 1) / kRoundedTogether, [&](size_t task) {
    const size_t first = task * kRoundedTogether, last = std::min(e.m, first + kRoundedTogether);
    odd.fetch_add(rounding.round(e.x, e.grid, all, first, last), std::memory_order_relaxed);
  });

  std::vector<const Active*> several;
  for (Active& a : active) {
    const auto [tile, run] = CutFor(a.m, *a.set, w);
    if (a.m == 1) {
      a.inputs = Alone(all.inputs, *a.choices / e.slots, run);
      continue;
    }
    a.inputs = PlaceInputs(a.m, tile, run, w, HasZeros(e.grid), memory);
    memory += InputBytes(a.m, tile, w);
    several.push_back(&a);
  }
  ParallelFor(num_threads, several.size(), [&](size_t i) { Gather(all.inputs, *several[i], e.slots); });

  std::vector<Task> tasks;
  tasks.reserve(num_tasks);
  std::sort(active.begin(), active.end(), [](const Active& a, const Active& b) { return a.m > b.m; });
  for (const Active& a : active) {
    for (size_t i = 0; i < a.parts; ++i) tasks.push_back({&a, w.num_panels * i / a.parts, w.num_panels * (i + 1) / a.parts});
  }
  ParallelFor(num_threads, tasks.size(), [&](size_t i) { Do(e, tasks[i], n, Scratch(own)); });
  return odd.load();
}

}  // namespace halfbin::matmul
