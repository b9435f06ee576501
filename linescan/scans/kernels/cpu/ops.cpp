// The operators linescan_cpu::* and the choice of the instruction set. Shapes and dtypes are checked by the caller,
// linescan/scans/kernels/cpu.py; outputs come allocated.

#include <algorithm>
#include <memory>
#include <vector>

#include "calls.h"
#include "stable.h"

namespace linescan {
namespace {

using stable::Arguments;
using stable::Tensor;
using stable::Value;
using stable::define;
using stable::parallel;

// -- instruction sets ---------------------------------------------------------------------------------------------------

// What this processor can run, best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets;
#ifdef LINESCAN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512::kernels);
  if (avx2) sets.push_back(&avx2::kernels);
#endif
  sets.push_back(&baseline::kernels);
  return sets;
}

}  // namespace

const Kernels* current = available().front();

namespace {

// linescan_cpu::version() -> int: of these operators, the number that cpu.py expects. Both rise when an operator changes.
void version(Value* stack, uint64_t, uint64_t) { stack[0] = Value(2); }

// linescan_cpu::instruction_set(int lanes) -> int: takes the best set of at most `lanes` float lanes (0: changes nothing)
// and answers with the lanes of the set in use.
int64_t lanes_of(const Kernels* set) {
#ifdef LINESCAN_X86
  if (set == &avx512::kernels) return 16;
  if (set == &avx2::kernels) return 8;
#endif
  return 4;
}
void instruction_set(Value* stack, uint64_t, uint64_t) {
  const int64_t most = Arguments(stack).integer();
  if (most > 0) {
    for (const Kernels* set : available()) {
      current = set;
      if (lanes_of(set) <= most) break;
    }
  }
  stack[0] = Value(lanes_of(current));
}

// The gradient of a token input. Cleared here where a route may read a token twice, or not at all.
Target gradient(const Tensor& x, const Table& steps, int64_t routes) {
  if (!x) return {};
  if (!steps.permutes) std::memset(x.data(), 0, x.numel() * 4);
  return {view(x), !steps.permutes, x.size(1) == 1 && routes > 1};
}

void add(int64_t n, const float* __restrict x, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

// y[i] = sum over b, k and parts of x[b][k][part][i], k kept apart if `routes_out` > 1; in this order.
void sum_parts(const float* x, int64_t B, int64_t K, int64_t parts, int64_t n, int64_t pitch, int64_t routes_out, float* y) {
  std::memset(y, 0, routes_out * n * 4);
  for (int64_t i = 0; i < B * K * parts; ++i) add(n, x + i * pitch, y + (routes_out > 1 ? i / parts % K * n : 0));
}
void sum_parts(const float* x, int64_t B, int64_t K, int64_t n, int64_t pitch, const Tensor& out) {
  if (out) sum_parts(x, B, K, 1, n, pitch, out.size(0), out.floats());
}

// The operators take the arguments of the operators in Python, in their order, then the outputs. They answer whether they
// could read the inputs as they stand; if not, nothing has been done, and the caller brings them into shape.

// -- selective scan -----------------------------------------------------------------------------------------------------

// linescan_cpu::selective_scan_segment(int batch, int channels, int groups, int steps, int states) -> int
void selective_scan_segment(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Scan s;
  s.B = in.integer(), s.D = in.integer(), s.G = in.integer(), s.S = in.integer(), s.N = in.integer();
  segment(s);
  stack[0] = Value(s.segment);
}

// (inputs, Tensor(a!)? y, Tensor(b!)? final_state, Tensor(c!)? starts) -> bool
// starts (B, K, segments - 1, D, N), where a backward will follow: the states that segments but the first start from.
void selective_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ScanInputs inputs(in);
  const Tensor y = in.optional(), final_state = in.optional(), starts = in.optional();
  stack[0] = Value(in.fit);
  if (in.fit) inputs.forward(in, y, final_state, starts);
}

// dB or dC (B, K or 1, L, G, N) from the partial sums in time order; blocks and routes are added in their order.
// Without a route table no two steps meet in a row, and slabs of time can be done at once.
void sum_taps(const Scan& s, int side, const Tensor& out) {
  const int64_t routes_out = out.size(1), blocks = s.blocks.count(), per_group = s.blocks.per_group(), N = s.N;
  const bool apart = routes_out > 1 || s.K == 1;
  const int64_t ways = apart ? s.K : 1, slab = s.route.data ? s.S : 128, slabs = (s.S + slab - 1) / slab;
  const int64_t units = s.B * ways * s.G * slabs;
  parallel(units, grain(units, s.B * s.K * s.S * blocks * N), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> reads(slab), writes(slab);
    std::vector<float> sums(slab * N);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t t0 = unit % slabs * slab, count = lesser(slab, s.S - t0);
      const int64_t g = unit / slabs % s.G, way = unit / slabs / s.G % ways, b = unit / slabs / s.G / ways;
      for (int64_t k = apart ? way : 0; k < (apart ? way + 1 : s.K); ++k) {
        s.route.steps(b, k, t0, count, reads.data(), writes.data());
        const float* parts = s.partial_bc + (((b * s.K + k) * blocks + g * per_group) * 2 + side) * s.S * N + t0 * N;
        std::memcpy(sums.data(), parts, count * N * 4);
        for (int64_t i = 1; i < per_group; ++i) add(count * N, parts + i * 2 * s.S * N, sums.data());
        for (int64_t t = 0; t < count; ++t)
          if (reads[t] >= 0)
            add(N, sums.data() + t * N,
                out.floats() + (((b * routes_out + (apart ? way : 0)) * s.L + reads[t]) * s.G + g) * N);
      }
    }
  });
}

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor? starts, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA,
//  Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial_state) -> bool
// All gradients float32 and contiguous; dB and dC begin as zero.
void selective_scan_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ScanInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter(), starts = in.optional_parameter();
  const Tensor du = in.tensor(), ddelta = in.tensor(), dA = in.tensor(), dB = in.tensor(), dC = in.tensor();
  const Tensor dD = in.optional(), dz = in.optional(), dbias = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Scan& s = inputs.scan;
  s.dy = view(dy, s.merge), s.dstate = state(dstate), s.dinitial = state(dinitial), s.starts = state(starts);
  s.du = gradient(du, inputs.steps, s.K), s.ddelta = gradient(ddelta, inputs.steps, s.K);
  s.dz = gradient(dz, inputs.steps, s.K);
  segment(s);
  const int64_t blocks = s.blocks.count(), units = s.B * blocks;
  const std::unique_ptr<float[]> taps(new float[s.B * s.K * blocks * 2 * s.S * s.N]);
  const std::unique_ptr<float[]> of_A(new float[s.B * s.K * s.D * s.N]), of_channel(new float[s.B * s.K * 2 * s.D]);
  s.partial_bc = taps.get(), s.partial_A = of_A.get(), s.partial_channel = of_channel.get();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * (s.N + 4)),
           [&](int64_t begin, int64_t end) { current->scan_backward(s, begin, end); });
  sum_taps(s, 0, dB), sum_taps(s, 1, dC);
  sum_parts(s.partial_A, s.B, s.K, s.D * s.N, s.D * s.N, dA);
  sum_parts(s.partial_channel, s.B, s.K, s.D, 2 * s.D, dD);
  sum_parts(s.partial_channel + s.D, s.B, s.K, s.D, 2 * s.D, dbias);
}

// -- causal convolution -------------------------------------------------------------------------------------------------

// (inputs, Tensor(a!) y, Tensor(b!) final_state) -> bool
void causal_conv1d(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ConvInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.tensor();
  stack[0] = Value(in.fit);
  if (in.fit) inputs.forward(in, y, final_state);
}

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias,
//  Tensor(d!)? dinitial_state) -> bool
void causal_conv1d_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ConvInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter();
  const Tensor dx = in.tensor(), dweight = in.tensor(), dbias = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Conv& s = inputs.conv;
  s.dy = view(dy, s.merge), s.dstate = state(dstate), s.dinitial = state(dinitial);
  s.dx = gradient(dx, inputs.steps, s.K);
  s.blocks.width = lesser(64, s.D);
  if (inputs.apart(s.dx.shared)) s.slab = lesser(256, s.S);
  const int64_t units = s.B * s.slabs() * s.blocks.count(), taps = s.W * s.D, n = taps + s.D, routes = dweight.size(0);
  const std::unique_ptr<float[]> partial(new float[s.B * s.K * s.slabs() * n]), of_weight(new float[routes * taps]);
  s.partial = partial.get();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * s.W),
           [&](int64_t begin, int64_t end) { current->conv_backward(s, begin, end); });
  sum_parts(s.partial, s.B, s.K, s.slabs(), taps, n, routes, of_weight.get());
  for (int64_t i = 0; i < routes * s.D; ++i)
    for (int64_t j = 0; j < s.W; ++j)
      dweight.floats()[i * s.W + j] = of_weight[i / s.D * taps + j * s.D + i % s.D];
  if (dbias) sum_parts(s.partial + taps, s.B, s.K, s.slabs(), s.D, n, dbias.size(0), dbias.floats());
}

// -- matrix states ------------------------------------------------------------------------------------------------------

// linescan_cpu::matrix_scan_piece(int keys, int values, int steps) -> int
void matrix_scan_piece(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Matrix s;
  s.N = in.integer(), s.M = in.integer(), s.S = in.integer();
  piece(s);
  stack[0] = Value(s.piece);
}

// (inputs, Tensor(a!)? y, Tensor(b!)? final_state, Tensor(c!)? starts, Tensor(d!)? written) -> bool
// Where a backward will follow: starts (B, K, H, pieces - 1, N, M or, normalised, M + 1), the states that pieces but the
// first start from; written (B, K, H, S, M), whole pieces by whole vectors, what dependent writes wrote.
void matrix_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  MatrixInputs inputs(in);
  const Tensor y = in.optional(), final_state = in.optional(), starts = in.optional(), written = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  inputs.hand_over(starts, written);
  inputs.forward(in, y, final_state);
}

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor? starts, Tensor? written, Tensor(a!) dq, Tensor(b!) dk,
//  Tensor(c!) dv, Tensor(d!)? da, Tensor(e!)? db, Tensor(f!)? dgate, Tensor(g!)? dbeta, Tensor(h!)? dbonus,
//  Tensor(i!)? dskip, Tensor(j!)? didle, Tensor(k!)? dinitial_state) -> bool
// All gradients float32 and contiguous; those of q and k for every head of v.
void matrix_scan_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  MatrixInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter();
  const Tensor starts = in.optional_parameter(), written = in.optional_parameter();
  const Tensor dq = in.tensor(), dk = in.tensor(), dv = in.tensor(), da = in.optional(), db = in.optional();
  const Tensor dgate = in.optional(), dbeta = in.optional(), dbonus = in.optional(), dskip = in.optional();
  const Tensor didle = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  inputs.hand_over(starts, written);
  Matrix& s = inputs.matrix;
  s.dy = view(dy, s.merge), s.dstate = state(dstate), s.dinitial = state(dinitial);
  const auto to = [&](const Tensor& x) { return gradient(x, inputs.steps, s.K); };
  s.dq = to(dq), s.dk = to(dk), s.dv = to(dv), s.da = to(da), s.db = to(db), s.dgate = to(dgate), s.dbeta = to(dbeta);
  const int64_t rows = s.B * s.K * s.H;
  const std::unique_ptr<float[]> parts(new float[rows * (s.N + 2)]);
  s.partial_bonus = parts.get(), s.partial_skip = s.partial_bonus + rows * s.N, s.partial_idle = s.partial_skip + rows;
  const int64_t units = s.B * s.H;
  parallel(units, grain(units, rows * s.S * s.N * s.M),
           [&](int64_t begin, int64_t end) { current->matrix_backward(s, begin, end); });
  sum_parts(s.partial_bonus, s.B, s.K, s.H * s.N, s.H * s.N, dbonus);
  sum_parts(s.partial_skip, s.B, s.K, s.H, s.H, dskip);
  sum_parts(s.partial_idle, s.B, s.K, s.H, s.H, didle);
}

// -- vector states ------------------------------------------------------------------------------------------------------

// (inputs, Tensor(a!) y, Tensor(b!)? final_state) -> bool
void vector_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  VectorInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.optional();
  stack[0] = Value(in.fit);
  if (in.fit) inputs.forward(in, y, final_state);
}

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dg, Tensor(c!)? dw, Tensor(d!)? du,
//  Tensor(e!)? dinitial_state) -> bool
// All gradients float32 and contiguous.
void vector_scan_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  VectorInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter();
  const Tensor dx = in.tensor(), dg = in.tensor(), dw = in.optional(), du = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Vectors& s = inputs.vectors;
  s.dy = view(dy, s.merge), s.dstate = state(dstate), s.dinitial = state(dinitial);
  s.dx = gradient(dx, inputs.steps, s.K), s.dg = gradient(dg, inputs.steps, s.K);
  // An even number of blocks, for two threads; wide ones, whose rows hold several lines of cache.
  const int64_t pieces = 2 * ((s.D + 255) / 256);
  s.blocks.width = ((s.D + pieces - 1) / pieces + 15) / 16 * 16;
  const std::unique_ptr<float[]> parts(new float[s.B * s.K * 2 * s.D]);
  s.partial = parts.get();
  const int64_t units = s.B * s.blocks.count();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * 16),
           [&](int64_t begin, int64_t end) { current->vector_backward(s, begin, end); });
  sum_parts(s.partial, s.B, s.K, s.D, 2 * s.D, dw);
  sum_parts(s.partial + s.D, s.B, s.K, s.D, 2 * s.D, du);
}

// -- neighbourhood attention --------------------------------------------------------------------------------------------

// (Tensor q, Tensor k, Tensor v, Tensor? bias, int breadth, int rows, int columns, int row_step, int column_step,
//  float scale, Tensor(a!) y) -> bool: q, k and v (B, height * breadth, heads, channels), windows of `rows` by `columns`
// keys that stand `row_step` and `column_step` apart.
void neighborhood_attention(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor q = in.tokens(), k = in.tokens(), v = in.tokens(), bias = in.optional_parameter();
  Neighborhood s;
  s.breadth = in.integer();
  for (int64_t* pair : {s.window, s.dilation})
    for (int axis = 0; axis < 2; ++axis) pair[axis] = in.integer();
  s.scale = float(in.number());
  const Tensor y = in.tensor();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  s.B = q.size(0), s.height = q.size(1) / s.breadth, s.heads = q.size(2), s.D = q.size(3), s.M = v.size(3);
  s.q = view(q, true), s.k = view(k, true), s.v = view(v, true), s.y.view = view(y, true), s.bias = parameter(bias);
  // Strips that are too narrow bring in many keys for few queries.
  const int64_t lanes = lanes_of(current), window = s.window[1];
  s.span = (window + lanes) / lanes * lanes;
  while ((s.span - window + 1) * s.window[0] < 8) s.span += lanes;
  const int64_t tile = s.span - window + 1, threads = in.threads();
  const int64_t columns = (s.breadth + s.dilation[1] - 1) / s.dilation[1], rows = s.height / s.dilation[0];
  s.strips = (columns + tile - 1) / tile;
  const int64_t whole = s.B * s.heads * s.dilation[0] * s.dilation[1] * s.strips;
  while (threads > 1 && whole * s.bands < 2 * threads && rows >= 4 * s.bands * s.window[0]) s.bands *= 2;
  const int64_t units = whole * s.bands;
  parallel(units, grain(units, s.B * q.size(1) * s.heads * s.window[0] * s.window[1] * (s.D + s.M)),
           [&](int64_t begin, int64_t end) { current->neighborhood_forward(s, begin, end); });
}

// -- merging routes -----------------------------------------------------------------------------------------------------

Merge merge_of(const Tensor& y, const Tensor& weight) {
  Merge s;
  s.B = y.size(0), s.K = y.size(1), s.L = y.size(2), s.D = y.size(3);
  s.y = view(y), s.weight = weight.floats();
  return s;
}

// linescan_cpu::channel_gates(Tensor y, Tensor weight, Tensor bias, float eps, Tensor reduce, Tensor reduce_bias,
//  Tensor expand, Tensor expand_bias, Tensor(a!) out) -> ()
void channel_gates(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor y = in.tensor(), weight = in.tensor(), bias = in.tensor();
  const float eps = float(in.number());
  const Tensor reduce = in.tensor(), reduce_bias = in.tensor(), expand = in.tensor(), expand_bias = in.tensor();
  const Tensor out = in.tensor();
  Merge s = merge_of(y, weight);
  s.gates = out.floats(), s.bias = bias.floats(), s.eps = eps, s.hidden = reduce.size(0);
  s.reduce = reduce.floats(), s.reduce_bias = reduce_bias.floats();
  s.expand = expand.floats(), s.expand_bias = expand_bias.floats();
  parallel(s.B * s.K, grain(s.B * s.K, s.B * s.K * s.L * s.D * 4),
           [&](int64_t begin, int64_t end) { current->channel_gates(s, begin, end); });
}

// linescan_cpu::weighted_sum(Tensor y, Tensor weight, Tensor(a!) out) -> ()
void weighted_sum(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor y = in.tensor(), weight = in.tensor(), out = in.tensor();
  Merge s = merge_of(y, weight);
  s.out = view(out, true);
  parallel(s.B * s.L, s.B * s.K * s.L * s.D < (int64_t(1) << 18) ? s.B * s.L : 64,
           [&](int64_t begin, int64_t end) { current->weighted_sum(s, begin, end); });
}

// -- between products and recurrences -------------------------------------------------------------------------------------

// linescan_cpu::shift_blend(Tensor x, Tensor mix, int height, int breadth, int heads, float gamma, int pixels, bool own,
//  bool added, Tensor(a!) out) -> (): gamma is the share of a head's channels in each of its first four groups. All three
//  tensors may be in half precision.
void shift_blend(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor x = in.parameter(), mix = in.parameter();
  Blend s;
  s.height = in.integer(), s.breadth = in.integer(), s.heads = in.integer();
  const double gamma = in.number();
  s.pixels = in.integer(), s.own = in.flag(), s.added = in.flag();
  const Tensor out = in.tensor();
  s.B = x.size(0), s.L = x.size(1), s.C = x.size(2), s.K = out.size(0);
  s.x = x.floats(), s.mix = mix.floats();
  s.out = {static_cast<char*>(out.data()), dtype_of(out), 0, out.stride(0)};
  const int64_t channels = s.C / s.heads;
  for (int i = 1; i < 5; ++i) s.ends[i] = lesser(int64_t(channels * gamma * i), channels);
  s.ends[5] = channels;
  const int64_t units = s.B * s.L;
  parallel(units, units * s.C * s.K < (int64_t(1) << 18) ? units : 64,
           [&](int64_t begin, int64_t end) { current->shift_blend(s, begin, end); });
}

// linescan_cpu::norm(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, int channels, float eps, Tensor(a!) out) -> (): each
//  may be in half precision.
void norm(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor x = in.tensor(), weight = in.parameter(), bias = in.optional_parameter(), gate = in.optional();
  Norm s;
  s.channels = in.integer(), s.eps = float(in.number());
  const Tensor out = in.tensor();
  s.C = weight.size(0), s.rows = x.numel() / s.C;
  const auto rows = [&](const Tensor& t) {
    return t ? View{static_cast<char*>(t.data()), dtype_of(t), 0, 0, s.channels} : View();
  };
  s.weight = weight.floats(), s.bias = bias.floats(), s.x = rows(x), s.gate = rows(gate), s.out = rows(out);
  parallel(s.rows, s.rows * s.C * 4 < (int64_t(1) << 18) ? s.rows : 64,
           [&](int64_t begin, int64_t end) { current->norm(s, begin, end); });
}

// linescan_cpu::rotate(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> (): rows x (rows, C), tables (L, channels).
void rotate(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor x = in.tensor(), cos = in.tensor(), sin = in.tensor(), out = in.tensor();
  Rotation s;
  s.rows = x.size(0), s.C = x.size(1), s.pitch = x.stride(0), s.L = cos.size(0), s.channels = cos.size(1);
  s.x = x.floats(), s.cos = cos.floats(), s.sin = sin.floats(), s.out = out.floats();
  parallel(s.rows, s.rows * s.C < (int64_t(1) << 18) ? s.rows : 64,
           [&](int64_t begin, int64_t end) { current->rotate(s, begin, end); });
}

// -- gates --------------------------------------------------------------------------------------------------------------

#define LINESCAN_GATE_INPUTS "int gate, float factor, Tensor x, Tensor? y, Tensor? z, Tensor? parameter, int head"

// Float32 tensors (B, K or 1, L, channels or heads), checked by the caller.
struct GateInputs {
  Tensor in[3], parameter;
  Gates gates;

  explicit GateInputs(Arguments& arguments) {
    Gates& s = gates;
    s.gate = Gate(arguments.integer()), s.factor = float(arguments.number());
    in[0] = arguments.tensor(), in[1] = arguments.optional(), in[2] = arguments.optional();
    parameter = arguments.optional(), s.head = arguments.integer();
    s.B = in[0].size(0), s.K = 1, s.L = in[0].size(2), s.D = in[0].size(3);
    s.parameter = parameter ? parameter.floats() : nullptr;
    for (int i = 0; i < 3; ++i)
      if (in[i]) s.in[i] = view(in[i]), s.K = std::max(s.K, in[i].size(1));
  }

  void run(bool back) {
    const Gates& s = gates;
    parallel(s.units(), grain(s.units(), 8 * s.B * s.K * s.L * s.D),
             [&](int64_t begin, int64_t end) { current->gates(s, back, begin, end); });
  }
};

// linescan_cpu::gate(inputs, Tensor(a!) out, Tensor(b!)? other) -> ()
void gate(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  GateInputs inputs(in);
  const Tensor out = in.tensor(), other = in.optional();
  inputs.gates.out[0] = view(out), inputs.gates.out[1] = view(other);
  inputs.run(false);
}

// linescan_cpu::gate_backward(inputs, Tensor grad, Tensor? grad_other, Tensor(a!) dx, Tensor(b!)? dy, Tensor(c!)? dz,
//                             Tensor(d!)? dparameter) -> ()
void gate_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  GateInputs inputs(in);
  Gates& s = inputs.gates;
  const Tensor grad = in.tensor(), grad_other = in.optional();
  const Tensor of_in[3] = {in.tensor(), in.optional(), in.optional()}, of_parameter = in.optional();
  s.out[0] = view(grad), s.out[1] = view(grad_other);
  for (int i = 0; i < 3; ++i)
    if (of_in[i]) s.of_in[i] = {view(of_in[i]), false, of_in[i].size(1) < s.K};
  const std::unique_ptr<float[]> partial(new float[of_parameter ? s.units() * s.D : 0]);
  s.partial = partial.get();
  inputs.run(true);
  sum_parts(s.partial, s.units(), 1, s.D, s.D, of_parameter);
}

// linescan_cpu::unary(int which, Tensor x, Tensor(a!) y) -> (): for the tests of accuracy and the benchmark.
void unary(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const int64_t which = in.integer();
  const Tensor x = in.tensor(), y = in.tensor();
  current->unary(Unary(which), x.floats(), y.floats(), x.size(0));
}

// linescan_cpu::multiply_add(int rounds) -> int: for the benchmark; performs rounds * 16 * answer multiply-adds.
void multiply_add(Value* stack, uint64_t, uint64_t) {
  volatile float kept = current->multiply_add(Arguments(stack).integer());
  (void)kept;
  stack[0] = Value(lanes_of(current));
}

// linescan_cpu::move_rows(Tensor x, Tensor? route, int width, bool fill) -> (): for the benchmark. Reads all float32
// tokens of x (B, K or 1, L, channels) along every route, or fills them, `width` channels at a time, as kernels do that
// take head by head, or block by block of channels, and share these among threads.
void move_rows(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor x = in.tensor(), table = in.table();
  const int64_t width = in.integer();
  const bool fill = in.flag();
  const Table steps(table, x.size(2));
  const View rows = view(x);
  const int64_t count = table ? table.size(-1) : x.size(2);
  const int64_t routes = table ? std::max(x.size(1), table.size(-2)) : x.size(1);
  const int64_t blocks = (x.size(3) + width - 1) / width, units = x.size(0) * blocks;
  parallel(units, grain(units, x.size(0) * routes * count * x.size(3)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> reads(count), writes(count);
    volatile float kept = 0.0f;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / blocks, channel = unit % blocks * width;
      for (int64_t k = 0; k < routes; ++k) {
        steps.route.steps(b, k, 0, count, reads.data(), writes.data());
        for (int64_t& t : reads) t = t < 0 ? 0 : t;
        float* base = reinterpret_cast<float*>(rows.at(b, k, 0, channel));
        kept = current->move_rows(base, rows.token, reads.data(), count, lesser(width, x.size(3) - channel), fill);
      }
    }
    (void)kept;
  });
}

// -- registration -------------------------------------------------------------------------------------------------------

const stable::Definitions definitions([] {
  const char* everywhere = "CompositeExplicitAutograd";
  define("version() -> int", "version", everywhere, version);
  define("instruction_set(int lanes) -> int", "instruction_set", everywhere, instruction_set);
  define("multiply_add(int rounds) -> int", "multiply_add", everywhere, multiply_add);
  define("move_rows(Tensor(a!) x, Tensor? route, int width, bool fill) -> ()", "move_rows", "CPU", move_rows);
  define("channel_gates(Tensor y, Tensor weight, Tensor bias, float eps, Tensor reduce, Tensor reduce_bias, "
         "Tensor expand, Tensor expand_bias, Tensor(a!) out) -> ()",
         "channel_gates", "CPU", channel_gates);
  define("weighted_sum(Tensor y, Tensor weight, Tensor(a!) out) -> ()", "weighted_sum", "CPU", weighted_sum);
  define("shift_blend(Tensor x, Tensor mix, int height, int breadth, int heads, float gamma, int pixels, bool own, "
         "bool added, Tensor(a!) out) -> ()",
         "shift_blend", "CPU", shift_blend);
  define("norm(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, int channels, float eps, Tensor(a!) out) -> ()", "norm",
         "CPU", norm);
  define("rotate(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()", "rotate", "CPU", rotate);
  define("gate(" LINESCAN_GATE_INPUTS ", Tensor(a!) out, Tensor(b!)? other) -> ()", "gate", "CPU", gate);
  define("gate_backward(" LINESCAN_GATE_INPUTS
         ", Tensor grad, Tensor? grad_other, Tensor(a!) dx, Tensor(b!)? dy, Tensor(c!)? dz, Tensor(d!)? dparameter) -> ()",
         "gate_backward", "CPU", gate_backward);
  define("unary(int which, Tensor x, Tensor(a!) y) -> ()", "unary", "CPU", unary);
  define("selective_scan_segment(int batch, int channels, int groups, int steps, int states) -> int",
         "selective_scan_segment", everywhere, selective_scan_segment);
  define("selective_scan(" LINESCAN_SCAN_INPUTS ", Tensor(a!)? y, Tensor(b!)? final_state, Tensor(c!)? starts) -> bool",
         "selective_scan", "CPU", selective_scan);
  define("selective_scan_backward(" LINESCAN_SCAN_INPUTS
         ", Tensor grad_y, Tensor? grad_state, Tensor? starts, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, "
         "Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial_state) -> bool",
         "selective_scan_backward", "CPU", selective_scan_backward);
  define("matrix_scan_piece(int keys, int values, int steps) -> int", "matrix_scan_piece", everywhere, matrix_scan_piece);
  define("matrix_scan(" LINESCAN_MATRIX_INPUTS
         ", Tensor(a!)? y, Tensor(b!)? final_state, Tensor(c!)? starts, Tensor(d!)? written) -> bool",
         "matrix_scan", "CPU", matrix_scan);
  define("matrix_scan_backward(" LINESCAN_MATRIX_INPUTS
         ", Tensor grad_y, Tensor? grad_state, Tensor? starts, Tensor? written, Tensor(a!) dq, Tensor(b!) dk, "
         "Tensor(c!) dv, Tensor(d!)? da, Tensor(e!)? db, Tensor(f!)? dgate, Tensor(g!)? dbeta, Tensor(h!)? dbonus, Tensor(i!)? dskip, "
         "Tensor(j!)? didle, Tensor(k!)? dinitial_state) -> bool",
         "matrix_scan_backward", "CPU", matrix_scan_backward);
  define("vector_scan(" LINESCAN_VECTOR_INPUTS ", Tensor(a!) y, Tensor(b!)? final_state) -> bool", "vector_scan",
         "CPU", vector_scan);
  define("vector_scan_backward(" LINESCAN_VECTOR_INPUTS
         ", Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dg, Tensor(c!)? dw, Tensor(d!)? du, "
         "Tensor(e!)? dinitial_state) -> bool",
         "vector_scan_backward", "CPU", vector_scan_backward);
  define("neighborhood_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, int breadth, int rows, int columns, "
         "int row_step, int column_step, float scale, Tensor(a!) y) -> bool",
         "neighborhood_attention", "CPU", neighborhood_attention);
  define("causal_conv1d(" LINESCAN_CONV_INPUTS ", Tensor(a!) y, Tensor(b!) final_state) -> bool", "causal_conv1d",
         "CPU", causal_conv1d);
  define("causal_conv1d_backward(" LINESCAN_CONV_INPUTS
         ", Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, "
         "Tensor(d!)? dinitial_state) -> bool",
         "causal_conv1d_backward", "CPU", causal_conv1d_backward);
});

}  // namespace

// For a process in which something else has loaded the library before torch.
extern "C" __attribute__((visibility("default"))) void linescan_define_operators() { stable::define_pending(); }

}  // namespace linescan
