// All kernels for one instruction set, named LINESCAN_ISA, with vectors of LINESCAN_WIDTH floats.
// Everything is in a namespace of its own: the linker must never take one set's code for another's.

#define LINESCAN_JOIN_(a, b) a##b
#define LINESCAN_JOIN(a, b) LINESCAN_JOIN_(a, b)
#define LINESCAN_STRING_(a) #a
#define LINESCAN_STRING(a) LINESCAN_STRING_(a)

namespace linescan {
namespace LINESCAN_ISA {

#include "vector.h"
#include "causal_conv.h"
#include "selective_scan.h"
#include "matrix_scan.h"
#include "vector_scan.h"

static void unary(Unary which, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    float lanes[W] = {};
    const int64_t count = n - i < W ? n - i : W;
    std::memcpy(lanes, x + i, count * 4);
    const V v = load(lanes);
    store(lanes, which == Unary::exp ? exp(v) : which == Unary::softplus ? softplus(v) : sigmoid(v));
    std::memcpy(y + i, lanes, count * 4);
  }
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

}  // namespace LINESCAN_ISA

const Kernels LINESCAN_JOIN(LINESCAN_ISA, _kernels) = {
    LINESCAN_STRING(LINESCAN_ISA), LINESCAN_ISA::scan_forward,  LINESCAN_ISA::scan_backward,
    LINESCAN_ISA::conv_forward,    LINESCAN_ISA::conv_backward, LINESCAN_ISA::matrix_forward,
    LINESCAN_ISA::matrix_backward, LINESCAN_ISA::vector_forward, LINESCAN_ISA::vector_backward,
    LINESCAN_ISA::unary,           LINESCAN_ISA::multiply_add,
};

}  // namespace linescan
