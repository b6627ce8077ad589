// The alternation, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_SOLVE_HQQ the name of its loop.
#include <cmath>
#include <limits>
#include <type_traits>

#include "hqq/solve.h"
#include "rounding/codes_inl.h"
#include "simd/powers_inl.h"

namespace halfbin::HALFBIN_TARGET {
namespace {

// What a pass over a tile leaves: v is the value of a code before the zero point, t the target in units of the first scale.
struct Moments {
  double objective, v, vv, t, tv;
};

struct Step {
  float scale;
  int32_t zero;
};

// Sums of whole numbers of at most 255, and of their squares, are exact in float32 for so many of them in a lane: 255^2 * 256 < 2^24.
constexpr size_t kExactSums = 256 * 16;

// Other sums are float32 in each lane for so many elements, then float64.
constexpr size_t kBlock = 64;

// One power serves the norm and the shrinkage: |error|^p = |error|^(p-1) * |error|.
template <class Codes, bool kHasZero, class Quotient>
Moments SumTile(const float* x, const float* units, size_t count, const CodeFormat& format, Step now, float unit, float p,
                float beta, const Quotient& quotient) {
  constexpr bool kWhole = std::is_same_v<Codes, IntegerCodes>;
  Doubles objective = ZeroSums(), v_sum = ZeroSums(), vv_sum = ZeroSums(), t_sum = ZeroSums(), tv_sum = ZeroSums();
  Floats v_part = Set(0), vv_part = Set(0), objective_part = Set(0), t_part = Set(0), tv_part = Set(0);
  const Codes codes(format, SetInt(now.zero));
  const Floats ratio = Set(now.scale / unit), zero = Set(static_cast<float>(now.zero)), exponent = Set(p - 1);
  const Floats strength = Set(1.0f / beta), sign = Set(-0.0f);
  const auto take = [&]<size_t kCount>(const Floats(&numbers)[kCount], const Floats(&in_units)[kCount], size_t lanes) {
    Floats value[kCount], error[kCount], size[kCount], power[kCount];
#pragma GCC unroll 4
    for (size_t j = 0; j < kCount; ++j) {
      const Floats centred = codes.Decode(codes.Encode(quotient(numbers[j]), numbers[j]));
      value[j] = kHasZero ? Add(centred, zero) : centred;
      error[j] = Sub(in_units[j], Mul(centred, ratio));
      size[j] = Abs(error[j]);
    }
    if (kHasZero && lanes < 16) {  // other lanes are 0 all through, but for the value that stands for it
      float kept[16] = {};
      StoreFirst(kept, value[0], lanes);
      value[0] = Load(kept);
    }
    Powers(size, exponent, power);
#pragma GCC unroll 4
    for (size_t j = 0; j < kCount; ++j) {
      const Floats kept = Max(NegMulAdd(power[j], strength, size[j]), Set(0.0f));
      const Floats target = Sub(in_units[j], FromBits(Or(Bits(kept), And(Bits(error[j]), Bits(sign)))));
      objective_part = MulAdd(power[j], size[j], objective_part);
      tv_part = MulAdd(target, value[j], tv_part);
      if constexpr (kHasZero) t_part = Add(t_part, target);  // without zero points nobody asks for these
      if constexpr (kWhole) {
        if constexpr (kHasZero) v_part = Add(v_part, value[j]);
        vv_part = kHasFma ? MulAdd(value[j], value[j], vv_part) : Add(vv_part, Mul(value[j], value[j]));
      } else {
        AddProductTo(vv_sum, value[j], value[j]);
      }
    }
  };
  const auto flush = [](Doubles& sum, Floats& part) {
    AddTo(sum, part);
    part = Set(0);
  };
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t end = count - start < kBlock ? count : start + kBlock;
    size_t i = start;
    for (; i + 16 * kInTurns <= end; i += 16 * kInTurns) {
      Floats numbers[kInTurns], in_units[kInTurns];
#pragma GCC unroll 4
      for (size_t j = 0; j < kInTurns; ++j) {
        numbers[j] = Load(x + i + 16 * j);
        in_units[j] = Load(units + i + 16 * j);
      }
      take(numbers, in_units, 16);
    }
    for (; i < end; i += 16) {
      const size_t lanes = end - i < 16 ? end - i : 16;
      const Floats numbers[] = {LoadFirst(x + i, lanes)}, in_units[] = {LoadFirst(units + i, lanes)};
      take(numbers, in_units, lanes);
    }
    flush(objective, objective_part);
    flush(tv_sum, tv_part);
    if constexpr (kHasZero) flush(t_sum, t_part);
    if (kWhole && (end == count || end % kExactSums == 0)) {
      flush(v_sum, v_part);
      flush(vv_sum, vv_part);
    }
  }
  return {Total(objective), Total(v_sum), Total(vv_sum), Total(t_sum), Total(tv_sum)};
}

inline float Stored(float scale, float unit, ScaleType type) {
  Params params{1, 0, 0};
  StoreScale(scale > 0 ? scale : unit, type, params);
  return params.scale;
}

// The stored scale and the zero point nearest to the regression of targets on codes; as they were where it has none.
Step LeastSquares(const Moments& m, size_t count, Step now, float unit, bool has_zero, const CodeFormat& format,
                  ScaleType type) {
  double step = m.tv / m.vv;
  int32_t zero = 0;
  if (has_zero) {
    const double n = static_cast<double>(count);
    const double slope = (n * m.tv - m.t * m.v) / (n * m.vv - m.v * m.v);
    const double intercept = (m.t - slope * m.v) / n;
    const double moved = std::nearbyint(-intercept / slope);
    const double qmin = format.qmin, qmax = format.qmax;
    zero = now.zero;
    if (slope > 0 && std::isfinite(moved)) zero = static_cast<int32_t>(moved < qmin ? qmin : moved > qmax ? qmax : moved);
    const double z = zero;
    step = (m.tv - z * m.t) / (m.vv - 2 * z * m.v + n * z * z);
  }
  if (!(step > 0) || !std::isfinite(step)) return {now.scale, zero};
  return {Stored(unit * static_cast<float>(step), unit, type), zero};
}

template <class Codes, bool kHasZero>
Step SolveTile(const float* x, size_t count, const CodeFormat& format, ScaleType type, Step now, const HqqSchedule& schedule,
               float* units) {
  const float unit = now.scale;
  Ints largest = SetInt(0);
  const auto divide = [&](Floats numbers) {
    largest = Max(largest, Bits(Abs(numbers)));
    return Div(numbers, Set(unit));
  };
  size_t i = 0;
  for (; i + 16 <= count; i += 16) Store(units + i, divide(Load(x + i)));
  if (i < count) StoreFirst(units + i, divide(LoadFirst(x + i, count - i)), count - i);
  const float largest_abs = FloatOf(static_cast<uint32_t>(Greatest(largest)));

  Step best = now;
  double lowest = std::numeric_limits<double>::infinity(), beta = schedule.beta;
  for (int round = 0; round <= schedule.iterations; ++round) {  // the first judges round to nearest, the last moves nothing
    const Quotients quotients(now.scale, largest_abs);
    const float b = static_cast<float>(beta);
    const Moments moments =
        quotients.fast()
            ? SumTile<Codes, kHasZero>(x, units, count, format, now, unit, schedule.p, b,
                                       [&](Floats v) { return quotients.Fast(v); })
            : SumTile<Codes, kHasZero>(x, units, count, format, now, unit, schedule.p, b,
                                       [&](Floats v) { return quotients.Exact(v); });
    if (moments.objective < lowest) {
      lowest = moments.objective;
      best = now;
    }
    now = LeastSquares(moments, count, now, unit, kHasZero, format, type);
    beta *= schedule.growth;
  }
  return best;
}

void SolveHqqTiles(const HqqTiles& tiles, const CodeFormat& format, ScaleType type, const HqqSchedule& schedule, float* units) {
  for (size_t tile = 0; tile < tiles.num_tiles; ++tile) {
    const float* const x = tiles.tiles + tile * tiles.count;
    const Step start{tiles.scale[tile], tiles.zero ? tiles.zero[tile] : 0};
    const auto solve = [&]<class Codes, bool kHasZero>() {
      return SolveTile<Codes, kHasZero>(x, tiles.count, format, type, start, schedule, units);
    };
    Step best = start;
    switch (format.kind) {  // integers alone have zero points
      case CodeKind::kIntegers:
        best = tiles.zero ? solve.template operator()<IntegerCodes, true>() : solve.template operator()<IntegerCodes, false>();
        break;
      case CodeKind::kFloats:
        best = solve.template operator()<FloatCodes, false>();
        break;
      case CodeKind::kTable:
        best = solve.template operator()<TableCodes, false>();
        break;
    }
    tiles.scale[tile] = best.scale;
    if (tiles.zero) tiles.zero[tile] = best.zero;
  }
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const SolveHqqKernel HALFBIN_SOLVE_HQQ = HALFBIN_TARGET::SolveHqqTiles;

}  // namespace halfbin
