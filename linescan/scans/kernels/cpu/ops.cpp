// The operators linescan_cpu::* and the choice of the instruction set. Shapes and dtypes are checked by the caller,
// linescan/scans/kernels/cpu.py; outputs come allocated.

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
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
    sets.push_back(&avx512_kernels);
  if (avx2) sets.push_back(&avx2_kernels);
#endif
  sets.push_back(&baseline_kernels);
  return sets;
}

const Kernels* current = available().front();

// linescan_cpu::instruction_set(int lanes) -> int: takes the best set of at most `lanes` float lanes (0: changes nothing)
// and answers with the lanes of the set in use.
int64_t lanes_of(const Kernels* set) {
#ifdef LINESCAN_X86
  if (set == &avx512_kernels) return 16;
  if (set == &avx2_kernels) return 8;
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

// -- tensors as the kernels see them ------------------------------------------------------------------------------------

Dtype dtype(const Tensor& x) {
  if (x.dtype() == stable::torch().aoti_torch_dtype_float32()) return Dtype::float32;
  if (x.dtype() == stable::torch().aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  if (x.dtype() == stable::torch().aoti_torch_dtype_float16()) return Dtype::float16;
  throw std::runtime_error("linescan: the CPU kernels take float32, bfloat16 and float16 tokens");
}

// (B, K or 1, L, ..., channels), or (B, L, channels) when `merged`.
View view(const Tensor& x, bool merged = false) {
  View v;
  if (!x) return v;
  const int64_t token = merged ? 1 : 2;
  v.data = static_cast<char*>(x.data());
  v.dtype = dtype(x);
  v.batch = x.stride(0);
  v.route = merged || x.size(1) == 1 ? 0 : x.stride(1);
  v.token = x.stride(token);
  v.group = x.dim() == token + 3 ? x.stride(token + 1) : 0;
  return v;
}

// (B, K or 1, L, H): a number a head.
View numbers(const Tensor& x) {
  View v = view(x);
  if (x) v.group = x.stride(3);
  return v;
}

Parameter parameter(const Tensor& x) {  // (K or 1, ...)
  Parameter p;
  if (!x) return p;
  p.data = x.floats();
  p.route = x.size(0) == 1 ? 0 : x.stride(0);
  return p;
}

Parameter state(const Tensor& x) {  // (B, K, ...)
  Parameter p;
  if (!x) return p;
  p.data = x.floats();
  p.batch = x.stride(0);
  p.route = x.stride(1);
  return p;
}

// A route table (K, S) or (B, K, S), contiguous, checked, and the tokens that its rows do not write.
class Table {
 public:
  Table() = default;
  Table(const Tensor& x, int64_t length) {
    if (!x) return;
    route.data = x.data();
    route.wide = x.dtype() == stable::torch().aoti_torch_dtype_int64();
    if (route.wide) look_through<int64_t>(x, length);
    else look_through<int32_t>(x, length);
    route.batch = x.dim() == 3 ? x.stride(0) : 0;
    route.route = x.stride(-2);
    route.rows = x.dim() == 3 ? x.size(1) : 0;
    route.gaps = gaps_.data(), route.gaps_begin = begin_.data();
    permutes = gaps_.empty() && x.size(-1) == length;
  }

  Route route;  // points into this object
  bool permutes = true;  // every route reads every token once

 private:
  template <class T>
  void look_through(const Tensor& x, int64_t length) {
    const T* entries = static_cast<const T*>(x.data());
    const int64_t steps = x.size(-1), rows = x.size(-2) * (x.dim() == 3 ? x.size(0) : 1);
    std::vector<char> written(length);
    int64_t wrong = 0;
    for (int64_t row = 0; row < rows; ++row, entries += steps) {
      std::fill(written.begin(), written.end(), 0);
      int64_t count = 0;
      for (int64_t t = 0; t < steps; ++t) {
        if (entries[t] >= length || entries[t] < -length - 1) ++wrong;
        else if (entries[t] >= 0) count += !written[entries[t]], written[entries[t]] = 1;
      }
      if (count < length)
        for (int64_t i = 0; i < length; ++i)
          if (!written[i]) gaps_.push_back(i);
      begin_.push_back(gaps_.size());
    }
    if (wrong)
      throw std::runtime_error("linescan: " + std::to_string(wrong) + " entries of a route table lie outside the " +
                               std::to_string(length) + " tokens");
  }

  std::vector<int64_t> gaps_, begin_ = {0};
};

// An output; the K routes of a merged one meet in its rows.
Target output(const Tensor& y, bool merged) { return {view(y, merged), false, merged}; }

// The gradient of a token input. Cleared here where a route may read a token twice, or not at all.
Target gradient(const Tensor& x, const Table& steps, int64_t routes) {
  if (!x) return {};
  if (!steps.permutes) {
    int64_t count = 1;
    for (int64_t i = 0; i < x.dim(); ++i) count *= x.size(i);
    std::memset(x.data(), 0, count * 4);
  }
  return {view(x), !steps.permutes, x.size(1) == 1 && routes > 1};
}

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// The work of a call is shared out unless it is so small that waking the threads takes longer.
int64_t grain(int64_t units, int64_t work) { return work < (int64_t(1) << 18) ? units : 1; }

// Forward: a channel's results do not depend on its block, so blocks may shrink until every thread has some.
void spread(Blocks& blocks, int64_t others) {
  uint32_t threads = 1;
  stable::check(stable::torch().torch_get_num_threads(&threads));
  blocks.width = lesser(384, blocks.D / blocks.G);
  while (threads > 1 && blocks.width > 16 && others * blocks.count() < 2 * int64_t(threads))
    blocks.width = (blocks.width / 2 + 15) / 16 * 16;
}

void add(int64_t n, const float* __restrict x, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

// out[i] = sum over b and k of x[b][k][i], k kept apart if `routes_out` > 1; in this order.
void sum_parts(const float* x, int64_t B, int64_t K, int64_t n, int64_t pitch, const Tensor& out) {
  if (!out) return;
  const int64_t routes_out = out.size(0);
  float* y = out.floats();
  std::memset(y, 0, routes_out * n * 4);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) add(n, x + (b * K + k) * pitch, y + (routes_out > 1 ? k * n : 0));
}

// The operators take the arguments of the operators in Python, in their order, then the outputs. They answer whether they
// could read the inputs as they stand; if not, nothing has been done, and the caller brings them into shape.

// -- selective scan -----------------------------------------------------------------------------------------------------

#define LINESCAN_SCAN_INPUTS                                                                                          \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "                  \
  "bool delta_softplus, Tensor? initial_state, Tensor? delta_weight, Tensor? route, bool merge"

struct ScanInputs {
  Tensor u, delta, A, B, C, D, z, bias, initial, weight, table;
  Table steps;
  Scan scan;

  explicit ScanInputs(Arguments& in) {
    Scan& s = scan;
    u = in.tokens(), delta = in.tokens(), A = in.parameter(), B = in.tokens(), C = in.tokens();
    D = in.optional_parameter(), z = in.optional_tokens(), bias = in.optional_parameter(), s.softplus = in.flag();
    initial = in.optional_parameter(), weight = in.optional_parameter(), table = in.table(), s.merge = in.flag();
    if (!in.fit) return;
    s.K = A.size(0), s.B = u.size(0), s.L = u.size(2), s.S = table ? table.size(-1) : s.L;
    s.D = u.size(3), s.G = B.dim() == 5 ? B.size(3) : 1, s.N = A.size(-1);
    s.u = view(u), s.delta = view(delta), s.b = view(B), s.c = view(C), s.z = view(z);
    s.A = parameter(A), s.skip = parameter(D), s.bias = parameter(bias), s.initial = state(initial);
    s.weight = parameter(weight), s.rank = weight ? weight.size(-1) : 0;
    steps = Table(table, s.L), s.route = steps.route;
    s.blocks.D = s.D, s.blocks.G = s.G;
  }
};

// (inputs, Tensor(a!) y, Tensor(b!) final_state) -> bool
void selective_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ScanInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.tensor();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Scan& s = inputs.scan;
  s.y = output(y, s.merge), s.state = state(final_state);
  const int64_t samples = s.merge ? s.B : s.B * s.K;
  spread(s.blocks, samples);
  const int64_t units = samples * s.blocks.count();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * (s.N + 4)),
           [&](int64_t begin, int64_t end) { current->scan_forward(s, begin, end); });
}

// Backward: the states of a segment of time are kept, for blocks so narrow that one segment is enough, if possible.
void segment(Scan& s) {
  const int64_t cache = 640 << 10, bytes = 4 * (s.N + 8);  // of a channel at a token
  const bool narrow = s.B * s.D < 1024 || (s.S * 64 * bytes > cache && s.S * 32 * bytes <= cache);
  s.blocks.width = lesser(narrow ? 32 : 64, s.D / s.G);
  const int64_t fits = cache / (s.blocks.width * bytes);
  s.segment = lesser((fits < 16 ? 16 : fits) / 16 * 16, (s.S + 15) / 16 * 16);
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

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB,
//  Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial_state) -> bool
// All gradients float32 and contiguous; dB and dC begin as zero.
void selective_scan_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ScanInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter();
  const Tensor du = in.tensor(), ddelta = in.tensor(), dA = in.tensor(), dB = in.tensor(), dC = in.tensor();
  const Tensor dD = in.optional(), dz = in.optional(), dbias = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Scan& s = inputs.scan;
  s.dy = view(dy, s.merge), s.dstate = state(dstate), s.dinitial = state(dinitial);
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

#define LINESCAN_CONV_INPUTS                                                                                          \
  "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? route, bool merge"

struct ConvInputs {
  Tensor x, weight, bias, initial, table;
  Table steps;
  Conv conv;

  explicit ConvInputs(Arguments& in) {
    Conv& s = conv;
    x = in.tokens(), weight = in.parameter(), bias = in.optional_parameter(), s.silu = in.flag();
    initial = in.optional_parameter(), table = in.table(), s.merge = in.flag();
    if (!in.fit) return;
    s.K = weight.size(0), s.B = x.size(0), s.L = x.size(2), s.S = table ? table.size(-1) : s.L;
    s.D = x.size(3), s.W = weight.size(-1);
    s.x = view(x), s.weight = parameter(weight), s.bias = parameter(bias), s.initial = state(initial);
    steps = Table(table, s.L), s.route = steps.route;
    s.blocks.D = s.D;
  }
};

// (inputs, Tensor(a!) y, Tensor(b!) final_state) -> bool
void causal_conv1d(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  ConvInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.tensor();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Conv& s = inputs.conv;
  s.y = output(y, s.merge), s.state = state(final_state);
  const int64_t samples = s.merge ? s.B : s.B * s.K;
  spread(s.blocks, samples);
  const int64_t units = samples * s.blocks.count();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * s.W),
           [&](int64_t begin, int64_t end) { current->conv_forward(s, begin, end); });
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
  const int64_t units = s.B * s.blocks.count(), taps = s.W + 1;
  const std::unique_ptr<float[]> partial(new float[s.B * s.K * s.D * taps]);
  s.partial = partial.get();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * s.W),
           [&](int64_t begin, int64_t end) { current->conv_backward(s, begin, end); });
  // (D, W + 1) of every sample and route, in their order.
  std::memset(dweight.floats(), 0, dweight.size(0) * s.D * s.W * 4);
  if (dbias) std::memset(dbias.floats(), 0, dbias.size(0) * s.D * 4);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t d = 0; d < s.D; ++d) {
        const float* part = s.partial + ((b * s.K + k) * s.D + d) * taps;
        add(s.W, part, dweight.floats() + ((dweight.size(0) > 1 ? k : 0) * s.D + d) * s.W);
        if (dbias) dbias.floats()[(dbias.size(0) > 1 ? k : 0) * s.D + d] += part[s.W];
      }
}

// -- matrix states ------------------------------------------------------------------------------------------------------

#define LINESCAN_MATRIX_INPUTS                                                                                        \
  "int rule, Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? gate, Tensor? beta, Tensor? bonus, "          \
  "Tensor? skip, Tensor? idle, float scale, bool normalize, Tensor? initial_state, Tensor? route, bool merge"

struct MatrixInputs {
  Tensor q, k, v, a, b, gate, beta, bonus, skip, idle, initial, table;
  Table steps;
  Matrix matrix;

  explicit MatrixInputs(Arguments& in) {
    Matrix& s = matrix;
    s.rule = Rule(in.integer());
    q = in.tokens(), k = in.tokens(), v = in.tokens(), a = in.optional_tokens(), b = in.optional_tokens();
    gate = in.optional(), beta = in.optional(), bonus = in.optional_parameter(), skip = in.optional_parameter();
    idle = in.optional_parameter(), s.scale = float(in.number()), s.normalize = in.flag();
    initial = in.optional_parameter(), table = in.table(), s.merge = in.flag();
    if (gate && gate.dim() == 5) in.fit &= gate.stride(-1) == 1 || gate.size(-1) == 1;
    if (!in.fit) return;
    s.K = 1;
    for (const Tensor* x : {&q, &k, &v, &a, &b, &gate, &beta})
      if (*x && x->size(1) > s.K) s.K = x->size(1);
    if (table && table.size(-2) > s.K) s.K = table.size(-2);
    s.B = v.size(0), s.L = v.size(2), s.S = table ? table.size(-1) : s.L;
    s.H = v.size(3), s.N = q.size(4), s.M = v.size(4), s.share = s.H / q.size(3);
    s.gates = !gate ? 0 : gate.dim() == 4 ? 1 : gate.size(4);
    s.q = view(q), s.k = view(k), s.v = view(v), s.a = view(a), s.b = view(b), s.gate = numbers(gate), s.beta = numbers(beta);
    s.bonus = parameter(bonus), s.skip = parameter(skip), s.idle = parameter(idle), s.initial = state(initial);
    steps = Table(table, s.L), s.route = steps.route;
  }
};

// (inputs, Tensor(a!) y, Tensor(b!) final_state) -> bool
void matrix_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  MatrixInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.tensor();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Matrix& s = inputs.matrix;
  s.y = output(y, s.merge), s.state = state(final_state);
  // Columns do not depend on each other: they may be shared out until every thread has some.
  Blocks columns;
  columns.D = s.M;
  const int64_t heads = s.B * s.H * (s.merge ? 1 : s.K);
  spread(columns, heads);
  s.width = columns.width;
  const int64_t units = heads * s.parts();
  parallel(units, grain(units, s.B * s.K * s.H * s.S * s.N * s.M),
           [&](int64_t begin, int64_t end) { current->matrix_forward(s, begin, end); });
}

// (inputs, Tensor grad_y, Tensor? grad_state, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? da,
//  Tensor(e!)? db, Tensor(f!)? dgate, Tensor(g!)? dbeta, Tensor(h!)? dbonus, Tensor(i!)? dskip, Tensor(j!)? didle,
//  Tensor(k!)? dinitial_state) -> bool
// All gradients float32 and contiguous; those of q and k for every head of v.
void matrix_scan_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  MatrixInputs inputs(in);
  const Tensor dy = in.tokens(), dstate = in.optional_parameter();
  const Tensor dq = in.tensor(), dk = in.tensor(), dv = in.tensor(), da = in.optional(), db = in.optional();
  const Tensor dgate = in.optional(), dbeta = in.optional(), dbonus = in.optional(), dskip = in.optional();
  const Tensor didle = in.optional(), dinitial = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
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

#define LINESCAN_VECTOR_INPUTS                                                                                        \
  "int rule, Tensor x, Tensor g, Tensor? w, Tensor? u, Tensor? initial_state, Tensor? route, bool merge"

struct VectorInputs {
  Tensor x, g, w, u, initial, table;
  Table steps;
  Vectors vectors;

  explicit VectorInputs(Arguments& in) {
    Vectors& s = vectors;
    s.rule = VectorRule(in.integer());
    x = in.tokens(), g = in.tokens(), w = in.optional_parameter(), u = in.optional_parameter();
    initial = in.optional_parameter(), table = in.table(), s.merge = in.flag();
    if (!in.fit) return;
    s.K = std::max(x.size(1), g.size(1));
    for (const Tensor* p : {&w, &u})
      if (*p) s.K = std::max(s.K, p->size(0));
    if (initial) s.K = std::max(s.K, initial.size(1));
    if (table) s.K = std::max(s.K, table.size(-2));
    s.B = std::max(x.size(0), g.size(0)), s.L = x.size(2), s.S = table ? table.size(-1) : s.L, s.D = x.size(3);
    s.numbers = s.rule == VectorRule::gated ? 1 : 3;
    s.x = view(x), s.g = view(g), s.w = parameter(w), s.u = parameter(u), s.initial = state(initial);
    steps = Table(table, s.L), s.route = steps.route;
    s.blocks.D = s.D;
  }
};

// (inputs, Tensor(a!) y, Tensor(b!)? final_state) -> bool
void vector_scan(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  VectorInputs inputs(in);
  const Tensor y = in.tensor(), final_state = in.optional();
  stack[0] = Value(in.fit);
  if (!in.fit) return;
  Vectors& s = inputs.vectors;
  s.y = output(y, s.merge), s.state = state(final_state);
  const int64_t samples = s.merge ? s.B : s.B * s.K;
  spread(s.blocks, samples);
  s.blocks.width = lesser(s.blocks.width, 64);
  const int64_t units = samples * s.blocks.count();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * 8),
           [&](int64_t begin, int64_t end) { current->vector_forward(s, begin, end); });
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
  s.blocks.width = lesser(64, s.D);
  const std::unique_ptr<float[]> parts(new float[s.B * s.K * 2 * s.D]);
  s.partial = parts.get();
  const int64_t units = s.B * s.blocks.count();
  parallel(units, grain(units, s.B * s.K * s.S * s.D * 16),
           [&](int64_t begin, int64_t end) { current->vector_backward(s, begin, end); });
  sum_parts(s.partial, s.B, s.K, s.D, 2 * s.D, dw);
  sum_parts(s.partial + s.D, s.B, s.K, s.D, 2 * s.D, du);
}

// linescan_cpu::unary(int which, Tensor x, Tensor(a!) y) -> (): for the tests of accuracy.
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
// take head by head, or block by block of channels.
void move_rows(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor x = in.tensor(), table = in.table();
  const int64_t width = in.integer();
  const bool fill = in.flag();
  const Table steps(table, x.size(2));
  const View rows = view(x);
  const int64_t count = table ? table.size(-1) : x.size(2);
  const int64_t routes = table ? std::max(x.size(1), table.size(-2)) : x.size(1);
  std::vector<int64_t> reads(count), writes(count);
  volatile float kept = 0.0f;
  for (int64_t b = 0; b < x.size(0); ++b)
    for (int64_t channel = 0; channel < x.size(3); channel += width)
      for (int64_t k = 0; k < routes; ++k) {
        steps.route.steps(b, k, 0, count, reads.data(), writes.data());
        for (int64_t& t : reads) t = t < 0 ? 0 : t;
        float* base = reinterpret_cast<float*>(rows.at(b, k, 0, channel));
        kept = current->move_rows(base, rows.token, reads.data(), count, lesser(width, x.size(3) - channel), fill);
      }
  (void)kept;
}

// -- registration -------------------------------------------------------------------------------------------------------

struct Registration {
  Registration() {
    const char* everywhere = "CompositeExplicitAutograd";
    define("instruction_set(int lanes) -> int", "instruction_set", everywhere, instruction_set);
    define("multiply_add(int rounds) -> int", "multiply_add", everywhere, multiply_add);
    define("move_rows(Tensor(a!) x, Tensor? route, int width, bool fill) -> ()", "move_rows", "CPU", move_rows);
    define("unary(int which, Tensor x, Tensor(a!) y) -> ()", "unary", "CPU", unary);
    define("selective_scan(" LINESCAN_SCAN_INPUTS ", Tensor(a!) y, Tensor(b!) final_state) -> bool", "selective_scan",
           "CPU", selective_scan);
    define("selective_scan_backward(" LINESCAN_SCAN_INPUTS
           ", Tensor grad_y, Tensor? grad_state, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, "
           "Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial_state) -> bool",
           "selective_scan_backward", "CPU", selective_scan_backward);
    define("matrix_scan(" LINESCAN_MATRIX_INPUTS ", Tensor(a!) y, Tensor(b!) final_state) -> bool", "matrix_scan",
           "CPU", matrix_scan);
    define("matrix_scan_backward(" LINESCAN_MATRIX_INPUTS
           ", Tensor grad_y, Tensor? grad_state, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? da, "
           "Tensor(e!)? db, Tensor(f!)? dgate, Tensor(g!)? dbeta, Tensor(h!)? dbonus, Tensor(i!)? dskip, "
           "Tensor(j!)? didle, Tensor(k!)? dinitial_state) -> bool",
           "matrix_scan_backward", "CPU", matrix_scan_backward);
    define("vector_scan(" LINESCAN_VECTOR_INPUTS ", Tensor(a!) y, Tensor(b!)? final_state) -> bool", "vector_scan",
           "CPU", vector_scan);
    define("vector_scan_backward(" LINESCAN_VECTOR_INPUTS
           ", Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dg, Tensor(c!)? dw, Tensor(d!)? du, "
           "Tensor(e!)? dinitial_state) -> bool",
           "vector_scan_backward", "CPU", vector_scan_backward);
    define("causal_conv1d(" LINESCAN_CONV_INPUTS ", Tensor(a!) y, Tensor(b!) final_state) -> bool", "causal_conv1d",
           "CPU", causal_conv1d);
    define("causal_conv1d_backward(" LINESCAN_CONV_INPUTS
           ", Tensor grad_y, Tensor? grad_state, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, "
           "Tensor(d!)? dinitial_state) -> bool",
           "causal_conv1d_backward", "CPU", causal_conv1d_backward);
  }
} registration;

}  // namespace
}  // namespace linescan
