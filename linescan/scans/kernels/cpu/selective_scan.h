// The selective scan for one instruction set. Included inside its namespace; hence no include guard.
//
// A unit of work is one sample and one block of channels. It walks through time in chunks that stay in the cache. The
// loops below reach the rows of a chunk through pointers, into the tensors where these hold float32, else into copies
// gathered along the route, so that they know neither dtype nor order. The states of W channels are vectors in registers,
// TILE of them at a time.

constexpr int FORWARD_T = 64, REVERSE_T = 8;  // tokens in a chunk
constexpr int TILE = W == 16 ? 16 : 8, REVERSE_TILE = 8;  // for 32 vector registers, or 16

// Calls f(integral_constant<int, n>, first state) until all N states are covered.
template <int LARGEST, class F>
LINESCAN_INLINE void tiles(int64_t N, F f, int64_t first = 0) {
  for (; N - first >= LARGEST; first += LARGEST) f(std::integral_constant<int, LARGEST>(), first);
  if constexpr (LARGEST > 1) tiles<LARGEST / 2>(N, f, first);
}

// h = exp(delta A) h + delta u B, y = skip u + h C over `count` tokens; A comes times log2(e). Token rows are pointers,
// of which the vector at `channel` and the states from `begin` on are meant. Tiles of states after the FIRST add to y.
// KEEP: every state is kept, from the one before the first token on. Never inlined: `restrict` would be lost.
template <int TILE_N, bool FIRST, bool OUTPUT, bool KEEP>
LINESCAN_IN_ORDER static void advance(int64_t count, int64_t channel, int64_t N, int64_t begin, float* const* delta,
                                      float* const* u, const float* __restrict skip, const float* __restrict A,
                                      float* const* B, float* const* C, float* __restrict state, float* const* y,
                                      float* __restrict kept) {
  V h[TILE_N];
  staggered<TILE_N>([&](int n) LINESCAN_STAGE { h[n] = load(state + n * W); });
  for (int64_t t = 0; t < count; ++t) {
    const V step = load(delta[t] + channel), in = load(u[t] + channel), input = step * in;
    const float *into = B[t] + begin, *from = OUTPUT ? C[t] + begin : nullptr;
    fetch_ahead(delta, t, count, channel), fetch_ahead(u, t, count, channel);
    if (OUTPUT) fetch_ahead(y, t, count, channel);
    V sums[2] = {};
    if (OUTPUT) sums[0] = FIRST ? in * load(skip + channel) : load(y[t] + channel);
    Power decay[TILE_N];
    reload(A);
    staggered<TILE_N>(
        [&](int n) LINESCAN_STAGE {
          if (KEEP) store(kept + (t * N + n) * W, h[n]);
          decay[n].start(step * load(A + n * W));
        },
        [&](int n) LINESCAN_STAGE { decay[n].round(); },
        [&](int n) LINESCAN_STAGE { decay[n].split(); },
        [&](int n) LINESCAN_STAGE {
          decay[n].times(h[n]);
          V more = input * into[n];
          pin(more);
          h[n] = decay[n].plus(more);
          pin(h[n]);
        },
        [&](int n) LINESCAN_STAGE {
          if (OUTPUT) sums[n % 2] += h[n] * from[n];
        });
    if (OUTPUT) store(y[t] + channel, sums[0] + sums[1]);
  }
  staggered<TILE_N>([&](int n) LINESCAN_STAGE {
    store(state + n * W, h[n]);
    if (KEEP) store(kept + (count * N + n) * W, h[n]);
  });
}

// Back through `count` tokens, from states[0], the one before the first token, to states[count].
// grad: gradient of the state after the last token, then of the one before the first. ddelta (of delta A, over ln 2) and
// dx (of x = delta u) are rows one after the other; tiles of states after the FIRST add to them, channels after the
// first vector to dB and dC, which keep the lanes apart.
template <int TILE_N, bool FIRST, bool FIRST_VECTOR>
LINESCAN_IN_ORDER static void reverse(int64_t count, int64_t channel, int64_t stride, int64_t N, int64_t begin,
                                      float* const* delta, float* const* u, float* const* dy, const float* __restrict A,
                                      float* const* B, float* const* C, const float* __restrict states,
                                      float* __restrict grad, float* __restrict dA, float* __restrict dB,
                                      float* __restrict dC, float* __restrict ddelta, float* __restrict dx) {
  V g[TILE_N], sum_A[TILE_N];
  staggered<TILE_N>([&](int n) LINESCAN_STAGE {
    g[n] = load(grad + n * W);
    sum_A[n] = load(dA + n * W);
  });
  for (int64_t t = count - 1; t >= 0; --t) {
    const V step = load(delta[t] + channel), input = step * load(u[t] + channel), out = load(dy[t] + channel);
    const float *into = B[t] + begin, *from = C[t] + begin, *before = states + t * N * W;
    float *of_B = dB + t * N * W, *of_C = dC + t * N * W;
    V dstep = V{}, dinput = V{};
    if (!FIRST) dstep = load(ddelta + t * stride), dinput = load(dx + t * stride);
    Power decay[TILE_N];
    reload(A);
    staggered<TILE_N>(
        [&](int n) LINESCAN_STAGE {
          decay[n].start(step * load(A + n * W));
          const V after = load(before + (N + n) * W);
          store(of_C + n * W, FIRST_VECTOR ? out * after : load(of_C + n * W) + out * after);
        },
        [&](int n) LINESCAN_STAGE {
          decay[n].round();
          g[n] += out * from[n];
          pin(g[n]);
        },
        [&](int n) LINESCAN_STAGE {
          decay[n].split();
          store(of_B + n * W, FIRST_VECTOR ? input * g[n] : load(of_B + n * W) + input * g[n]);
          dinput += g[n] * into[n];
        },
        [&](int n) LINESCAN_STAGE {
          decay[n].times(g[n]);
          g[n] = decay[n].product();
          pin(g[n]);
        },
        [&](int n) LINESCAN_STAGE {
          const V slope = g[n] * load(before + n * W);  // gradient of delta A
          sum_A[n] += slope * step;
          dstep += slope * load(A + n * W);
        });
    store(ddelta + t * stride, dstep);
    store(dx + t * stride, dinput);
  }
  staggered<TILE_N>([&](int n) LINESCAN_STAGE {
    store(grad + n * W, g[n]);
    store(dA + n * W, sum_A[n]);
  });
}

// Step sizes of the raw ones, and softplus' slope if asked for.
template <bool SOFTPLUS, bool SLOPE>
__attribute__((noinline)) static void step_sizes(int64_t count, int64_t stride, const float* __restrict bias,
                                                 float* const* delta, float* __restrict step,
                                                 float* __restrict slope) {
  for (int64_t t = 0; t < count; ++t) {
    packs(stride, [&](auto derivative, int64_t c) LINESCAN_STAGE {
      using T = decltype(derivative);
      fetch_ahead(delta, t, count, c, sizeof(T));
      T size = load<T>(delta[t] + c) + load<T>(bias + c);
      if (SOFTPLUS) size = softplus(size, SLOPE ? &derivative : nullptr);
      store(step + t * stride + c, size);
      if (SLOPE) store(slope + t * stride + c, derivative);
    });
  }
}

// The same of low rank: a step size is the product of a row of `weight` and the token's `rank` numbers. Four tokens at a
// time share the loads of weights; past the last one there is room.
template <bool SOFTPLUS>
__attribute__((noinline)) static void project_steps(int64_t count, int64_t stride, int64_t rank,
                                                    const float* __restrict bias, const float* __restrict low,
                                                    const float* __restrict weight, float* __restrict step) {
  for (int64_t c = 0; c < stride; c += W) {
    for (int64_t t = 0; t < count; t += 4) {
      Pack<4> sums = {{load(bias + c), load(bias + c), load(bias + c), load(bias + c)}};
      for (int64_t r = 0; r < rank; ++r) {
        const V row = load(weight + c * rank + r * W);
        for (int i = 0; i < 4; ++i) sums.of[i] += row * low[(t + i) * rank + r];
      }
      if (SOFTPLUS) sums = softplus(sums);
      for (int i = 0; i < 4; ++i) store(step + (t + i) * stride + c, sums.of[i]);
    }
  }
}

// y = silu(z), and y *= silu(z) if there is something IN it; z itself where it is OPEN, silu(z) already.
template <bool OPEN, bool IN>
__attribute__((noinline)) static void gate_rows(int64_t count, int64_t stride, float* const* z, float* const* y) {
  for (int64_t t = 0; t < count; ++t) {
    packs(stride, [&](auto zero, int64_t c) LINESCAN_STAGE {
      using T = decltype(zero);
      fetch_ahead(z, t, count, c, sizeof(T));
      T gate = load<T>(z[t] + c);
      if constexpr (!OPEN) gate = gate * sigmoid(gate);
      if constexpr (IN) gate = load<T>(y[t] + c) * gate;
      store(y[t] + c, gate);
    });
  }
}

// Back through the gate: from the gradient `out` of the gated outputs to that of y and of z.
__attribute__((noinline)) static void ungate(int64_t count, int64_t stride, float* const* y, float* const* z,
                                             float* const* out, float* __restrict dy, float* const* dz) {
  for (int64_t t = 0; t < count; ++t) {
    packs(stride, [&](auto zero, int64_t c) LINESCAN_STAGE {
      using T = decltype(zero);
      for (float* const* rows : {z, out, dz}) fetch_ahead(rows, t, count, c, sizeof(T));
      const T gate = load<T>(z[t] + c), open = sigmoid(gate), grad = load<T>(out[t] + c);
      store(dz[t] + c, grad * load<T>(y[t] + c) * open * (1.0f + gate * (1.0f - open)));
      store(dy + t * stride + c, grad * gate * open);
    });
  }
}

// From the gradients of delta A (over A and ln 2) and of x = delta u to those of the raw step sizes and of u; adds to
// the gradients of the parameters of the channels.
__attribute__((noinline)) static void conclude(int64_t count, int64_t stride, float* const* u, float* const* delta,
                                               const float* __restrict slope, const float* __restrict skip,
                                               float* const* dy, const float* __restrict of_exponent,
                                               const float* __restrict of_x, float* const* ddelta, float* const* du,
                                               float* __restrict dbias, float* __restrict dskip) {
  for (int64_t c = 0; c < stride; c += W) {
    const V weight = load(skip + c);
    V of_bias = load(dbias + c), of_skip = load(dskip + c);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t i = t * stride + c;
      const V in = load(u[t] + c), out = load(dy[t] + c), inner = load(of_x + i);
      V raw = load(of_exponent + i) * LN2 + inner * in;
      if (slope) raw *= load(slope + i);
      store(du[t] + c, inner * load(delta[t] + c) + out * weight);
      store(ddelta[t] + c, raw);
      of_bias += raw;
      of_skip += out * in;
    }
    store(dbias + c, of_bias), store(dskip + c, of_skip);
  }
}

// s.gate = silu(z). A unit is a slab of a sample's tokens.
static void open_gates(const Scan& s, int64_t begin, int64_t end) {
  constexpr int64_t T = Scan::SLAB;
  const int64_t stride = (s.D + W - 1) / W * W;
  Arena arena(Arena::rounded(T * stride));
  float *of_z = arena.take(T * stride), *z[T], *gate[T];
  int64_t tokens[T];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / s.slabs(), t0 = unit % s.slabs() * T, count = s.L - t0 < T ? s.L - t0 : T;
    as_stored(t0, count, tokens);
    read_rows(s.z, b, 0, 0, 0, tokens, count, s.D, stride, of_z, z);
    point(reinterpret_cast<float*>(s.gate.at(b, 0, 0, 0)), s.gate.token, tokens, count, nullptr, gate);
    gate_rows<false, false>(count, stride, z, gate);
  }
}

static void scan_forward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = FORWARD_T;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t area = T * widest, lanes = widest * N;
  // Without outputs it only leaves the states that segments start from.
  const int64_t length = s.starts ? s.segment : s.S, end_of_time = s.y ? s.S : (s.S - 1) / length * length;
  const bool make_steps = s.softplus || s.bias || s.rank;
  const bool gate = s.y && s.z, gate_sum = gate && s.merge && !s.z.route;  // what is common to all routes gates their sum
  const auto multiply = s.gate ? gate_rows<true, true> : gate_rows<false, true>;
  const auto make = s.softplus ? step_sizes<true, false> : step_sizes<false, false>;
  const auto project = s.softplus ? project_steps<true> : project_steps<false>;
  Arena arena(5 * Arena::rounded(area) + 2 * Arena::rounded(lanes) + 2 * Arena::rounded(T * N) +
              2 * Arena::rounded(widest) + Arena::rounded(T * s.rank) + Arena::rounded(widest * s.rank));
  float *of_u = arena.take(area), *of_delta = arena.take(area), *of_z = arena.take(area), *of_y = arena.take(area),
        *of_step = arena.take(area), *A = arena.take(lanes), *h = arena.take(lanes), *of_B = arena.take(T * N),
        *of_C = arena.take(T * N), *bias = arena.take(widest), *skip = arena.take(widest), *low = arena.take(T * s.rank),
        *weight = arena.take(widest * s.rank);
  zero(bias, widest), zero(skip, widest), zero(low, T * s.rank);
  int64_t reads[T], writes[T];
  float *u[T], *delta[T], *step[T], *z[T], *y[T], *B[T], *C[T];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t per_sample = s.merge ? blocks : blocks * s.K, b = unit / per_sample, block = unit % blocks;
    const int64_t first_route = s.merge ? 0 : unit % per_sample / blocks, last_route = s.merge ? s.K : first_route + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t vectors = (width + W - 1) / W, stride = vectors * W;
    for (int64_t k = first_route; k < last_route; ++k) {
      to_lanes(s.A.at(b, k) + channel * N, width, N, LOG2E, A);
      if (s.initial) to_lanes(s.initial.at(b, k) + channel * N, width, N, 1.0f, h);
      else zero(h, stride * N);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.skip) std::memcpy(skip, s.skip.at(b, k) + channel, width * 4);
      if (s.rank) to_lanes(s.weight.at(b, k) + channel * s.rank, width, s.rank, 1.0f, weight);
      const Target target = s.y.of_route(k);
      if (s.y && !target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = 0, count; t0 < end_of_time; t0 += count) {
        const int64_t segment = t0 / length, stop = (segment + 1) * length < s.S ? (segment + 1) * length : s.S;
        count = stop - t0 < T ? stop - t0 : T;
        s.route.steps(b, k, t0, count, reads, writes);
        read_rows(s.u, b, k, 0, channel, reads, count, width, stride, of_u, u);
        read_rows<1>(s.b, b, k, group, 0, reads, count, N, N, of_B, B);
        read_rows<1>(s.c, b, k, group, 0, reads, count, N, N, of_C, C);
        if (s.rank) {
          gather(s.delta, b, k, 0, 0, reads, count, s.rank, s.rank, low);
          project(count, stride, s.rank, bias, low, weight, of_step);
        } else {
          read_rows(s.delta, b, k, 0, channel, reads, count, width, stride, of_delta, delta);
          if (make_steps) make(count, stride, bias, delta, of_step, nullptr);
        }
        if (make_steps) in_order(of_step, stride, count, step);
        const bool left = s.y && write_rows(target, b, k, channel, writes, count, width, stride, of_y, y);
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            const auto go = !s.y    ? advance<n(), true, false, false>
                            : first ? advance<n(), false, true, false> : advance<n(), true, true, false>;
            go(count, v * W, N, first, make_steps ? step : delta, u, skip, A + at, B, C, h + at, y, nullptr);
          });
        }
        if (gate && !gate_sum) {
          read_rows(s.gate ? s.gate : s.z, b, k, 0, channel, reads, count, width, stride, of_z, z);
          multiply(count, stride, z, y);
        }
        if (left) scatter(target, b, k, channel, writes, count, width, stride, of_y);
        if (t0 + count == stop && stop < s.S)
          from_lanes(h, width, N, s.starts.at(b, k) + (segment * s.D + channel) * N);
      }
      if (s.state) from_lanes(h, width, N, s.state.at(b, k) + channel * N);
    }
    for (int64_t t0 = 0; gate_sum && t0 < s.L; t0 += T) {
      const int64_t count = s.L - t0 < T ? s.L - t0 : T;
      as_stored(t0, count, reads);
      read_rows(s.z, b, 0, 0, channel, reads, count, width, stride, of_z, z);
      read_rows(s.y.view, b, 0, 0, channel, reads, count, width, stride, of_y, y);
      multiply(count, stride, z, y);
      if (!is_direct<W>(s.y.view, width)) scatter({s.y.view}, b, 0, channel, reads, count, width, stride, of_y);
    }
  }
}

// The backward needs every state, last one first. It computes them a segment of time at a time, as many tokens as keep
// the second-level cache, from the states that the forward left.
static void scan_backward(const Scan& s, int64_t begin, int64_t end) {
  constexpr int T = REVERSE_T;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, N = s.N;
  const int64_t length = s.segment, segments = (s.S + length - 1) / length, area = length * widest, lanes = widest * N;
  const int64_t taps = (T * N + W - 1) / W * W;  // entries of B in T tokens, as whole vectors
  const bool make_steps = s.softplus || s.bias;
  const auto make = s.softplus ? step_sizes<true, true> : step_sizes<false, false>;
  const int64_t pointers = Arena::rounded(2 * length);
  Arena arena(11 * Arena::rounded(area) + 2 * Arena::rounded(T * widest) + 4 * Arena::rounded(lanes) +
              2 * Arena::rounded(length * N) + 4 * Arena::rounded(widest) +
              2 * Arena::rounded(taps * W) + Arena::rounded((length + 1) * lanes) + Arena::rounded(taps) +
              13 * pointers);
  float *of_u = arena.take(area), *of_delta = arena.take(area), *of_step = arena.take(area), *slope = arena.take(area),
        *of_z = arena.take(area), *of_y = arena.take(area), *of_out = arena.take(area), *of_dy = arena.take(area),
        *of_dz = arena.take(area), *of_du = arena.take(area), *of_ddelta = arena.take(area),
        *of_exponent = arena.take(T * widest), *of_x = arena.take(T * widest);
  float *A = arena.take(lanes), *h = arena.take(lanes), *g = arena.take(lanes), *dA = arena.take(lanes);
  float *bias = arena.take(widest), *skip = arena.take(widest), *dbias = arena.take(widest), *dskip = arena.take(widest);
  float* states = arena.take((length + 1) * lanes);
  float *of_B = arena.take(length * N), *of_C = arena.take(length * N), *sums = arena.take(taps);
  float *dB = arena.take(taps * W), *dC = arena.take(taps * W);
  zero(dB, taps * W), zero(dC, taps * W);
  const auto take_pointers = [&] { return reinterpret_cast<float**>(arena.take(2 * length)); };
  float **u = take_pointers(), **delta = take_pointers(), **step = make_steps ? take_pointers() : delta,
        **z = take_pointers(), **y = take_pointers(), **dy = take_pointers(), **dz = take_pointers(), **du = take_pointers(),
        **ddelta = take_pointers(), **B = take_pointers(), **C = take_pointers();
  int64_t* reads = reinterpret_cast<int64_t*>(arena.take(2 * length));
  int64_t* writes = reinterpret_cast<int64_t*>(arena.take(2 * length));

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, block = unit % blocks;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t vectors = (width + W - 1) / W, stride = vectors * W;
    zero(bias, stride), zero(skip, stride);
    for (int64_t k = 0; k < s.K; ++k) {
      const Target to_u = s.du.of_route(k), to_delta = s.ddelta.of_route(k), to_z = s.dz.of_route(k);
      to_lanes(s.A.at(b, k) + channel * N, width, N, LOG2E, A);
      if (s.dstate) to_lanes(s.dstate.at(b, k) + channel * N, width, N, 1.0f, g);
      else zero(g, lanes);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.skip) std::memcpy(skip, s.skip.at(b, k) + channel, width * 4);
      zero(dA, lanes), zero(dbias, stride), zero(dskip, stride);

      float* partial = s.partial_bc + ((b * s.K + k) * blocks + block) * 2 * s.S * N;
      for (int64_t segment = segments - 1; segment >= 0; --segment) {
        const int64_t t0 = segment * length, count = s.S - t0 < length ? s.S - t0 : length;
        const float* start = segment ? s.starts.at(b, k) + (segment - 1) * s.D * N : s.initial ? s.initial.at(b, k) : nullptr;
        if (start) to_lanes(start + channel * N, width, N, 1.0f, h);
        else zero(h, lanes);
        s.route.steps(b, k, t0, count, reads, writes);
        read_rows(s.u, b, k, 0, channel, reads, count, width, stride, of_u, u);
        read_rows(s.delta, b, k, 0, channel, reads, count, width, stride, of_delta, delta);
        read_rows<1>(s.b, b, k, group, 0, reads, count, N, N, of_B, B);
        read_rows<1>(s.c, b, k, group, 0, reads, count, N, N, of_C, C);
        if (make_steps) make(count, stride, bias, delta, of_step, slope), in_order(of_step, stride, count, step);
        in_order(of_y, stride, count, y);
        for (int64_t v = 0; v < vectors; ++v) {
          tiles<TILE>(N, [&](auto n, int64_t first) {
            const int64_t at = (v * N + first) * W;
            const auto keep = !s.z     ? advance<n(), true, false, true>
                              : !first ? advance<n(), true, true, true>
                                       : advance<n(), false, true, true>;
            keep(count, v * W, N, first, step, u, skip, A + at, B, C, h + at, y,
                 states + v * (length + 1) * N * W + first * W);
          });
        }
        read_rows(s.dy, b, k, 0, channel, writes, count, width, stride, of_out, dy);
        if (s.z) {
          read_rows(s.z, b, k, 0, channel, reads, count, width, stride, of_z, z);
          const bool left = write_rows(to_z, b, k, channel, reads, count, width, stride, of_dz, dz);
          ungate(count, stride, y, z, dy, of_dy, dz);
          if (left) scatter(to_z, b, k, channel, reads, count, width, stride, of_dz);
          in_order(of_dy, stride, count, dy);
        }
        const bool left_u = write_rows(to_u, b, k, channel, reads, count, width, stride, of_du, du);
        const bool left_delta = write_rows(to_delta, b, k, channel, reads, count, width, stride, of_ddelta, ddelta);
        const auto fetch_gradients = [&](int64_t first) {  // the rows that T tokens write: stores would wait for them
          for (int64_t t = first < 0 ? 0 : first; t < first + T; ++t)
            for (int64_t c = 0; c < stride; c += 16) __builtin_prefetch(du[t] + c), __builtin_prefetch(ddelta[t] + c);
          for (int64_t i = 0; first >= 0 && i < T * N; i += 16)
            for (int64_t side = 0; side < 2; ++side) __builtin_prefetch(partial + (side * s.S + t0 + first) * N + i);
        };
        for (int64_t t = (count - 1) / T * T; t >= 0; t -= T) {
          const int64_t few = count - t < T ? count - t : T;
          fetch_gradients(t - AHEAD);
          for (int64_t v = 0; v < vectors; ++v) {
            tiles<REVERSE_TILE>(N, [&](auto n, int64_t first) {
              const int64_t at = (v * N + first) * W, here = first * W;
              const auto back = first ? (v ? reverse<n(), false, false> : reverse<n(), false, true>)
                                      : (v ? reverse<n(), true, false> : reverse<n(), true, true>);
              back(few, v * W, stride, N, first, step + t, u + t, dy + t, A + at, B + t, C + t,
                   states + (v * (length + 1) + t) * N * W + here, g + at, dA + at, dB + here, dC + here,
                   of_exponent + v * W, of_x + v * W);
            });
          }
          for (int side = 0; side < 2; ++side) {
            const float* apart = side ? dC : dB;
            for (int64_t i = 0; i < taps; i += W) store(sums + i, lane_sums<W>(apart + i * W));
            std::memcpy(partial + (side * s.S + t0 + t) * N, sums, few * N * 4);
          }
          conclude(few, stride, u + t, step + t, s.softplus ? slope + t * stride : nullptr, skip, dy + t, of_exponent,
                   of_x, ddelta + t, du + t, dbias, dskip);
        }
        if (left_u) scatter(to_u, b, k, channel, reads, count, width, stride, of_du);
        if (left_delta) scatter(to_delta, b, k, channel, reads, count, width, stride, of_ddelta);
      }
      from_lanes(dA, width, N, s.partial_A + ((b * s.K + k) * s.D + channel) * N);
      float* of_channel = s.partial_channel + (b * s.K + k) * 2 * s.D + channel;
      std::memcpy(of_channel, dskip, width * 4);
      std::memcpy(of_channel + s.D, dbias, width * 4);
      if (s.dinitial) from_lanes(g, width, N, s.dinitial.at(b, k) + channel * N);
    }
  }
}
