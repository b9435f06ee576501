// The selective scan for one instruction set. Included inside its namespace; hence no include guard.
//
// A unit of work is one sample and one block of channels. It walks through time in chunks that stay in the cache: rows
// are gathered along the route as float32, whatever their dtype and order, so that the loops below know neither; the
// states of W channels are vectors in registers, TILE of them at a time.

constexpr int FORWARD_T = 32, REVERSE_T = 16;
constexpr int TILE = W == 16 ? 16 : 8, REVERSE_TILE = W == 16 ? 8 : 4;  // 32 vector registers, or 16

// Calls f(integral_constant<int, n>, first state) until all N states are covered.
template <int LARGEST, class F>
LINESCAN_INLINE void tiles(int64_t N, F f, int64_t first = 0) {
  for (; N - first >= LARGEST; first += LARGEST) f(std::integral_constant<int, LARGEST>(), first);
  if constexpr (LARGEST > 1) tiles<LARGEST / 2>(N, f, first);
}

// h = exp(delta A) h + x B, y += h C over `count` tokens; A comes times log2(e). `stride` separates tokens of delta, x, y.
// KEEP: every state is kept, from the one before the first token on.
template <int TILE_N, bool OUTPUT, bool KEEP>
LINESCAN_INLINE void steps(int64_t count, int64_t stride, int64_t N, const float* __restrict delta,
                                              const float* __restrict x, const float* __restrict A,
                                              const float* __restrict B, const float* __restrict C,
                                              float* __restrict state, float* __restrict y, float* __restrict kept) {
  V h[TILE_N];
  for (int n = 0; n < TILE_N; ++n) h[n] = load(state + n * W);
  for (int64_t t = 0; t < count; ++t) {
    const V step = load(delta + t * stride), input = load(x + t * stride);
    V sum = V{};
    if (OUTPUT) sum = load(y + t * stride);
#pragma GCC unroll 16
    for (int n = 0; n < TILE_N; ++n) {
      if (KEEP) store(kept + (t * N + n) * W, h[n]);
      h[n] = exp2(step * load(A + n * W)) * h[n] + input * B[t * N + n];
      if (OUTPUT) sum += h[n] * C[t * N + n];
    }
    if (OUTPUT) store(y + t * stride, sum);
  }
  for (int n = 0; n < TILE_N; ++n) {
    store(state + n * W, h[n]);
    if (KEEP) store(kept + (count * N + n) * W, h[n]);
  }
}

// The two uses, never inlined: `restrict` would be lost. Every state is a chain of some 14 dependent instructions, and a
// processor looks ahead over a few of them only; GCC interleaves them when told to, which gains a tenth here, while the
// stores of the other use are in its way.
#if defined(__GNUC__) && !defined(__clang__)
#define LINESCAN_INTERLEAVED optimize("schedule-insns", "sched-pressure")
#else
#define LINESCAN_INTERLEAVED
#endif

template <int TILE_N>
__attribute__((noinline, LINESCAN_INTERLEAVED)) static void advance(
    int64_t count, int64_t stride, int64_t N, const float* __restrict delta, const float* __restrict x,
    const float* __restrict A, const float* __restrict B, const float* __restrict C, float* __restrict state,
    float* __restrict y) {
  steps<TILE_N, true, false>(count, stride, N, delta, x, A, B, C, state, y, nullptr);
}

template <int TILE_N, bool OUTPUT, bool KEEP>
__attribute__((noinline)) static void replay(int64_t count, int64_t stride, int64_t N, const float* __restrict delta,
                                             const float* __restrict x, const float* __restrict A,
                                             const float* __restrict B, const float* __restrict C,
                                             float* __restrict state, float* __restrict y, float* __restrict kept) {
  steps<TILE_N, OUTPUT, KEEP>(count, stride, N, delta, x, A, B, C, state, y, kept);
}

// Back through `count` tokens, from states[0], the one before the first token, to states[count].
// grad: gradient of the state after the last token, then of the one before the first. ddelta (over ln 2) and dx are added
// to; so are dB and dC, which keep the lanes apart, but for the FIRST channels.
template <int TILE_N, bool FIRST>
__attribute__((noinline)) static void reverse(int64_t count, int64_t stride, int64_t N, const float* __restrict delta,
                                              const float* __restrict x, const float* __restrict dy,
                                              const float* __restrict A, const float* __restrict B,
                                              const float* __restrict C, const float* __restrict states,
                                              float* __restrict grad, float* __restrict dA, float* __restrict dB,
                                              float* __restrict dC, float* __restrict ddelta, float* __restrict dx) {
  V g[TILE_N], a[TILE_N];
  for (int n = 0; n < TILE_N; ++n) g[n] = load(grad + n * W), a[n] = load(dA + n * W);
  for (int64_t t = count - 1; t >= 0; --t) {
    const V step = load(delta + t * stride), input = load(x + t * stride), out = load(dy + t * stride);
    V dstep = load(ddelta + t * stride), dinput = load(dx + t * stride);
#pragma GCC unroll 8
    for (int n = 0; n < TILE_N; ++n) {
      const int64_t at = (t * N + n) * W;
      const V rate = load(A + n * W);
      g[n] += out * C[t * N + n];
      const V of_C = out * load(states + at + N * W), of_B = input * g[n];
      store(dC + at, FIRST ? of_C : load(dC + at) + of_C);
      store(dB + at, FIRST ? of_B : load(dB + at) + of_B);
      dinput += g[n] * B[t * N + n];
      g[n] *= exp2(step * rate);
      const V slope = g[n] * load(states + at);  // gradient of delta A
      a[n] += slope * step;
      dstep += slope * rate;
    }
    store(ddelta + t * stride, dstep);
    store(dx + t * stride, dinput);
  }
  for (int n = 0; n < TILE_N; ++n) store(grad + n * W, g[n]), store(dA + n * W, a[n]);
}

// Makes step sizes of the raw ones, inputs x = delta u, and outputs that begin as D u; also softplus' slope if asked for.
// x may be u.
template <bool SOFTPLUS, bool SLOPE>
__attribute__((noinline)) static void prepare(int64_t count, int64_t stride, const float* __restrict bias,
                                              const float* __restrict skip, float* __restrict delta, const float* u,
                                              float* x, float* __restrict y, float* __restrict slope) {
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t c = 0; c < stride; c += W) {
      const int64_t i = t * stride + c;
      V step = load(delta + i) + load(bias + c), derivative = splat(1.0f);
      if (SOFTPLUS) step = softplus(step, SLOPE ? &derivative : nullptr);
      const V input = load(u + i);
      store(delta + i, step);
      store(y + i, input * load(skip + c));
      store(x + i, input * step);
      if (SLOPE) store(slope + i, derivative);
    }
  }
}

// y *= z sigmoid(z)
__attribute__((noinline)) static void gate_outputs(int64_t size, const float* __restrict z, float* __restrict y) {
  for (int64_t i = 0; i < size; i += W) {
    const V gate = load(z + i);
    store(y + i, load(y + i) * gate * sigmoid(gate));
  }
}

// The same backwards: from the gradient dy of the gated outputs to that of y; z becomes its own gradient.
__attribute__((noinline)) static void ungate(int64_t size, const float* __restrict y, float* __restrict z,
                                             float* __restrict dy) {
  for (int64_t i = 0; i < size; i += W) {
    const V gate = load(z + i), open = sigmoid(gate), out = load(dy + i);
    store(z + i, out * load(y + i) * open * (1.0f + gate * (1.0f - open)));
    store(dy + i, out * gate * open);
  }
}

// From the gradients of delta A (over A) and of x = delta u to those of the raw step sizes and of u, in place; adds to
// the gradients of the parameters of the channels.
__attribute__((noinline)) static void conclude(int64_t count, int64_t stride, const float* __restrict u,
                                               const float* __restrict delta, const float* __restrict slope,
                                               const float* __restrict skip, const float* __restrict dy,
                                               float* __restrict ddelta, float* __restrict dx, float* __restrict dbias,
                                               float* __restrict dskip) {
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t c = 0; c < stride; c += W) {
      const int64_t i = t * stride + c;
      const V in = load(u + i), out = load(dy + i), inner = load(dx + i);
      const V raw = (load(ddelta + i) * LN2 + inner * in) * load(slope + i);
      store(ddelta + i, raw);
      store(dx + i, inner * load(delta + i) + out * load(skip + c));
      store(dbias + c, load(dbias + c) + raw);
      store(dskip + c, load(dskip + c) + out * in);
    }
  }
}

static void scan_forward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = FORWARD_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t rows = T * stride, lanes = stride * N;
  const auto prepare_forward = s.softplus ? prepare<true, false> : prepare<false, false>;
  Arena arena(4 * Arena::rounded(rows) + 2 * Arena::rounded(lanes) + 2 * Arena::rounded(T * N) + 2 * Arena::rounded(stride));
  float *u = arena.take(rows), *delta = arena.take(rows), *y = arena.take(rows), *z = arena.take(rows),
        *A = arena.take(lanes), *h = arena.take(lanes), *B = arena.take(T * N), *C = arena.take(T * N),
        *bias = arena.take(stride), *skip = arena.take(stride);
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
        const int64_t count = s.S - t0 < T ? s.S - t0 : T;
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.u, b, k, 0, channel, reads, count, width, stride, u);
        gather(s.delta, b, k, 0, channel, reads, count, width, stride, delta);
        gather(s.b, b, k, group, 0, reads, count, N, N, B);
        gather(s.c, b, k, group, 0, reads, count, N, N, C);
        prepare_forward(count, stride, bias, skip, delta, u, u, y, nullptr);
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            advance<n()>(count, stride, N, delta + v * W, u + v * W, A + at, B + first, C + first, h + at, y + v * W);
          });
        }
        if (s.z) {
          gather(s.z, b, k, 0, channel, reads, count, width, stride, z);
          gate_outputs(count * stride, z, y);
        }
        Target target = s.y;
        if (s.merge) target.add |= k > 0;
        scatter(target, b, k, channel, writes, count, width, stride, y);
      }
      from_lanes(h, width, N, s.state.at(b, k) + channel * N);
    }
  }
}

// The backward needs every state, last one first. It computes them a segment of time at a time, as many tokens as keep
// the second-level cache; where there are several segments, a first pass through time leaves the states they start in.
static void scan_backward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = REVERSE_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t length = s.segment, segments = (s.S + length - 1) / length, rows = length * stride, lanes = stride * N;
  const int64_t taps = (T * N + W - 1) / W * W;  // entries of B in T tokens, as whole vectors
  const auto prepare_forward = s.softplus ? prepare<true, false> : prepare<false, false>;
  const auto prepare_backward = s.softplus ? prepare<true, true> : prepare<false, true>;
  Arena arena(9 * Arena::rounded(rows) + 4 * Arena::rounded(lanes) + Arena::rounded(segments * lanes) +
              2 * Arena::rounded(length * N) + 4 * Arena::rounded(stride) + 2 * Arena::rounded(taps * W) +
              Arena::rounded((length + 1) * lanes) + Arena::rounded(taps) + 2 * Arena::rounded(2 * length));
  float *u = arena.take(rows), *delta = arena.take(rows), *z = arena.take(rows), *x = arena.take(rows),
        *y = arena.take(rows), *dy = arena.take(rows), *slope = arena.take(rows), *ddelta = arena.take(rows),
        *dx = arena.take(rows);
  float *A = arena.take(lanes), *h = arena.take(lanes), *g = arena.take(lanes), *dA = arena.take(lanes);
  float *bias = arena.take(stride), *skip = arena.take(stride), *dbias = arena.take(stride), *dskip = arena.take(stride);
  float *starts = arena.take(segments * lanes), *states = arena.take((length + 1) * lanes);
  float *B = arena.take(length * N), *C = arena.take(length * N), *sums = arena.take(taps);
  float *dB = arena.take(taps * W), *dC = arena.take(taps * W);
  zero(dB, taps * W), zero(dC, taps * W);
  int64_t* reads = reinterpret_cast<int64_t*>(arena.take(2 * length));
  int64_t* writes = reinterpret_cast<int64_t*>(arena.take(2 * length));

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, block = unit % blocks;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t vectors = (width + W - 1) / W;
    zero(bias, stride), zero(skip, stride);
    for (int64_t k = 0; k < s.K; ++k) {
      to_lanes(s.A.at(b, k) + channel * N, width, N, LOG2E, A);
      if (s.initial) to_lanes(s.initial.at(b, k) + channel * N, width, N, 1.0f, h);
      else zero(h, lanes);
      if (s.dstate) to_lanes(s.dstate.at(b, k) + channel * N, width, N, 1.0f, g);
      else zero(g, lanes);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.skip) std::memcpy(skip, s.skip.at(b, k) + channel, width * 4);
      zero(dA, lanes), zero(dbias, stride), zero(dskip, stride);

      const auto fetch = [&](int64_t t0, int64_t count) {
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.u, b, k, 0, channel, reads, count, width, stride, u);
        gather(s.delta, b, k, 0, channel, reads, count, width, stride, delta);
        gather(s.b, b, k, group, 0, reads, count, N, N, B);
      };
      for (int64_t segment = 0; segment < segments; ++segment) {
        std::memcpy(starts + segment * lanes, h, lanes * 4);
        if (segment == segments - 1) break;
        for (int64_t t = 0; t < length; t += T) {
          fetch(segment * length + t, T);
          prepare_forward(T, stride, bias, skip, delta, u, x, y, nullptr);
          for (int64_t v = 0; v < vectors; ++v) {
            tiles<TILE>(N, [&](auto n, int64_t first) {
              const int64_t at = (v * N + first) * W;
              replay<n(), false, false>(T, stride, N, delta + v * W, x + v * W, A + at, B + first, nullptr, h + at,
                                        nullptr, nullptr);
            });
          }
        }
      }

      float* partial = s.partial_bc + ((b * s.K + k) * blocks + block) * 2 * s.S * N;
      for (int64_t segment = segments - 1; segment >= 0; --segment) {
        const int64_t t0 = segment * length, count = s.S - t0 < length ? s.S - t0 : length;
        fetch(t0, count);
        gather(s.c, b, k, group, 0, reads, count, N, N, C);
        gather(s.dy, b, k, 0, channel, writes, count, width, stride, dy);
        prepare_backward(count, stride, bias, skip, delta, u, x, y, slope);
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            const auto keep = s.z ? replay<n(), true, true> : replay<n(), false, true>;
            keep(count, stride, N, delta + v * W, x + v * W, A + at, B + first, C + first,
                 starts + segment * lanes + at, y + v * W, states + v * (length + 1) * N * W + first * W);
          });
        }
        if (s.z) {
          gather(s.z, b, k, 0, channel, reads, count, width, stride, z);
          ungate(count * stride, y, z, dy);
          scatter(s.dz, b, k, channel, reads, count, width, stride, z);
        }
        zero(ddelta, count * stride), zero(dx, count * stride);
        for (int64_t t = (count - 1) / T * T; t >= 0; t -= T) {
          const int64_t few = count - t < T ? count - t : T;
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t row = t * stride + v * W;
            tiles<REVERSE_TILE>(N, [&](auto n, int64_t first) {
              const int64_t at = (v * N + first) * W, here = first * W, tap = t * N + first;
              const auto back = v == 0 ? reverse<n(), true> : reverse<n(), false>;
              back(few, stride, N, delta + row, x + row, dy + row, A + at, B + tap, C + tap,
                   states + (v * (length + 1) + t) * N * W + here, g + at, dA + at, dB + here, dC + here, ddelta + row,
                   dx + row);
            });
          }
          for (int side = 0; side < 2; ++side) {
            const float* apart = side ? dC : dB;
            for (int64_t i = 0; i < taps; i += W) store(sums + i, lane_sums<W>(apart + i * W));
            std::memcpy(partial + (side * s.S + t0 + t) * N, sums, few * N * 4);
          }
        }
        conclude(count, stride, u, delta, slope, skip, dy, ddelta, dx, dbias, dskip);
        scatter(s.du, b, k, channel, reads, count, width, stride, dx);
        scatter(s.ddelta, b, k, channel, reads, count, width, stride, ddelta);
      }
      from_lanes(dA, width, N, s.partial_A + ((b * s.K + k) * s.D + channel) * N);
      float* of_channel = s.partial_channel + (b * s.K + k) * 2 * s.D + channel;
      std::memcpy(of_channel, dskip, width * 4);
      std::memcpy(of_channel + s.D, dbias, width * 4);
      if (s.dinitial) from_lanes(g, width, N, s.dinitial.at(b, k) + channel * N);
    }
  }
}
