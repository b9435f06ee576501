// Recurrences of vector states, one channel a lane, for one instruction set. Included inside its namespace.
//
// Two kinds: h = e^g h + x, whose output is h; and WKV, sums of e^k v and of e^k that decay by e^-w a token, of which the
// output is the quotient, with an own term e^(u + k). A unit of work holds its tokens as rows in time order, and takes
// VECTORS of its channels through time together: alone, each would wait for its exponentials.

constexpr int VECTOR_T = 64;  // tokens in a chunk of the forward
constexpr float EMPTY = -1e38f;  // the top of a sum without terms

// Two sums of terms, both relative to e^(top - lost), top being the largest exponent in them and `lost` what rounding has
// left of the decays that were to be taken from it. So terms that are there stay as they are while others come in.
constexpr int64_t SUMS = 4;  // rows
struct Sums {
  V a, b, top, lost;

  // One token later: decayed by e^-w, and with e^k x and e^k y in them.
  LINESCAN_STAGE void add(V k, V x, V y, V w) {
    const V step = w + lost, decayed = top - step, most = at_least(decayed, k), left = step - (top - decayed);
    lost = decayed < k ? V{} : left;
    const V keep = exp((decayed - most) - (left - lost)), fresh = exp((k - most) + lost);
    a = keep * a + fresh * x, b = keep * b + fresh * y, top = most;
  }
  // e^top relative to e^-x.
  LINESCAN_STAGE V weight(V x) const { return exp((top + x) - lost); }

  LINESCAN_STAGE static Sums at(const float* rows, int64_t stride) {
    return {load(rows), load(rows + stride), load(rows + 2 * stride), load(rows + 3 * stride)};
  }
  LINESCAN_STAGE void keep(float* rows, int64_t stride) const {
    store(rows, a), store(rows + stride, b), store(rows + 2 * stride, top), store(rows + 3 * stride, lost);
  }
};

// Rows of `stride` channels.
struct Channels {
  int64_t count = 0, stride = 0;
  const float *w = nullptr, *u = nullptr;
  float *x = nullptr, *g = nullptr;  // or k, v
  float *state = nullptr, *y = nullptr;
  float *past = nullptr, *future = nullptr;  // sums, or states, on either side of every token
  float *dy = nullptr, *dx = nullptr, *dg = nullptr, *share = nullptr, *flow = nullptr;
  float *dw = nullptr, *du = nullptr, *dtop = nullptr;
};

// Calls f(integral_constant<int, VECTORS>, first channel) for all channels of rows.
template <class F>
LINESCAN_INLINE void abreast(int64_t stride, const F& f) {
  int64_t c = 0;
  for (; c + 4 * W <= stride; c += 4 * W) f(std::integral_constant<int, 4>(), c);
  for (; c < stride; c += W) f(std::integral_constant<int, 1>(), c);
}

// -- gated sums ---------------------------------------------------------------------------------------------------------

// h = e^g h + x; the states before the tokens are kept where there is room for them.
template <int VECTORS>
__attribute__((noinline)) static void gated_sum(const Channels& s, int64_t c) {
  V h[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { h[l] = load(s.state + c + l * W); });
  for (int64_t t = 0, at = c; t < s.count; ++t, at += s.stride)
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      if (s.past) store(s.past + at + l * W, h[l]);
      h[l] = exp(load(s.g + at + l * W)) * h[l] + load(s.x + at + l * W);
      if (s.y) store(s.y + at + l * W, h[l]);
    });
  each<VECTORS>([&](auto l) LINESCAN_STAGE { store(s.state + c + l * W, h[l]); });
}

// `flow` comes in as the gradient of the last state and leaves as that of the first.
template <int VECTORS>
__attribute__((noinline)) static void gated_sum_adjoint(const Channels& s, int64_t c) {
  V flow[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { flow[l] = load(s.flow + c + l * W); });
  for (int64_t t = s.count - 1; t >= 0; --t)
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t at = t * s.stride + c + l * W;
      flow[l] += load(s.dy + at);
      store(s.dx + at, flow[l]);
      flow[l] *= exp(load(s.g + at));
      store(s.dg + at, flow[l] * load(s.past + at));
    });
  each<VECTORS>([&](auto l) LINESCAN_STAGE { store(s.flow + c + l * W, flow[l]); });
}

// -- WKV ----------------------------------------------------------------------------------------------------------------

// The sums on one side of every token, kept in `rows` where given, and the output where nothing but they and those in
// `future` are missing.
template <int VECTORS>
__attribute__((noinline)) static void wkv_sums(const Channels& s, int64_t c, bool back, float* rows) {
  Sums sums[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { sums[l] = Sums::at(s.state + c + l * W, s.stride); });
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t t = back ? s.count - 1 - i : i;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t at = t * s.stride + c + l * W, of_sums = SUMS * t * s.stride + c + l * W;
      const V k = load(s.x + at), v = load(s.g + at);
      if (rows) sums[l].keep(rows + of_sums, s.stride);
      if (s.y && !back) {
        const V bonus = load(s.u + c + l * W);
        V most = at_least(k + bonus, sums[l].top);
        Sums other = {};
        if (s.future) other = Sums::at(s.future + of_sums, s.stride), most = at_least(most, other.top);
        const V mine = exp((k - most) + bonus), past = sums[l].weight(-most);
        V num = mine * v + past * sums[l].a, den = mine + past * sums[l].b;
        if (s.future) {
          const V future = other.weight(-most);
          num += future * other.a, den += future * other.b;
        }
        store(s.y + at, num / den);
      }
      sums[l].add(k, v, splat(1.0f), load(s.w + c + l * W));
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { sums[l].keep(s.state + c + l * W, s.stride); });
}

// The gradients of a token's two sums, relative to e^-most, and -most, go to `share`; those of its own term further.
template <int VECTORS>
__attribute__((noinline)) static void wkv_shares(const Channels& s, int64_t c) {
  V du[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { du[l] = V{}; });
  for (int64_t t = 0; t < s.count; ++t)
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t at = t * s.stride + c + l * W, of_sums = SUMS * t * s.stride + c + l * W;
      const V k = load(s.x + at), v = load(s.g + at), bonus = load(s.u + c + l * W);
      const Sums past = Sums::at(s.past + of_sums, s.stride);
      V most = at_least(k + bonus, past.top);
      Sums other = {V{}, V{}, splat(EMPTY), V{}};
      if (s.future) other = Sums::at(s.future + of_sums, s.stride), most = at_least(most, other.top);
      const V mine = exp((k - most) + bonus), before = past.weight(-most), after = other.weight(-most);
      const V den = mine + before * past.b + after * other.b, of_num = load(s.dy + at) / den;
      // dnum v + dden of a term, from the differences to the output of all: these lose no digits
      const V y = (mine * v + before * past.a + after * other.a) / den, of_own = of_num * mine * (v - y);
      store(s.dx + at, of_own), store(s.dg + at, of_num * mine);
      du[l] += of_own;
      Sums{of_num, -of_num * y, -most, V{}}.keep(s.share + of_sums, s.stride);
    });
  each<VECTORS>([&](auto l) LINESCAN_STAGE { store(s.du + c + l * W, load(s.du + c + l * W) + du[l]); });
}

// The gradients of the sums on one side, themselves such sums the other way. `flow` as that of the gated sum; `dtop`, if
// there is one, is the gradient of the last top, which is that of the exponent it was taken from.
template <int VECTORS>
__attribute__((noinline)) static void wkv_adjoint(const Channels& s, int64_t c, bool back, const float* rows) {
  Sums flow[VECTORS];
  V dw[VECTORS], dtop[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    flow[l] = Sums::at(s.flow + c + l * W, s.stride);
    dw[l] = V{}, dtop[l] = s.dtop ? load(s.dtop + c + l * W) : V{};
  });
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t t = back ? s.count - 1 - i : i;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t at = t * s.stride + c + l * W, of_sums = SUMS * t * s.stride + c + l * W;
      const V k = load(s.x + at), v = load(s.g + at), w = load(s.w + c + l * W);
      const Sums sums = Sums::at(rows + of_sums, s.stride), share = Sums::at(s.share + of_sums, s.stride);
      const V weight = flow[l].weight(k), decayed = sums.top - w;
      V of_k = weight * (v * flow[l].a + flow[l].b);
      dw[l] -= exp(((flow[l].top + sums.top) - w) - (flow[l].lost + sums.lost)) * (flow[l].a * sums.a + flow[l].b * sums.b);
      if (s.dtop) {  // half to either of two equal exponents
        const V part = dtop[l] * (decayed > k ? splat(1.0f) : decayed < k ? V{} : splat(0.5f));
        of_k += dtop[l] - part, dw[l] -= part, dtop[l] = part;
      }
      store(s.dx + at, load(s.dx + at) + of_k);
      store(s.dg + at, load(s.dg + at) + weight * flow[l].a);
      flow[l].add(share.top, share.a, share.b, w);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    flow[l].keep(s.flow + c + l * W, s.stride);
    store(s.dw + c + l * W, load(s.dw + c + l * W) + dw[l]);
    if (s.dtop) store(s.dtop + c + l * W, dtop[l]);
  });
}

// -- a unit of work -----------------------------------------------------------------------------------------------------

static void empty_sums(int64_t stride, float* state) {
  zero(state, SUMS * stride);
  for (int64_t i = 0; i < stride; ++i) state[2 * stride + i] = EMPTY;
}

// The state of a unit's channels as rows.
static void enter(const Vectors& s, int64_t b, int64_t k, int64_t channel, int64_t width, Channels& c) {
  zero(c.state, SUMS * c.stride);
  if (s.initial) to_rows(s.initial.at(b, k) + channel * s.numbers, width, s.numbers, c.stride, c.state);
  else if (s.rule != VectorRule::gated) empty_sums(c.stride, c.state);
}

static void vector_forward(const Vectors& s, int64_t begin, int64_t end) {
  const bool gated = s.rule == VectorRule::gated, both = s.rule == VectorRule::wkv_both;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, T = both ? s.S : VECTOR_T;
  const auto place = [&](Arena arena, Channels& c) {
    float *w = arena.take(widest), *u = arena.take(widest);
    c.w = w, c.u = u, c.x = arena.take(T * widest), c.g = arena.take(T * widest);
    c.state = arena.take(SUMS * widest), c.y = arena.take(T * widest);
    if (both) c.future = arena.take(SUMS * T * widest);
    return arena.used();
  };
  Channels c;
  Arena arena(place(Arena(), c));
  place(arena, c);
  float *const w = const_cast<float*>(c.w), *const u = const_cast<float*>(c.u), *const y = c.y;
  zero(w, widest), zero(u, widest);
  std::vector<int64_t> reads(T), writes(T);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t per_sample = s.merge ? blocks : blocks * s.K, b = unit / per_sample, block = unit % blocks;
    const int64_t k0 = s.merge ? 0 : unit % per_sample / blocks, k1 = s.merge ? s.K : k0 + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    c.stride = (width + W - 1) / W * W;
    for (int64_t k = k0; k < k1; ++k) {
      if (!gated) std::memcpy(w, s.w.at(b, k) + channel, width * 4), std::memcpy(u, s.u.at(b, k) + channel, width * 4);
      enter(s, b, k, channel, width, c);
      const Target target = s.y.of_route(k);
      if (!target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = 0; t0 < s.S; t0 += T) {
        c.count = s.S - t0 < T ? s.S - t0 : T;
        s.route.steps(b, k, t0, c.count, reads.data(), writes.data());
        gather(s.x, b, k, 0, channel, reads.data(), c.count, width, c.stride, c.x);
        gather(s.g, b, k, 0, channel, reads.data(), c.count, width, c.stride, c.g);
        if (both) {
          abreast(c.stride, [&](auto n, int64_t at) { wkv_sums<n()>(c, at, true, c.future); });
          empty_sums(c.stride, c.state);
        }
        abreast(c.stride, [&](auto n, int64_t at) {
          if (gated) gated_sum<n()>(c, at);
          else wkv_sums<n()>(c, at, false, nullptr);
        });
        scatter(target, b, k, channel, writes.data(), c.count, width, c.stride, y);
      }
      for (int64_t i = 0; !gated && i < c.stride; ++i) {  // relative to e^top
        const float factor = exp(splat(-c.state[3 * c.stride + i]))[0];
        c.state[i] *= factor, c.state[c.stride + i] *= factor;
      }
      if (s.state) from_rows(c.state, width, s.numbers, c.stride, s.state.at(b, k) + channel * s.numbers, s.numbers);
    }
  }
}

static void vector_backward(const Vectors& s, int64_t begin, int64_t end) {
  const bool gated = s.rule == VectorRule::gated, both = s.rule == VectorRule::wkv_both;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, all = s.S * widest;
  const auto place = [&](Arena arena, Channels& c) {
    float *w = arena.take(widest), *u = arena.take(widest);
    c.count = s.S, c.w = w, c.u = u, c.x = arena.take(all), c.g = arena.take(all), c.state = arena.take(SUMS * widest);
    c.past = arena.take((gated ? 1 : SUMS) * all), c.future = both ? arena.take(SUMS * all) : nullptr;
    c.dy = arena.take(all), c.dx = arena.take(all), c.dg = arena.take(all), c.share = arena.take(gated ? 0 : SUMS * all);
    c.flow = arena.take(SUMS * widest), c.dw = arena.take(widest), c.du = arena.take(widest);
    c.dtop = arena.take(widest);
    return arena.used();
  };
  Channels c;
  Arena arena(place(Arena(), c));
  place(arena, c);
  float *const w = const_cast<float*>(c.w), *const u = const_cast<float*>(c.u), *const dtop = c.dtop;
  zero(w, widest), zero(u, widest);
  std::vector<int64_t> reads(s.S), writes(s.S);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks;
    int64_t group, channel, width;
    s.blocks.locate(unit % blocks, group, channel, width);
    c.stride = (width + W - 1) / W * W;
    const auto across = [&](const auto& f) { abreast(c.stride, f); };
    const auto to_state = [&](const float* rows, const Parameter& p, int64_t k) {
      if (p) from_rows(rows, width, s.numbers, c.stride, p.at(b, k) + channel * s.numbers, s.numbers);
    };
    for (int64_t k = 0; k < s.K; ++k) {
      s.route.steps(b, k, 0, s.S, reads.data(), writes.data());
      gather(s.x, b, k, 0, channel, reads.data(), s.S, width, c.stride, c.x);
      gather(s.g, b, k, 0, channel, reads.data(), s.S, width, c.stride, c.g);
      gather(s.dy, b, k, 0, channel, writes.data(), s.S, width, c.stride, c.dy);
      enter(s, b, k, channel, width, c);
      zero(c.flow, SUMS * c.stride), zero(c.dw, c.stride), zero(c.du, c.stride);
      if (s.dstate) to_rows(s.dstate.at(b, k) + channel * s.numbers, width, s.numbers, c.stride, c.flow);
      if (gated) {
        across([&](auto n, int64_t at) { gated_sum<n()>(c, at), gated_sum_adjoint<n()>(c, at); });
        to_state(c.flow, s.dinitial, k);
      } else {
        std::memcpy(w, s.w.at(b, k) + channel, width * 4), std::memcpy(u, s.u.at(b, k) + channel, width * 4);
        if (both) {
          across([&](auto n, int64_t at) { wkv_sums<n()>(c, at, true, c.future); });
          empty_sums(c.stride, c.state);
        }
        across([&](auto n, int64_t at) { wkv_sums<n()>(c, at, false, c.past), wkv_shares<n()>(c, at); });
        c.dtop = s.dstate ? dtop : nullptr;
        if (s.dstate) {  // of num, den and top to those of both sums, relative to e^-top, and of what top was taken from
          for (int64_t i = 0; i < c.stride; ++i) {
            float &of_top = c.flow[2 * c.stride + i], *sums = c.state + i;
            dtop[i] = of_top - c.flow[i] * sums[0] - c.flow[c.stride + i] * sums[c.stride];
            of_top = -sums[2 * c.stride];
          }
        } else {
          empty_sums(c.stride, c.flow);
        }
        across([&](auto n, int64_t at) { wkv_adjoint<n()>(c, at, true, c.past); });
        if (s.dinitial) {
          for (int64_t i = 0; i < c.stride; ++i) {  // the other way, at the first token
            float *flow = c.flow + i, *first = c.past + i;
            const float top = exp(splat((flow[2 * c.stride] + first[2 * c.stride]) - flow[3 * c.stride]))[0];
            flow[0] *= top, flow[c.stride] *= top;
            flow[2 * c.stride] = flow[0] * first[0] + flow[c.stride] * first[c.stride] + (c.dtop ? c.dtop[i] : 0.0f);
          }
          to_state(c.flow, s.dinitial, k);
        }
        if (both) {
          empty_sums(c.stride, c.flow);
          across([&](auto n, int64_t at) { wkv_adjoint<n()>(c, at, false, c.future); });
        }
        float* partial = s.partial + (b * s.K + k) * 2 * s.D + channel;
        std::memcpy(partial, c.dw, width * 4), std::memcpy(partial + s.D, c.du, width * 4);
      }
      scatter(s.dx.of_route(k), b, k, channel, reads.data(), s.S, width, c.stride, c.dx);
      scatter(s.dg.of_route(k), b, k, channel, reads.data(), s.S, width, c.stride, c.dg);
    }
  }
}
