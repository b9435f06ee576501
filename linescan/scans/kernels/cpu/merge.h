// What gates the outputs of routes by channel and adds them, for one instruction set. Included inside its namespace; hence
// no include guard. Channels are whole vectors. Rows are reached through pointers, into the tensors where these hold float32,
// else into copies.

template <int STRIDE, int... LANE>
LINESCAN_INLINE V folded(V v, std::integer_sequence<int, LANE...>) {
  return v + shuffle<(LANE ^ STRIDE)...>(v, v);
}
// The sum over the lanes, in all of them.
template <int STRIDE = W / 2>
LINESCAN_INLINE V total_in_lanes(V v) {
  v = folded<STRIDE>(v, std::make_integer_sequence<int, W>());
  if constexpr (STRIDE > 1) return total_in_lanes<STRIDE / 2>(v);
  else return v;
}
LINESCAN_INLINE float total(V v) { return total_in_lanes(v)[0]; }

// Sum of f(channel) over a row, the lanes kept apart.
template <class F>
LINESCAN_INLINE V lanes_over_row(int64_t D, F f) {
  V sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= D; c += 4 * W)
    for (int i = 0; i < 4; ++i) sums[i] += f(c + i * W);
  for (; c < D; c += W) sums[0] += f(c);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
template <class F>
LINESCAN_INLINE float over_row(int64_t D, F f) { return total(lanes_over_row(D, f)); }

// The mean over the tokens of normalised rows of a route of a sample. W tokens at a time, whose sums over the lanes are made
// at once; the sums of so few are added up, that none of the many is lost in a large sum.
static void mean_of_norms(const Merge& s, int64_t b, int64_t k, float* of_y, float* out) {
  const int64_t D = s.D;
  float apart[W * W] = {}, mean[W], scale[W], *y[W];
  int64_t tokens[W];
  zero(out, D);
  for (int64_t t0 = 0; t0 < s.L; t0 += W) {
    const int64_t count = s.L - t0 < W ? s.L - t0 : W;
    as_stored(t0, count, tokens);
    read_rows(s.y, b, k, 0, 0, tokens, count, D, D, of_y, y);
    const auto means = [&](auto f) LINESCAN_STAGE {
      for (int64_t t = 0; t < count; ++t) {
        const float* row = y[t];
        store(apart + t * W, lanes_over_row(D, [&](int64_t c) LINESCAN_STAGE { return f(load(row + c), t); }));
      }
      return lane_sums<W>(apart) * (1.0f / D);
    };
    store(mean, means([](V x, int64_t) LINESCAN_STAGE { return x; }));
    const V squares = means([&](V x, int64_t t) LINESCAN_STAGE { return (x - mean[t]) * (x - mean[t]); });
    store(scale, 1.0f / root(squares + s.eps));
    for (int64_t c = 0; c < D; c += W) {
      V sum = {};
      for (int64_t t = 0; t < count; ++t) sum += (load(y[t] + c) - mean[t]) * scale[t];
      store(out + c, load(out + c) + sum);
    }
  }
  for (int64_t c = 0; c < D; c += W) store(out + c, load(out + c) * (1.0f / s.L) * load(s.weight + c) + load(s.bias + c));
}

// gates = sigmoid(expand gelu(reduce means + bias) + bias), a number for each channel. A unit is a route of a sample.
static void channel_gates(const Merge& s, int64_t begin, int64_t end) {
  const int64_t D = s.D, N = s.hidden, whole = N / W * W;
  Arena arena(Arena::rounded(D) + Arena::rounded(N) + Arena::rounded(W * W) + Arena::rounded(W * D));
  float *means = arena.take(D), *hidden = arena.take(N), *apart = arena.take(W * W), *of_y = arena.take(W * D);
  for (int64_t unit = begin; unit < end; ++unit) {
    mean_of_norms(s, unit / s.K, unit % s.K, of_y, means);
    for (int64_t j = 0; j < N; ++j) {
      const float* row = s.reduce + j * D;
      const float x = over_row(D, [&](int64_t c) LINESCAN_STAGE { return load(means + c) * load(row + c); }) + s.reduce_bias[j];
      hidden[j] = 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    }
    for (int64_t c = 0; c < D; c += W) {
      float rest[W] = {};
      for (int i = 0; i < W; ++i) {
        const float* row = s.expand + (c + i) * N;
        V sum = {};
        for (int64_t j = 0; j < whole; j += W) sum += load(row + j) * load(hidden + j);
        store(apart + i * W, sum);
        for (int64_t j = whole; j < N; ++j) rest[i] += row[j] * hidden[j];
      }
      store(s.gates + unit * D + c, sigmoid(lane_sums<W>(apart) + load(rest) + load(s.expand_bias + c)));
    }
  }
}

// out[b][t] = sum over k of weight[b][k] * y[b][k][t]. A unit is a token.
static void weighted_sum(const Merge& s, int64_t begin, int64_t end) {
  constexpr int64_t T = 16;
  const int64_t D = s.D;
  Arena arena(Arena::rounded(s.K * T * D) + Arena::rounded(T * D));
  float *of_y = arena.take(s.K * T * D), *of_out = arena.take(T * D), *out[T];
  std::vector<float*> rows(s.K * T);
  int64_t tokens[T];
  for (int64_t unit = begin, count; unit < end; unit += count) {
    const int64_t b = unit / s.L, t0 = unit % s.L;
    count = std::min({T, end - unit, s.L - t0});
    as_stored(t0, count, tokens);
    for (int64_t k = 0; k < s.K; ++k) read_rows(s.y, b, k, 0, 0, tokens, count, D, D, of_y + k * T * D, &rows[k * T]);
    const bool left = write_rows({s.out}, b, 0, 0, tokens, count, D, D, of_out, out);
    const float* weight = s.weight + b * s.K * D;
    for (int64_t t = 0; t < count; ++t) {
      packs(D, [&](auto zero, int64_t c) LINESCAN_STAGE {
        using P = decltype(zero);
        P sum = load<P>(rows[t] + c) * load<P>(weight + c);
        for (int64_t k = 1; k < s.K; ++k) sum = sum + load<P>(rows[k * T + t] + c) * load<P>(weight + k * D + c);
        store(out[t] + c, sum);
      });
    }
    if (left) scatter({s.out}, b, 0, 0, tokens, count, D, D, of_out);
  }
}
