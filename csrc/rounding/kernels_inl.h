// The loops over tiles: included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_ROUNDING_KERNELS the name of its table, HALFBIN_PACKING_KERNELS that of its packing.
#include "rounding/codes_inl.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

// Elements that are taken through one step before the next one. What the first of them wait for, a range or a scale, the others
// do meanwhile, and the elements are still in the nearest cache. While they are rounded, as many behind them are fetched.
constexpr size_t kTilesAtOnce = 32, kElementsAtOnce = 4096;

struct TileRange {
  float least, greatest, largest_abs;
  bool finite;
};

// 0 counts, so ends that it would clip are already clipped. `kEnds`: both ends, not only the largest |x|.
template <bool kEnds, class T>
[[gnu::always_inline]] inline TileRange RangeOf(const T* x, size_t count) {
  const Ints without_sign = SetInt(0x7fffffff);
  Ints size = SetInt(0);  // as numbers, bits of |x| rise with it, and those of infinity and NaN lie above all others
  Floats least = Set(0), greatest = Set(0);
  const auto take = [&](Floats v) {
    size = Max(size, And(Bits(v), without_sign));
    if constexpr (kEnds) {
      least = Min(v, least);
      greatest = Max(v, greatest);
    }
  };
  size_t i = 0;
  for (; i + 16 <= count; i += 16) take(LoadNumbers(x + i));
  if (i < count) take(LoadNumbers(x + i, count - i));
  const int32_t bits = Greatest(size);
  const float largest = FloatOf(static_cast<uint32_t>(bits));
  if constexpr (!kEnds) return {-largest, largest, largest, bits < 0x7f800000};
  return {Least(least), Greatest(greatest), largest, bits < 0x7f800000};
}

// Where the codes of a run go: a byte each,
class Bytes {
 public:
  explicit Bytes(uint8_t* to) : to_(to) {}
  void Put(size_t i, Ints codes) const { StoreBytes(to_ + i, codes); }
  void PutFirst(size_t i, Ints codes, size_t count) const {
    uint8_t some[16];
    StoreBytes(some, codes);
    std::memcpy(to_ + i, some, count);
  }

 private:
  uint8_t* to_;
};

// or two to a byte, the even one in the low nibble, counted from `lowest`; the nibble behind the last of an odd number is 0. Tiles
// begin at even places.
class Nibbles {
 public:
  Nibbles(uint8_t* to, int8_t lowest) : to_(to), lowest_(SetInt(lowest)) {}
  void Put(size_t i, Ints codes) const { StoreNibbles(to_ + i / 2, Sub(codes, lowest_)); }
  void PutFirst(size_t i, Ints codes, size_t count) const {
    uint8_t some[8];
    StoreNibbles(some, Sub(codes, lowest_));
    if (count % 2) some[count / 2] &= 15;
    std::memcpy(to_ + i / 2, some, PackedSize(count, 4));
  }

 private:
  uint8_t* to_;
  Ints lowest_;
};

// How far codes lie from the elements, so far. Lanes beyond the end of a tile hold elements and codes of 0.
class Moves {
 public:
  void Take(Floats v, Floats x_hat) {
    const Floats move = Sub(x_hat, v);
    AddProductTo(signal_, v, v);
    AddProductTo(noise_, move, move);
    largest_ = Max(largest_, And(Bits(move), SetInt(0x7fffffff)));
  }
  ErrorSums Sums() const { return {Total(signal_), Total(noise_), FloatOf(static_cast<uint32_t>(Greatest(largest_)))}; }

 private:
  Doubles signal_ = ZeroSums(), noise_ = ZeroSums();
  Ints largest_ = SetInt(0);  // of |x_hat - x|, as bits: NaN stays the largest
};

// All but `x` by value: what is written may lie anywhere, and the compiler would read again whatever it has only an address of.
template <bool kFast, bool kMoves, class Codes, class T, class Out>
inline void EncodeTile(const T* x, size_t count, const Codes codes, const Quotients quotients, const Out out, size_t at,
                       Floats step, Moves* moves) {
  Moves mine;
  if constexpr (kMoves) mine = *moves;
  const auto encode = [&](Floats v) {
    const Ints some = codes.Encode(kFast ? quotients.Fast(v) : quotients.Exact(v), v);
    if constexpr (kMoves) mine.Take(v, Mul(codes.Decode(some), step));
    return some;
  };
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __builtin_prefetch(x + i + kElementsAtOnce);
    out.Put(at + i, encode(LoadNumbers(x + i)));
  }
  if (i < count) out.PutFirst(at + i, encode(LoadNumbers(x + i, count - i)), count - i);
  if constexpr (kMoves) *moves = mine;
}

template <class Codes, class T, class Out>
[[gnu::always_inline]] inline void RoundTile(const T* x, size_t count, const CodeFormat& format, float scale, int32_t zero, float largest_abs,
                      const Out& out, size_t at, Moves* moves) {
  const Codes codes(format, SetInt(zero));
  const Quotients quotients(scale, largest_abs);
  const Floats step = Set(scale);
  if (quotients.fast()) {
    moves ? EncodeTile<true, true>(x, count, codes, quotients, out, at, step, moves)
          : EncodeTile<true, false>(x, count, codes, quotients, out, at, step, moves);
  } else {
    moves ? EncodeTile<false, true>(x, count, codes, quotients, out, at, step, moves)
          : EncodeTile<false, false>(x, count, codes, quotients, out, at, step, moves);
  }
}

template <class Codes, class T, bool kEnds, class Out>
bool FitAndRoundRun(const Run& run, const T* x, const ScaleRule& rule, const Out& out, void* scale, int32_t* zero,
                    ErrorSums* sums) {
  const CodeFormat& format = *run.format;
  const size_t fitting = kElementsAtOnce / run.size, together = fitting < 1 ? 1 : fitting;
  const size_t at_once = together < kTilesAtOnce ? together : kTilesAtOnce;
  Moves moves;
  for (size_t start = 0, tile = 0; start < run.count; start += at_once * run.size, tile += at_once) {
    const size_t left = run.count - start, whole = at_once * run.size;
    const size_t count = left < whole ? left : whole, num_tiles = (count + run.size - 1) / run.size;
    const auto tile_count = [&](size_t i) { return i + 1 < num_tiles ? run.size : count - i * run.size; };
    TileRange ranges[kTilesAtOnce];
    bool finite = true;
    for (size_t i = 0; i < num_tiles; ++i) {
      ranges[i] = RangeOf<kEnds>(x + start + i * run.size, tile_count(i));
      finite &= ranges[i].finite;
    }
    if (!finite) return false;
    Params params[kTilesAtOnce];
    for (size_t i = 0; i < num_tiles; ++i) {
      params[i] = ParamsOf(ranges[i].least, ranges[i].greatest, rule, format.qmin, format.qmax);
      Put(params[i], rule.stored, scale, tile + i);
      if constexpr (kEnds) {
        if (rule.covers == Covers::kRange) zero[tile + i] = params[i].zero;
      }
    }
    for (size_t i = 0; i < num_tiles; ++i) {
      const size_t at = start + i * run.size;
      RoundTile<Codes>(x + at, tile_count(i), format, params[i].scale, params[i].zero, ranges[i].largest_abs, out, at,
                       sums ? &moves : nullptr);
    }
  }
  if (sums) *sums = moves.Sums();
  return true;
}

template <class Codes, class T>
void RoundRun(const Run& run, const T* x, const float* scale, const int32_t* zero, uint8_t* codes) {
  for (size_t start = 0, tile = 0; start < run.count; start += run.size, ++tile) {
    const size_t count = run.count - start < run.size ? run.count - start : run.size;
    const float largest_abs = RangeOf<false>(x + start, count).largest_abs;
    RoundTile<Codes>(x + start, count, *run.format, scale[tile], zero ? zero[tile] : 0, largest_abs, Bytes(codes), start,
                     nullptr);
  }
}

template <class Codes, class T>
ErrorSums CompareRun(const Run& run, const T* x, const uint8_t* codes, const float* scale, const int32_t* zero) {
  const bool is_signed = run.format->qmin < 0;
  Moves moves;
  for (size_t start = 0, tile = 0; start < run.count; start += run.size, ++tile) {
    const size_t count = run.count - start < run.size ? run.count - start : run.size;
    const Codes values(*run.format, SetInt(zero ? zero[tile] : 0));
    const Floats step = Set(scale[tile]);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const Ints some = Codes::LoadCodes(codes + start + i, is_signed);
      moves.Take(LoadNumbers(x + start + i), Mul(values.Decode(some), step));
    }
    if (i < count) {
      uint8_t padded[16] = {};
      std::memcpy(padded, codes + start + i, count - i);
      Floats x_hat = Mul(values.Decode(Codes::LoadCodes(padded, is_signed)), step);
      float kept[16] = {};  // no lane beyond the end has moved
      StoreFirst(kept, x_hat, count - i);
      moves.Take(LoadNumbers(x + start + i, count - i), Load(kept));
    }
  }
  return moves.Sums();
}

// The sum of (x_hat - x)^2 over a tile under a scale and zero point.
template <class Codes, class T, class Quotient>
double NoiseOf(const T* x, size_t count, const CodeFormat& format, const Params& params, const Quotient& quotient) {
  const Codes codes(format, SetInt(params.zero));
  const Floats scale = Set(params.scale);
  Doubles noise = ZeroSums();
  const auto take = [&](Floats v) {  // a lane beyond the end holds 0, which is exact
    const Floats move = Sub(Mul(codes.Decode(codes.Encode(quotient(v), v)), scale), v);
    AddProductTo(noise, move, move);
  };
  size_t i = 0;
  for (; i + 16 <= count; i += 16) take(LoadNumbers(x + i));
  if (i < count) take(LoadNumbers(x + i, count - i));
  return Total(noise);
}

template <class Codes, class T>
bool SearchRun(const Run& run, const T* x, const ScaleRule& rule, const float* factors, size_t num_factors, float* least,
               float* greatest) {
  struct Ends {
    bool low, high;
  };
  constexpr Ends kEnds[] = {{true, true}, {true, false}, {false, true}};
  const CodeFormat& format = *run.format;
  for (size_t start = 0, tile = 0; start < run.count; start += run.size, ++tile) {
    const size_t count = run.count - start < run.size ? run.count - start : run.size;
    const TileRange whole = RangeOf<true>(x + start, count);
    if (!whole.finite) return false;
    const auto noise_of = [&](float low, float high) {
      const Params params = ParamsOf(low, high, rule, format.qmin, format.qmax);
      const Quotients quotients(params.scale, whole.largest_abs);
      return quotients.fast() ? NoiseOf<Codes>(x + start, count, format, params, [&](Floats v) { return quotients.Fast(v); })
                              : NoiseOf<Codes>(x + start, count, format, params, [&](Floats v) { return quotients.Exact(v); });
    };
    float low = whole.least, high = whole.greatest;
    double lowest = noise_of(low, high);
    for (size_t pass = 0; pass < (rule.covers == Covers::kRange ? 3u : 1u); ++pass) {
      const float from_low = low, from_high = high;
      for (size_t i = 0; i < num_factors; ++i) {
        const float next_low = kEnds[pass].low ? from_low * factors[i] : from_low;
        const float next_high = kEnds[pass].high ? from_high * factors[i] : from_high;
        const double noise = noise_of(next_low, next_high);
        if (noise < lowest) {
          lowest = noise;
          low = next_low;
          high = next_high;
        }
      }
    }
    least[tile] = low;
    greatest[tile] = high;
  }
  return true;
}

// Calls f with x as a pointer to numbers of its type.
template <class Function>
inline auto WithNumbers(const void* x, Element element, const Function& f) {
  switch (element) {
    case Element::kBfloat16:
      return f(static_cast<const Bfloat16Number*>(x));
    case Element::kFloat16:
      return f(static_cast<const Float16Number*>(x));
    default:
      return f(static_cast<const float*>(x));
  }
}

template <class Codes>
struct Tag {
  using Type = Codes;
};

// Calls f with the tag of the class that makes and reads such codes.
template <class Function>
inline auto WithCodes(CodeKind kind, const Function& f) {
  switch (kind) {
    case CodeKind::kFloats:
      return f(Tag<FloatCodes>{});
    case CodeKind::kTable:
      return f(Tag<TableCodes>{});
    default:
      return f(Tag<IntegerCodes>{});
  }
}

Range RangeKernel(const void* x, Element element, size_t count) {
  return WithNumbers(x, element, [count](const auto* p) {
    const TileRange range = RangeOf<true>(p, count);
    return Range{range.least, range.greatest, range.finite};
  });
}

template <class Out>
bool FitAndRoundTo(const Run& run, const ScaleRule& rule, const Out& out, void* scale, int32_t* zero, ErrorSums* sums) {
  return WithNumbers(run.x, run.element, [&](const auto* p) {
    return WithCodes(run.format->kind, [&]<class Codes>(Tag<Codes>) {
      using T = std::remove_cvref_t<decltype(*p)>;
      return rule.covers == Covers::kBothAlike ? FitAndRoundRun<Codes, T, false>(run, p, rule, out, scale, zero, sums)
                                               : FitAndRoundRun<Codes, T, true>(run, p, rule, out, scale, zero, sums);
    });
  });
}

bool FitAndRoundKernel(const Run& run, const ScaleRule& rule, uint8_t* codes, void* scale, int32_t* zero, ErrorSums* sums) {
  return FitAndRoundTo(run, rule, Bytes(codes), scale, zero, sums);
}

bool FitAndPackKernel(const Run& run, const ScaleRule& rule, uint8_t lowest, uint8_t* nibbles, void* scale, int32_t* zero,
                      ErrorSums* sums) {
  return FitAndRoundTo(run, rule, Nibbles(nibbles, static_cast<int8_t>(lowest)), scale, zero, sums);
}

void RoundKernel(const Run& run, const float* scale, const int32_t* zero, uint8_t* codes) {
  WithNumbers(run.x, run.element, [&](const auto* p) {
    WithCodes(run.format->kind, [&]<class Codes>(Tag<Codes>) { RoundRun<Codes>(run, p, scale, zero, codes); });
  });
}

ErrorSums CompareKernel(const Run& run, const uint8_t* codes, const float* scale, const int32_t* zero) {
  return WithNumbers(run.x, run.element, [&](const auto* p) {
    return WithCodes(run.format->kind,
                     [&]<class Codes>(Tag<Codes>) { return CompareRun<Codes>(run, p, codes, scale, zero); });
  });
}

bool SearchKernel(const Run& run, const ScaleRule& rule, const float* factors, size_t num_factors, float* least,
                  float* greatest) {
  return WithNumbers(run.x, run.element, [&](const auto* p) {
    return WithCodes(run.format->kind, [&]<class Codes>(Tag<Codes>) {
      return SearchRun<Codes>(run, p, rule, factors, num_factors, least, greatest);
    });
  });
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const RoundingKernels HALFBIN_ROUNDING_KERNELS = {&HALFBIN_PACKING_KERNELS, HALFBIN_TARGET::RangeKernel,
                                                  HALFBIN_TARGET::FitAndRoundKernel,
                                                  HALFBIN_TARGET::kHasNibbles ? HALFBIN_TARGET::FitAndPackKernel : nullptr,
                                                  HALFBIN_TARGET::RoundKernel, HALFBIN_TARGET::CompareKernel,
                                                  HALFBIN_TARGET::SearchKernel};

}  // namespace halfbin
