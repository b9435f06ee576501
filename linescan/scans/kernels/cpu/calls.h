// What the operators of torch and of ONNX Runtime share: their arguments, and how a forward is shared out among threads.
//
// A host brings a class `Arguments`, which takes the arguments in the order of the schema, has threads() and
// parallel(count, grain, f), and a `Tensor` with dim, size, stride, data, floats, dtype_of(x) and is_wide(x).
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace linescan {

// -- tensors as the kernels see them ------------------------------------------------------------------------------------

// (B, K or 1, L, ..., channels), or (B, L, channels) when `merged`.
template <class Tensor>
View view(const Tensor& x, bool merged = false) {
  View v;
  if (!x) return v;
  const int64_t token = merged ? 1 : 2;
  v.data = static_cast<char*>(x.data());
  v.dtype = dtype_of(x);
  v.batch = x.stride(0);
  v.route = merged || x.size(1) == 1 ? 0 : x.stride(1);
  v.token = x.stride(token);
  v.group = x.dim() == token + 3 ? x.stride(token + 1) : 0;
  return v;
}

// (B, K or 1, L, H): a number a head.
template <class Tensor>
View numbers(const Tensor& x) {
  View v = view(x);
  if (x) v.group = x.stride(3);
  return v;
}

template <class Tensor>
Parameter parameter(const Tensor& x) {  // (K or 1, ...)
  Parameter p;
  if (!x) return p;
  p.data = x.floats();
  p.route = x.size(0) == 1 ? 0 : x.stride(0);
  return p;
}

template <class Tensor>
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
  template <class Tensor>
  Table(const Tensor& x, int64_t length) {
    if (!x) return;
    route.data = x.data();
    route.wide = is_wide(x);
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
  template <class T, class Tensor>
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
template <class Tensor>
Target output(const Tensor& y, bool merged) { return {view(y, merged), false, merged}; }

// (B, K, L, ...), or merged (B, L, ...).
template <class Work>
std::vector<int64_t> rows(const Work& s, std::vector<int64_t> channels) {
  std::vector<int64_t> shape = {s.B, s.K, s.L};
  if (s.merge) shape = {s.B, s.L};
  shape.insert(shape.end(), channels.begin(), channels.end());
  return shape;
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// The work of a call is shared out unless it is so small that waking the threads takes longer.
inline int64_t grain(int64_t units, int64_t work) { return work < (int64_t(1) << 18) ? units : 1; }

// Forward: a channel's results do not depend on its block, so blocks may shrink until no thread waits long for another.
inline void spread(Blocks& blocks, int64_t others, int64_t threads) {
  blocks.width = lesser(384, blocks.D / blocks.G);
  const auto is_uneven = [&] {
    const int64_t units = others * blocks.count(), rounds = (units + threads - 1) / threads;
    return 8 * units < 7 * rounds * threads;
  };
  while (blocks.width > 16 && is_uneven()) blocks.width = (blocks.width / 2 + 15) / 16 * 16;
}

// The structures hold the tensors of a call, and what the kernels make of them. `forward` fills y and the final state,
// which have the shapes that they say, and what a backward will read; what is not wanted is an empty tensor.

// -- selective scan ----------------------------------------------------------------------------------------------------

#define LINESCAN_SCAN_INPUTS                                                                                          \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "                  \
  "bool delta_softplus, Tensor? initial_state, Tensor? delta_weight, Tensor? route, bool merge"

// Backward: the states of a segment of time are kept, for blocks so narrow that one segment is enough, if possible.
inline void segment(Scan& s) {
  const int64_t cache = 640 << 10, bytes = 4 * (s.N + 8);  // of a channel at a token
  const bool narrow = s.B * s.D < 256 || (s.S * 64 * bytes > cache && s.S * 32 * bytes <= cache);
  s.blocks.width = lesser(narrow ? 32 : 64, s.D / s.G);
  const int64_t fits = cache / (s.blocks.width * bytes);
  s.segment = lesser((fits < 16 ? 16 : fits) / 16 * 16, (s.S + 15) / 16 * 16);
}

template <class Arguments>
struct ScanInputs {
  using Tensor = typename Arguments::Tensor;
  Tensor u, delta, A, B, C, D, z, bias, initial, weight, table;
  Table steps;
  Scan scan;
  std::unique_ptr<float[]> gates;

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

  std::vector<int64_t> output_shape() const { return rows(scan, {scan.D}); }
  std::vector<int64_t> state_shape() const { return {scan.B, scan.K, scan.D, scan.N}; }

  void forward(const Arguments& in, const Tensor& y, const Tensor& final_state, const Tensor& starts = Tensor()) {
    auto& s = scan;
    s.y = output(y, s.merge), s.state = state(final_state), s.starts = state(starts);
    segment(s);
    if (s.y && s.z && !s.z.route && s.K > 1 && !s.merge) open_gates(in);
    const int64_t samples = s.merge ? s.B : s.B * s.K;
    spread(s.blocks, samples, in.threads());
    const int64_t units = samples * s.blocks.count();
    in.parallel(units, grain(units, s.B * s.K * s.S * s.D * (s.N + 4)),
                [&](int64_t begin, int64_t end) { current->scan_forward(s, begin, end); });
  }

 private:
  void open_gates(const Arguments& in) {
    auto& s = scan;
    const int64_t pitch = (s.D + 15) / 16 * 16, units = s.B * s.slabs();
    gates.reset(new float[s.B * s.L * pitch]);
    s.gate = {reinterpret_cast<char*>(gates.get()), Dtype::float32, s.L * pitch, 0, pitch, 0};
    in.parallel(units, grain(units, s.B * s.L * s.D * 16),
                [&](int64_t begin, int64_t end) { current->open_gates(s, begin, end); });
  }
};

// -- causal convolution ------------------------------------------------------------------------------------------------

#define LINESCAN_CONV_INPUTS                                                                                          \
  "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? route, bool merge"

template <class Arguments>
struct ConvInputs {
  using Tensor = typename Arguments::Tensor;
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
    s.blocks.D = s.D, s.slab = s.S;
  }

  // Whether slabs of time write different tokens. Threads then better share time than channels: cores that write parts of
  // the same rows fetch each other's lines of cache.
  bool apart(bool shared) const { return steps.permutes && !(shared && table); }

  std::vector<int64_t> output_shape() const { return rows(conv, {conv.D}); }
  std::vector<int64_t> state_shape() const { return {conv.B, conv.K, conv.D, conv.W - 1}; }

  void forward(const Arguments& in, const Tensor& y, const Tensor& final_state) {
    auto& s = conv;
    s.y = output(y, s.merge), s.state = state(final_state);
    const int64_t samples = s.merge ? s.B : s.B * s.K, parts = 2 * in.threads();
    if (in.threads() > 1 && samples < parts && apart(s.merge)) s.slab = (s.S + parts - 1) / parts;
    spread(s.blocks, samples * s.slabs(), in.threads());
    const int64_t units = samples * s.slabs() * s.blocks.count();
    in.parallel(units, grain(units, s.B * s.K * s.S * s.D * s.W),
                [&](int64_t begin, int64_t end) { current->conv_forward(s, begin, end); });
  }
};

// -- matrix states -----------------------------------------------------------------------------------------------------

#define LINESCAN_MATRIX_INPUTS                                                                                        \
  "int rule, Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? gate, Tensor? beta, Tensor? bonus, "          \
  "Tensor? skip, Tensor? idle, float scale, bool normalize, Tensor? initial_state, Tensor? route, bool merge"

// Backward: so many tokens that the states at their blocks' begins stay in the cache, but as long as the sequence is not so
// long that those at the pieces' begins would need more room.
inline void piece(Matrix& s) {
  const int64_t cache = 512 << 10, block = Matrix::BLOCK, fits = cache / (4 * ((s.N + 15) / 16 * 16) * s.M) * block;
  int64_t length = fits < 4 * block ? 4 * block : lesser(fits, Matrix::ROOM);
  while (length * length < block * s.S) length *= 2;
  const int64_t pieces = (s.S + length - 1) / length;
  s.piece = ((s.S + pieces - 1) / pieces + block - 1) / block * block;
}

template <class Arguments>
struct MatrixInputs {
  using Tensor = typename Arguments::Tensor;
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

  void hand_over(const Tensor& starts, const Tensor& written) {
    piece(matrix);
    matrix.starts = state(starts), matrix.written = view(written);
    std::swap(matrix.written.token, matrix.written.group);  // its heads stand before its tokens
  }

  std::vector<int64_t> output_shape() const { return rows(matrix, {matrix.H, matrix.M}); }
  std::vector<int64_t> state_shape() const { return {matrix.B, matrix.K, matrix.H, matrix.N, matrix.M + int(matrix.normalize)}; }

  void forward(const Arguments& in, const Tensor& y, const Tensor& final_state) {
    auto& s = matrix;
    s.y = output(y, s.merge), s.state = state(final_state);
    // Columns do not depend on each other: they may be shared out until every thread has some.
    Blocks columns;
    columns.D = s.M;
    const int64_t heads = s.B * s.H * (s.merge ? 1 : s.K);
    spread(columns, heads, in.threads());
    s.width = columns.width;
    const int64_t units = heads * s.parts();
    in.parallel(units, grain(units, s.B * s.K * s.H * s.S * s.N * s.M),
                [&](int64_t begin, int64_t end) { current->matrix_forward(s, begin, end); });
  }
};

// -- vector states -----------------------------------------------------------------------------------------------------

#define LINESCAN_VECTOR_INPUTS                                                                                        \
  "int rule, Tensor x, Tensor g, Tensor? w, Tensor? u, Tensor? initial_state, Tensor? route, bool merge"

template <class Arguments>
struct VectorInputs {
  using Tensor = typename Arguments::Tensor;
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

  std::vector<int64_t> output_shape() const { return rows(vectors, {vectors.D}); }
  std::vector<int64_t> state_shape() const {
    if (vectors.rule == VectorRule::gated) return {vectors.B, vectors.K, vectors.D};
    return {vectors.B, vectors.K, vectors.D, vectors.numbers};
  }

  void forward(const Arguments& in, const Tensor& y, const Tensor& final_state) {
    auto& s = vectors;
    s.y = output(y, s.merge), s.state = state(final_state);
    const int64_t samples = s.merge ? s.B : s.B * s.K;
    spread(s.blocks, samples, in.threads());
    s.blocks.width = lesser(s.blocks.width, 192);
    const int64_t units = samples * s.blocks.count();
    in.parallel(units, grain(units, s.B * s.K * s.S * s.D * 8),
                [&](int64_t begin, int64_t end) { current->vector_forward(s, begin, end); });
  }
};

}  // namespace linescan
