// All kernels for one instruction set, named LINESCAN_ISA, with vectors of LINESCAN_WIDTH floats.
// Everything is in a namespace of its own: the linker must never take one set's code for another's.

#define LINESCAN_STRING_(a) #a
#define LINESCAN_STRING(a) LINESCAN_STRING_(a)

namespace linescan {
namespace LINESCAN_ISA {

#include "vector.h"
#include "causal_conv.h"
#include "selective_scan.h"
#include "matrix_scan.h"
#include "vector_scan.h"
#include "neighborhood.h"
#include "merge.h"
#include "blend.h"
#include "gates.h"

template <class F>
static void for_each(const float* x, float* y, int64_t n, const F& f) {
  const int64_t whole = n / W * W;
  packs(whole, [&](auto zero, int64_t i) LINESCAN_STAGE { store(y + i, f(load<decltype(zero)>(x + i))); });
  if (whole == n) return;
  float lanes[W] = {};
  std::memcpy(lanes, x + whole, (n - whole) * 4);
  store(lanes, f(load(lanes)));
  std::memcpy(y + whole, lanes, (n - whole) * 4);
}

// `exp_of_less` of whole vectors, put in order as S6's decays are.
LINESCAN_IN_ORDER static void decays(const float* x, float* y, int64_t n) {
  for (int64_t first = 0; first + TILE * W <= n; first += TILE * W) {
    Power power[TILE];
    staggered<TILE>([&](int i) LINESCAN_STAGE { power[i].start(load(x + first + i * W) * LOG2E); },
                    [&](int i) LINESCAN_STAGE { power[i].round(); },
                    [&](int i) LINESCAN_STAGE { power[i].split(); },
                    [&](int i) LINESCAN_STAGE { power[i].times(splat(1.0f)); },
                    [&](int i) LINESCAN_STAGE { store(y + first + i * W, power[i].product()); });
  }
  for (int64_t i = n / (TILE * W) * (TILE * W); i < n; ++i) y[i] = exp_of_less(splat(x[i]))[0];
}

static void to_float32(const void* x, Dtype dtype, int64_t n, float* y) {
  const int64_t first = 0;
  gather({static_cast<char*>(const_cast<void*>(x)), dtype}, 0, 0, 0, 0, &first, 1, n, n, y);
}

static void unary(Unary which, const float* x, float* y, int64_t n) {
  if (which == Unary::exp) for_each(x, y, n, [](const auto& v) LINESCAN_STAGE { return exp(v); });
  else if (which == Unary::softplus) for_each(x, y, n, [](const auto& v) LINESCAN_STAGE { return softplus(v); });
  else if (which == Unary::sigmoid) for_each(x, y, n, [](const auto& v) LINESCAN_STAGE { return sigmoid(v); });
  else decays(x, y, n);
}

// Reads rows of `width` numbers, or fills them: what no kernel can do without.
static float move_rows(float* base, int64_t pitch, const int64_t* token, int64_t rows, int64_t width, bool fill) {
  const V value = splat(1.0f);
  V sums[2] = {};
  for (int64_t t = 0; t < rows; ++t) {
    const float* later = base + token[t + AHEAD < rows ? t + AHEAD : t] * pitch;
    for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(later + i);
    float* row = base + token[t] * pitch;
    int64_t i = 0;
    for (; i + W <= width; i += W) {
      if (fill) store(row + i, value);
      else sums[i / W % 2] += load(row + i);
    }
    for (; i < width; ++i) {
      if (fill) row[i] = 1.0f;
      else sums[0][0] += row[i];
    }
  }
  return sums[0][0] + sums[1][0];
}

// `rounds` times 16 independent multiply-adds of vectors: the pace that no kernel can beat.
static float multiply_add(int64_t rounds) {
  V lanes[16], factor = splat(0.999f), term = splat(0.001f), sum = V{};
  for (int i = 0; i < 16; ++i) lanes[i] = splat(float(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) lanes[i] = lanes[i] * factor + term;
  }
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum[0];
}

// A kernel of which no number comes out that is too small to be a normal one.
template <auto KERNEL>
struct Flushed;
template <class... Arguments, void (*KERNEL)(Arguments...)>
struct Flushed<KERNEL> {
  static void run(Arguments... arguments) {
    const FlushToZero flush;
    KERNEL(arguments...);
  }
};

const Kernels kernels = {
    LINESCAN_STRING(LINESCAN_ISA),
    Flushed<open_gates>::run,
    Flushed<scan_forward>::run,
    Flushed<scan_backward>::run,
    Flushed<conv_forward>::run,
    Flushed<conv_backward>::run,
    Flushed<matrix_forward>::run,
    Flushed<matrix_backward>::run,
    Flushed<vector_forward>::run,
    Flushed<vector_backward>::run,
    Flushed<neighborhood_forward>::run,
    Flushed<channel_gates>::run,
    Flushed<weighted_sum>::run,
    Flushed<shift_blend>::run,
    Flushed<norm>::run,
    Flushed<rotate>::run,
    Flushed<gates>::run,
    to_float32,
    unary,
    multiply_add,
    move_rows,
};

}  // namespace LINESCAN_ISA
}  // namespace linescan
