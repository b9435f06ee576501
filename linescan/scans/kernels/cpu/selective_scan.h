// The selective scan for one instruction set. Included inside its namespace; hence no include guard.
//
// A unit of work is one sample and one block of channels. It walks through time in chunks of T tokens that stay in the
// first-level cache: rows are gathered along the route as float32, whatever their dtype and order, so that the loops
// below know neither; the states of W channels are vectors in registers, TILE of them at a time.

constexpr int FORWARD_T = 32, BACKWARD_T = 8;
constexpr int TILE = W == 16 ? 16 : 8, REVERSE_TILE = W == 16 ? 8 : 4;  // 32 vector registers, or 16

// Calls f(integral_constant<int, n>, first state) until all N states are covered.
template <int LARGEST, class F>
LINESCAN_INLINE void tiles(int64_t N, F f, int64_t first = 0) {
  for (; N - first >= LARGEST; first += LARGEST) f(std::integral_constant<int, LARGEST>(), first);
  if constexpr (LARGEST > 1) tiles<LARGEST / 2>(N, f, first);
}

// h = exp(delta A) h + x B, y += h C over `count` tokens. A comes times log2(e). `stride` separates tokens of delta, x, y.
template <int TILE_N, bool OUTPUT>
static void advance(int64_t count, int64_t stride, int64_t N, const float* __restrict delta, const float* __restrict x,
                    const float* __restrict A, const float* __restrict B, const float* __restrict C,
                    float* __restrict state, float* __restrict y) {
  V h[TILE_N];
  for (int n = 0; n < TILE_N; ++n) h[n] = load(state + n * W);
  for (int64_t t = 0; t < count; ++t) {
    const V step = load(delta + t * stride), input = load(x + t * stride);
    V sum = V{};
    if (OUTPUT) sum = load(y + t * stride);
#pragma GCC unroll 16
    for (int n = 0; n < TILE_N; ++n) {
      h[n] = exp2(step * load(A + n * W)) * h[n] + input * B[t * N + n];
      if (OUTPUT) sum += h[n] * C[t * N + n];
    }
    if (OUTPUT) store(y + t * stride, sum);
  }
  for (int n = 0; n < TILE_N; ++n) store(state + n * W, h[n]);
}

// As `advance`, keeping every decay and every state (states[0] is the one before the first token) for the way back.
template <int TILE_N, bool OUTPUT>
static void record(int64_t count, int64_t stride, int64_t N, const float* __restrict delta, const float* __restrict x,
                   const float* __restrict A, const float* __restrict B, const float* __restrict C,
                   const float* __restrict state, float* __restrict decays, float* __restrict states,
                   float* __restrict y) {
  V h[TILE_N];
  for (int n = 0; n < TILE_N; ++n) store(states + n * W, h[n] = load(state + n * W));
  for (int64_t t = 0; t < count; ++t) {
    const V step = load(delta + t * stride), input = load(x + t * stride);
    V sum = V{};
    if (OUTPUT) sum = load(y + t * stride);
#pragma GCC unroll 16
    for (int n = 0; n < TILE_N; ++n) {
      const V decay = exp2(step * load(A + n * W));
      h[n] = decay * h[n] + input * B[t * N + n];
      store(decays + (t * N + n) * W, decay);
      store(states + ((t + 1) * N + n) * W, h[n]);
      if (OUTPUT) sum += h[n] * C[t * N + n];
    }
    if (OUTPUT) store(y + t * stride, sum);
  }
}

// Back through `count` tokens. grad: gradient of the state after the last token, then of the one before the first.
// dB and dC keep the lanes apart; ddelta (over ln 2) and dx are added to.
template <int TILE_N>
static void reverse(int64_t count, int64_t stride, int64_t N, const float* __restrict delta, const float* __restrict x,
                    const float* __restrict dy, const float* __restrict A, const float* __restrict B,
                    const float* __restrict C, const float* __restrict decays, const float* __restrict states,
                    float* __restrict grad, float* __restrict dA, float* __restrict dB, float* __restrict dC,
                    float* __restrict ddelta, float* __restrict dx) {
  V g[TILE_N], a[TILE_N];
  for (int n = 0; n < TILE_N; ++n) g[n] = load(grad + n * W), a[n] = load(dA + n * W);
  for (int64_t t = count - 1; t >= 0; --t) {
    const V step = load(delta + t * stride), input = load(x + t * stride), out = load(dy + t * stride);
    V dstep = load(ddelta + t * stride), dinput = load(dx + t * stride);
#pragma GCC unroll 8
    for (int n = 0; n < TILE_N; ++n) {
      const int64_t at = (t * N + n) * W;
      g[n] += out * C[t * N + n];
      store(dC + at, load(dC + at) + out * load(states + at + N * W));
      store(dB + at, load(dB + at) + input * g[n]);
      dinput += g[n] * B[t * N + n];
      g[n] *= load(decays + at);
      const V slope = g[n] * load(states + at);  // gradient of delta A
      a[n] += slope * step;
      dstep += slope * load(A + n * W);
    }
    store(ddelta + t * stride, dstep);
    store(dx + t * stride, dinput);
  }
  for (int n = 0; n < TILE_N; ++n) store(grad + n * W, g[n]), store(dA + n * W, a[n]);
}

// The step sizes of a chunk, from the raw ones (which then hold softplus' slope if asked for), and the inputs delta u.
LINESCAN_INLINE void step_sizes(const Scan& s, int64_t size, int64_t stride, const float* bias, float* delta,
                                const float* u, float* x, float* slope) {
  for (int64_t i = 0; i < size; i += W) {
    V d = load(delta + i);
    if (bias) d += load(bias + i % stride);
    V derivative = splat(1.0f);
    if (s.softplus) d = softplus(d, slope ? &derivative : nullptr);
    store(delta + i, d);
    store(x + i, d * load(u + i));
    if (slope) store(slope + i, derivative);
  }
}

static void scan_forward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = FORWARD_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t rows = T * stride, lanes = stride * N;
  Arena arena(5 * Arena::rounded(rows) + 2 * Arena::rounded(lanes) + 2 * Arena::rounded(T * N) + 2 * Arena::rounded(stride));
  float *u = arena.take(rows), *delta = arena.take(rows), *z = arena.take(rows), *x = arena.take(rows),
        *y = arena.take(rows), *A = arena.take(lanes), *h = arena.take(lanes), *B = arena.take(T * N),
        *C = arena.take(T * N), *bias = arena.take(stride), *skip = arena.take(stride);
  zero(u, 5 * Arena::rounded(rows) + 2 * Arena::rounded(lanes));  // lanes beyond the channels stay zero
  zero(bias, stride), zero(skip, stride);
  int64_t reads[T], writes[T];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t per_sample = s.merge ? blocks : blocks * s.K, b = unit / per_sample, block = unit % blocks;
    const int64_t first_route = s.merge ? 0 : unit % per_sample / blocks, last_route = s.merge ? s.K : first_route + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t vectors = (width + W - 1) / W;
    for (int64_t k = first_route; k < last_route; ++k) {
      to_lanes(s.A.at(b, k) + channel * N, width, N, LOG2E, A);
      if (s.initial) to_lanes(s.initial.at(b, k) + channel * N, width, N, 1.0f, h);
      else zero(h, lanes);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.skip) std::memcpy(skip, s.skip.at(b, k) + channel, width * 4);
      for (int64_t t0 = 0; t0 < s.S; t0 += T) {
        const int64_t count = s.S - t0 < T ? s.S - t0 : T, size = count * stride;
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.u, b, k, 0, channel, reads, count, width, stride, u);
        gather(s.delta, b, k, 0, channel, reads, count, width, stride, delta);
        gather(s.b, b, k, group, 0, reads, count, N, N, B);
        gather(s.c, b, k, group, 0, reads, count, N, N, C);
        step_sizes(s, size, stride, s.bias ? bias : nullptr, delta, u, x, nullptr);
        for (int64_t i = 0; i < size; i += W) store(y + i, load(u + i) * load(skip + i % stride));
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            advance<n(), true>(count, stride, N, delta + v * W, x + v * W, A + at, B + first, C + first, h + at, y + v * W);
          });
        }
        if (s.z) {
          gather(s.z, b, k, 0, channel, reads, count, width, stride, z);
          for (int64_t i = 0; i < size; i += W) {
            const V gate = load(z + i);
            store(y + i, load(y + i) * gate * sigmoid(gate));
          }
        }
        Target target = s.y;
        if (s.merge) target.add |= k > 0;
        scatter(target, b, k, channel, writes, count, width, stride, y);
      }
      from_lanes(h, width, N, s.state.at(b, k) + channel * N);
    }
  }
}

static void scan_backward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = BACKWARD_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t rows = T * stride, lanes = stride * N, chunks = (s.S + T - 1) / T;
  const int64_t taps = (T * N + W - 1) / W * W;  // entries of B in a chunk, as whole vectors
  Arena arena(9 * Arena::rounded(rows) + 4 * Arena::rounded(lanes) + Arena::rounded(chunks * lanes) +
              2 * Arena::rounded(T * N) + 4 * Arena::rounded(stride) + 3 * Arena::rounded(taps * W) +
              Arena::rounded((T + 1) * N * W) + Arena::rounded(taps));
  float *u = arena.take(rows), *delta = arena.take(rows), *z = arena.take(rows), *x = arena.take(rows),
        *y = arena.take(rows), *dy = arena.take(rows), *slope = arena.take(rows), *ddelta = arena.take(rows),
        *dx = arena.take(rows), *A = arena.take(lanes), *h = arena.take(lanes), *g = arena.take(lanes),
        *dA = arena.take(lanes);
  zero(u, 9 * Arena::rounded(rows) + 4 * Arena::rounded(lanes));
  float *bias = arena.take(stride), *skip = arena.take(stride), *dbias = arena.take(stride), *dskip = arena.take(stride);
  zero(bias, 4 * Arena::rounded(stride));
  float *boundaries = arena.take(chunks * lanes), *B = arena.take(T * N), *C = arena.take(T * N),
        *decays = arena.take(taps * W), *states = arena.take((T + 1) * N * W), *dB = arena.take(taps * W),
        *dC = arena.take(taps * W), *sums = arena.take(taps);
  int64_t reads[T], writes[T];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, block = unit % blocks;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t vectors = (width + W - 1) / W;
    for (int64_t k = 0; k < s.K; ++k) {
      to_lanes(s.A.at(b, k) + channel * N, width, N, LOG2E, A);
      if (s.initial) to_lanes(s.initial.at(b, k) + channel * N, width, N, 1.0f, h);
      else zero(h, lanes);
      if (s.dstate) to_lanes(s.dstate.at(b, k) + channel * N, width, N, 1.0f, g);
      else zero(g, lanes);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.skip) std::memcpy(skip, s.skip.at(b, k) + channel, width * 4);
      zero(dA, lanes), zero(dbias, stride), zero(dskip, stride);

      for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // forward, keeping the state before every chunk
        std::memcpy(boundaries + chunk * lanes, h, lanes * 4);
        if (chunk == chunks - 1) break;
        s.route.steps(b, k, chunk * T, T, reads, writes);
        gather(s.u, b, k, 0, channel, reads, T, width, stride, u);
        gather(s.delta, b, k, 0, channel, reads, T, width, stride, delta);
        gather(s.b, b, k, group, 0, reads, T, N, N, B);
        step_sizes(s, T * stride, stride, s.bias ? bias : nullptr, delta, u, x, nullptr);
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            advance<n(), false>(T, stride, N, delta + v * W, x + v * W, A + at, B + first, nullptr, h + at, nullptr);
          });
        }
      }

      float* partial = s.partial_bc + ((b * s.K + k) * blocks + block) * 2 * s.S * N;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * T, count = s.S - t0 < T ? s.S - t0 : T, size = count * stride;
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.u, b, k, 0, channel, reads, count, width, stride, u);
        gather(s.delta, b, k, 0, channel, reads, count, width, stride, delta);
        gather(s.b, b, k, group, 0, reads, count, N, N, B);
        gather(s.c, b, k, group, 0, reads, count, N, N, C);
        gather(s.dy, b, k, 0, channel, writes, count, width, stride, dy);
        if (s.z) gather(s.z, b, k, 0, channel, reads, count, width, stride, z);
        step_sizes(s, size, stride, s.bias ? bias : nullptr, delta, u, x, slope);
        zero(ddelta, size), zero(dx, size), zero(dB, taps * W), zero(dC, taps * W);
        for (int64_t v = 0; v < vectors; ++v) {
          const float* boundary = boundaries + chunk * lanes + v * N * W;
          const int64_t column = v * W;
          if (s.z) {
            for (int64_t i = column; i < size; i += stride) store(y + i, load(u + i) * load(skip + column));
          }
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W, here = first * W;
            const auto keep = s.z ? record<n(), true> : record<n(), false>;
            keep(count, stride, N, delta + column, x + column, A + at, B + first, C + first, boundary + here,
                 decays + here, states + here, y + column);
          });
          if (s.z) {
            for (int64_t i = column; i < size; i += stride) {
              const V gate = load(z + i), open = sigmoid(gate), out = load(dy + i);
              store(z + i, out * load(y + i) * open * (1.0f + gate * (1.0f - open)));
              store(dy + i, out * gate * open);
            }
          }
          tiles<REVERSE_TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W, here = first * W;
            reverse<n()>(count, stride, N, delta + column, x + column, dy + column, A + at, B + first, C + first,
                         decays + here, states + here, g + at, dA + at, dB + here, dC + here, ddelta + column,
                         dx + column);
          });
          V sum_bias = load(dbias + column), sum_skip = load(dskip + column);
          for (int64_t i = column; i < size; i += stride) {
            const V in = load(u + i), out = load(dy + i), inner = load(dx + i);
            const V raw = (load(ddelta + i) * LN2 + inner * in) * load(slope + i);
            store(ddelta + i, raw);
            store(dx + i, inner * load(delta + i) + out * load(skip + column));
            sum_bias += raw;
            sum_skip += out * in;
          }
          store(dbias + column, sum_bias), store(dskip + column, sum_skip);
        }
        scatter(s.du, b, k, channel, reads, count, width, stride, dx);
        scatter(s.ddelta, b, k, channel, reads, count, width, stride, ddelta);
        if (s.dz) scatter(s.dz, b, k, channel, reads, count, width, stride, z);
        for (int side = 0; side < 2; ++side) {
          const float* apart = side ? dC : dB;
          for (int64_t i = 0; i < taps; i += W) store(sums + i, lane_sums<W>(apart + i * W));
          std::memcpy(partial + (side * s.S + t0) * N, sums, count * N * 4);
        }
      }
      from_lanes(dA, width, N, s.partial_A + ((b * s.K + k) * s.D + channel) * N);
      float* of_channel = s.partial_channel + (b * s.K + k) * 2 * s.D + channel;
      std::memcpy(of_channel, dskip, width * 4);
      std::memcpy(of_channel + s.D, dbias, width * 4);
      if (s.dinitial) from_lanes(g, width, N, s.dinitial.at(b, k) + channel * N);
    }
  }
}
