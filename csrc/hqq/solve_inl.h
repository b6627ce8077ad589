// The alternation, included once by each instruction set, behind its lanes. HALFBIN_TARGET is the namespace of that set,
// HALFBIN_SOLVE_HQQ the name of its loop.
#include <cmath>
#include <limits>

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

template <class Codes, class Quotient>
Moments SumTile(const float* x, const float* units, size_t count, const CodeFormat& format, Step now, float unit, float p,
                float beta, const Quotient& quotient) {
  Doubles objective = ZeroSums(), v_sum = ZeroSums(), vv_sum = ZeroSums(), t_sum = ZeroSums(), tv_sum = ZeroSums();
  const Codes codes(format, SetInt(now.zero));
  const Floats ratio = Set(now.scale / unit), zero = Set(static_cast<float>(now.zero)), exponent = Set(p);
  const Floats strength = Set(1.0f / beta), smallest = Set(0x1p-126f), sign = Set(-0.0f);
  const auto take = [&](Floats numbers, Floats in_units, size_t lanes) {
    const Floats centred = codes.Decode(codes.Encode(quotient(numbers), numbers));
    Floats value = Add(centred, zero);
    if (lanes < 16) {  // other lanes are 0 all through, but for the value that stands for it
      float kept[16] = {};
      StoreFirst(kept, value, lanes);
      value = Load(kept);
    }
    const Floats error = Sub(in_units, Mul(centred, ratio)), size = Abs(error);
    const Floats power = Power(size, exponent);
    const Floats kept = Max(Sub(size, Mul(Div(power, Max(size, smallest)), strength)), Set(0.0f));
    const Floats target = Sub(in_units, FromBits(Or(Bits(kept), And(Bits(error), Bits(sign)))));
    AddTo(objective, power);
    AddTo(v_sum, value);
    AddProductTo(vv_sum, value, value);
    AddTo(t_sum, target);
    AddProductTo(tv_sum, target, value);
  };
  size_t i = 0;
  for (; i + 16 <= count; i += 16) take(Load(x + i), Load(units + i), 16);
  if (i < count) take(LoadFirst(x + i, count - i), LoadFirst(units + i, count - i), count - i);
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

template <class Codes>
Step SolveTile(const float* x, size_t count, const CodeFormat& format, ScaleType type, Step now, bool has_zero,
               const HqqSchedule& schedule, float* units) {
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
            ? SumTile<Codes>(x, units, count, format, now, unit, schedule.p, b, [&](Floats v) { return quotients.Fast(v); })
            : SumTile<Codes>(x, units, count, format, now, unit, schedule.p, b, [&](Floats v) { return quotients.Exact(v); });
    if (moments.objective < lowest) {
      lowest = moments.objective;
      best = now;
    }
    now = LeastSquares(moments, count, now, unit, has_zero, format, type);
    beta *= schedule.growth;
  }
  return best;
}

void SolveHqqTiles(const HqqTiles& tiles, const CodeFormat& format, ScaleType type, const HqqSchedule& schedule, float* units) {
  for (size_t tile = 0; tile < tiles.num_tiles; ++tile) {
    const float* const x = tiles.tiles + tile * tiles.count;
    const Step start{tiles.scale[tile], tiles.zero ? tiles.zero[tile] : 0};
    const bool has_zero = tiles.zero != nullptr;
    Step best = start;
    switch (format.kind) {
      case CodeKind::kIntegers:
        best = SolveTile<IntegerCodes>(x, tiles.count, format, type, start, has_zero, schedule, units);
        break;
      case CodeKind::kFloats:
        best = SolveTile<FloatCodes>(x, tiles.count, format, type, start, has_zero, schedule, units);
        break;
      case CodeKind::kTable:
        best = SolveTile<TableCodes>(x, tiles.count, format, type, start, has_zero, schedule, units);
        break;
    }
    tiles.scale[tile] = best.scale;
    if (has_zero) tiles.zero[tile] = best.zero;
  }
}

}  // namespace
}  // namespace halfbin::HALFBIN_TARGET

namespace halfbin {

const SolveHqqKernel HALFBIN_SOLVE_HQQ = HALFBIN_TARGET::SolveHqqTiles;

}  // namespace halfbin
