// Recurrences of vector states, one channel a lane, for one instruction set. Included inside its namespace.
//
// Two kinds: h = e^g h + x, whose output is h; and WKV, sums of e^k v and of e^k that decay by e^-w a token, of which the
// output is the quotient, with an own term e^(u + k); these are plain ones where exponents allow it. A unit of work holds a
// chunk of its tokens as rows in time order, and takes VECTORS of its channels through time together: alone, each would
// wait for its exponentials. Where time is gone through again, or the other way, it begins at states that were marked at
// the borders of chunks: sums are made anew in less time than those of all tokens, which no near cache holds, would be
// fetched.

constexpr int VECTOR_T = 32;  // tokens in a chunk
constexpr float EMPTY = -1e38f;  // the top of a sum without terms

// Two sums of terms, both relative to e^(top - lost), top being the largest exponent in them and `lost` what rounding has
// left of the decays that were to be taken from it. So terms that are there stay as they are while others come in.
constexpr int64_t SUMS = 4;  // rows
struct Sums {
  V a, b, top, lost;

  // What both of two sums are multiplied with when they meet: of the larger ones, 1.
  struct Shares {
    V own, other;
    LINESCAN_STAGE void keep(float* rows, int64_t stride) const { store(rows, own), store(rows + stride, other); }
  };
  template <class Mask>
  LINESCAN_STAGE Shares meet(const Sums& x, V above, const Mask& larger) {
    const V less = exp_of_less(larger ? -above : above), one = splat(1.0f);
    const Shares shares = {larger ? less : one, larger ? one : less};
    a = shares.own * a + shares.other * x.a, b = shares.own * b + shares.other * x.b;
    top = larger ? x.top : top, lost = larger ? x.lost : lost;
    return shares;
  }
  LINESCAN_STAGE Shares meet(const Sums& x) {
    const V above = (x.top - top) + (lost - x.lost);
    return meet(x, above, above > 0.0f);
  }
  // One token later: decayed by e^-w, and with e^k v and e^k in them. Tokens wait for what is larger, so that it is told
  // from the tops, which are ready first and may be equal where `lost` makes a difference.
  LINESCAN_STAGE Shares add(V k, V v, V w) {
    const V step = w + lost, decayed = top - step;
    lost = step - (top - decayed), top = decayed;
    return meet({v, splat(1.0f), k, V{}}, (k - top) + lost, k > top);
  }

  LINESCAN_STAGE static Sums at(const float* rows, int64_t stride) {
    return {load(rows), load(rows + stride), load(rows + 2 * stride), load(rows + 3 * stride)};
  }
  LINESCAN_STAGE void keep(float* rows, int64_t stride) const {
    store(rows, a), store(rows + stride, b), store(rows + 2 * stride, top), store(rows + 3 * stride, lost);
  }
};

// Rows of `stride` channels: those of tokens by pointers, others one after another.
struct Channels {
  int64_t count = 0, stride = 0;
  const float *w = nullptr, *u = nullptr;
  float *x[VECTOR_T], *g[VECTOR_T], *y[VECTOR_T];  // or k, v
  float *dy[VECTOR_T], *dx[VECTOR_T], *dg[VECTOR_T];
  bool add_x = false, add_g = false;  // whether dx, dg already hold something
  float* state = nullptr;
  float *sums = nullptr, *steps = nullptr;  // before every token: states or sums on one side; what they are multiplied with
  float *future = nullptr, *future_steps = nullptr;  // the same of sums on the other side
  float *of_sums = nullptr, *of_future = nullptr;
  float *flow = nullptr, *dw = nullptr, *du = nullptr, *dtop = nullptr;
  // of plain sums
  float* plain = nullptr;  // of the first channel of a vector: whether its sums are such
  float *decay = nullptr, *rest = nullptr, *own = nullptr, *weights = nullptr;  // e^-w, what it lacks, e^u, e^k of tokens
  bool tops = false;  // whether the largest exponents are wanted
};

// Calls f(integral_constant<int, VECTORS>, first channel) for all channels of rows.
template <class F>
LINESCAN_INLINE void abreast(int64_t stride, const F& f) {
  int64_t c = 0;
  for (; c + 4 * W <= stride; c += 4 * W) f(std::integral_constant<int, 4>(), c);
  for (; c + 2 * W <= stride; c += 2 * W) f(std::integral_constant<int, 2>(), c);
  for (; c < stride; c += W) f(std::integral_constant<int, 1>(), c);
}

LINESCAN_INLINE void put(float* row, V v, bool add) { store(row, add ? load(row) + v : v); }

// -- gated sums ---------------------------------------------------------------------------------------------------------

// h = e^g h + x; the states before the tokens, and e^g, are kept if there is to be a way back.
template <int VECTORS, bool KEEP>
__attribute__((noinline)) static void gated_sum(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  float *sums = s.sums + c, *steps = s.steps + c;
  V h[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { h[l] = load(s.state + c + l * W); });
  for (int64_t t = 0, count = s.count; t < count; ++t) {
    const float *x = s.x[t] + c, *g = s.g[t] + c;
    float* y = KEEP ? nullptr : s.y[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const V decay = exp(load(g + l * W));
      if (KEEP) store(sums + t * stride + l * W, h[l]), store(steps + t * stride + l * W, decay);
      h[l] = decay * h[l] + load(x + l * W);
      if (!KEEP) store(y + l * W, h[l]);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { store(s.state + c + l * W, h[l]); });
}

// `flow` comes in as the gradient of the last state and leaves as that of the first.
template <int VECTORS>
__attribute__((noinline)) static void gated_sum_adjoint(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  const float *sums = s.sums + c, *steps = s.steps + c;
  const bool add_x = s.add_x, add_g = s.add_g;
  V flow[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { flow[l] = load(s.flow + c + l * W); });
  for (int64_t t = s.count - 1; t >= 0; --t) {
    const float* dy = s.dy[t] + c;
    float *dx = s.dx[t] + c, *dg = s.dg[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      flow[l] += load(dy + l * W);
      put(dx + l * W, flow[l], add_x);
      flow[l] *= load(steps + t * stride + l * W);
      put(dg + l * W, flow[l] * load(sums + t * stride + l * W), add_g);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { store(s.flow + c + l * W, flow[l]); });
}

// -- WKV ----------------------------------------------------------------------------------------------------------------

// The sums on one side of every token, kept where there is room for them.
template <int VECTORS>
__attribute__((noinline)) static void wkv_sums(const Channels& s, int64_t c, bool back, float* sums, float* steps) {
  const int64_t stride = s.stride, count = s.count;
  const float* w = s.w + c;
  Sums state[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l] = Sums::at(s.state + c + l * W, stride); });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = back ? count - 1 - i : i;
    const float *k = s.x[t] + c, *v = s.g[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      if (sums) state[l].keep(sums + SUMS * t * stride + c + l * W, stride);
      const auto shares = state[l].add(load(k + l * W), load(v + l * W), load(w + l * W));
      if (steps) shares.keep(steps + 2 * t * stride + c + l * W, stride);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l].keep(s.state + c + l * W, stride); });
}

// The output, the quotient of all sums of a token: those before it, which go on, its own, and those after it if there are
// such.
template <int VECTORS>
__attribute__((noinline)) static void wkv_means(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  const float *w = s.w + c, *u = s.u + c, *future = s.future ? s.future + c : nullptr;
  Sums state[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l] = Sums::at(s.state + c + l * W, stride); });
  for (int64_t t = 0, count = s.count; t < count; ++t) {
    const float *of_k = s.x[t] + c, *of_v = s.g[t] + c;
    float* y = s.y[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const V k = load(of_k + l * W), v = load(of_v + l * W);
      Sums all = state[l];
      all.meet({v, splat(1.0f), k, -load(u + l * W)});
      if (future) all.meet(Sums::at(future + SUMS * t * stride + l * W, stride));
      store(y + l * W, quotient(all.a, all.b));
      state[l].add(k, v, load(w + l * W));
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l].keep(s.state + c + l * W, stride); });
}

// The gradients of the sums on both sides of every token, each relative to what its sums are relative to, and of its own
// term. Where there are none after it, the sums before it are kept.
template <int VECTORS>
__attribute__((noinline)) static void wkv_means_adjoint(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  const float *w = s.w + c, *u = s.u + c, *future = s.future ? s.future + c : nullptr;
  float *sums = s.sums + c, *steps = s.steps + c, *of_sums = s.of_sums + c, *of_future = s.of_future + c;
  const bool add_x = s.add_x, add_g = s.add_g;
  Sums state[VECTORS];
  V du[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    state[l] = Sums::at(s.state + c + l * W, stride), du[l] = V{};
  });
  for (int64_t t = 0, count = s.count; t < count; ++t) {
    const float *of_k = s.x[t] + c, *of_v = s.g[t] + c, *dy = s.dy[t] + c;
    float *dx = s.dx[t] + c, *dg = s.dg[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t two = 2 * t * stride + l * W, four = SUMS * t * stride + l * W;
      const V k = load(of_k + l * W), v = load(of_v + l * W);
      Sums all = state[l];
      auto [past, mine] = all.meet({v, splat(1.0f), k, -load(u + l * W)});
      V after = {};
      if (future) {
        const auto [here, there] = all.meet(Sums::at(future + four, stride));
        past *= here, mine *= here, after = there;
      }
      // dnum v + dden of a term, from its difference to the output of all: this loses no digits
      const V of_num = quotient(load(dy + l * W), all.b), y = quotient(all.a, all.b), of_den = -of_num * y;
      const V of_own = of_num * mine * (v - y);
      put(dx + l * W, of_own, add_x), put(dg + l * W, of_num * mine, add_g);
      du[l] += of_own;
      store(of_sums + two, of_num * past), store(of_sums + two + stride, of_den * past);
      if (future) {
        store(of_future + two, of_num * after), store(of_future + two + stride, of_den * after);
        state[l].add(k, v, load(w + l * W));
      } else {
        state[l].keep(sums + four, stride);
        state[l].add(k, v, load(w + l * W)).keep(steps + two, stride);
      }
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    state[l].keep(s.state + c + l * W, stride);
    store(s.du + c + l * W, load(s.du + c + l * W) + du[l]);
  });
}

// The gradients of the sums on one side, which run the other way. What sums are relative to does not change an output, so
// that it counts as given. `flow` as that of the gated sum; `dtop`, if there is one, is the gradient of the last top, which
// is that of the exponent it was taken from.
template <int VECTORS>
__attribute__((noinline)) static void wkv_sums_adjoint(const Channels& s, int64_t c, bool back, const float* sums,
                                                       const float* steps, const float* share) {
  const int64_t stride = s.stride, count = s.count;
  const bool to_top = s.dtop;
  V a[VECTORS], b[VECTORS], dw[VECTORS], dtop[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    a[l] = load(s.flow + c + l * W), b[l] = load(s.flow + stride + c + l * W);
    dw[l] = V{}, dtop[l] = to_top ? load(s.dtop + c + l * W) : V{};
  });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = back ? count - 1 - i : i;
    const float* v = s.g[t] + c;
    float *dk = s.dx[t] + c, *dv = s.dg[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t two = 2 * t * stride + c + l * W;
      const float* before = sums + SUMS * t * stride + c + l * W;
      const V keep = load(steps + two), fresh = load(steps + two + stride);
      V of_k = fresh * (load(v + l * W) * a[l] + b[l]);
      dw[l] -= keep * (a[l] * load(before) + b[l] * load(before + stride));
      if (to_top) {  // half to either of two equal exponents
        const V part = dtop[l] * (keep > fresh ? splat(1.0f) : keep < fresh ? V{} : splat(0.5f));
        of_k += dtop[l] - part, dw[l] -= part, dtop[l] = part;
      }
      put(dk + l * W, of_k, true), put(dv + l * W, fresh * a[l], true);
      a[l] = keep * a[l] + load(share + two), b[l] = keep * b[l] + load(share + two + stride);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    store(s.flow + c + l * W, a[l]), store(s.flow + stride + c + l * W, b[l]);
    store(s.dw + c + l * W, load(s.dw + c + l * W) + dw[l]);
    if (to_top) store(s.dtop + c + l * W, dtop[l]);
  });
}

// -- WKV of plain sums ---------------------------------------------------------------------------------------------------

// Where no exponent of a channel is far from 0, its sums are plain: of e^k v and of e^k as they are. A token then takes
// one exponential, for both sides and its own term, and no comparisons; and the gradients of the sums on both sides are
// the same. Its own term is in every quotient, at least e^-ORDINARY: what is too small for float32 is nothing beside it.
// Vectors of channels begin with plain sums, if they begin with none, until a chunk has another exponent.
constexpr float ORDINARY = 30.0f;

struct PlainSums {
  V a, b;
  // Float32's e^-w by itself would be off by the more, the longer sums last: what it lacks is put in as well.
  LINESCAN_STAGE void decay(const Channels& s, int64_t c, V more_a, V more_b) {
    const V decay = load(s.decay + c), rest = load(s.rest + c);
    a = decay * a + (rest * a + more_a), b = decay * b + (rest * b + more_b);
  }
  LINESCAN_STAGE static PlainSums at(const float* rows, int64_t stride) { return {load(rows), load(rows + stride)}; }
  LINESCAN_STAGE void keep(float* rows, int64_t stride) const { store(rows, a), store(rows + stride, b); }
};

// Plain sums become such that are relative to their largest terms.
LINESCAN_INLINE void leave_plain(const Channels& s, int64_t c) {
  float* state = s.state + c;
  const V top = load(state + 2 * s.stride), lost = load(state + 3 * s.stride);
  const V factor = exp(at_most(lost - top, splat(2 * ORDINARY)));  // of sums without terms, any number
  store(state, load(state) * factor), store(state + s.stride, load(state + s.stride) * factor);
  s.plain[c] = 0.0f;
}

// The weights e^k of a chunk. Returns false if some of the sums cannot be plain any longer.
template <int VECTORS>
__attribute__((noinline)) static bool weigh(const Channels& s, int64_t c) {
  const int64_t stride = s.stride, count = s.count;
  const bool tops = s.tops;
  const float *w = s.w + c, *u = s.u + c;
  float* weights = s.weights + c;
  V least[VECTORS], most[VECTORS], top[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    least[l] = most[l] = load(s.x[0] + c + l * W), top[l] = splat(EMPTY);
  });
  for (int64_t t = 0; t < count; ++t) {
    const float* of_k = s.x[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const V k = load(of_k + l * W);
      least[l] = at_most(k, least[l]), most[l] = at_least(k, most[l]);
      if (tops) top[l] = at_least(k, top[l] - load(w + l * W));
      store(weights + t * stride + l * W, exp_of_ordinary(k));
    });
  }
  bool all = true;
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    const V own = load(u + l * W);
    const auto beyond = (most[l] + at_least(own, V{}) > ORDINARY) | (least[l] + at_most(own, V{}) < -ORDINARY);
    if (any(beyond)) {
      leave_plain(s, c + l * W), all = false;
    } else if (tops) {
      float* rows = s.state + 2 * stride + c + l * W;
      const V before = load(rows), step = load(w + l * W) * float(count) + load(rows + stride), decayed = before - step;
      store(rows, at_least(top[l], decayed));
      store(rows + stride, top[l] > decayed ? V{} : step - (before - decayed));
    }
  });
  return all;
}

// As `wkv_sums`.
template <int VECTORS>
__attribute__((noinline)) static void plain_sums(const Channels& s, int64_t c, bool back, float* sums) {
  const int64_t stride = s.stride, count = s.count;
  const float* weights = s.weights + c;
  PlainSums state[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l] = PlainSums::at(s.state + c + l * W, stride); });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = back ? count - 1 - i : i;
    const float* v = s.g[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      if (sums) state[l].keep(sums + 2 * t * stride + c + l * W, stride);
      const V weight = load(weights + t * stride + l * W);
      state[l].decay(s, c + l * W, weight * load(v + l * W), weight);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l].keep(s.state + c + l * W, stride); });
}

// As `wkv_means`.
template <int VECTORS>
__attribute__((noinline)) static void plain_means(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  const float *weights = s.weights + c, *of_own = s.own + c;
  const float* future = s.future ? s.future + c : nullptr;
  PlainSums state[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l] = PlainSums::at(s.state + c + l * W, stride); });
  for (int64_t t = 0, count = s.count; t < count; ++t) {
    const float* of_v = s.g[t] + c;
    float* y = s.y[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const V weight = load(weights + t * stride + l * W), v = load(of_v + l * W), own = load(of_own + l * W) * weight;
      PlainSums all = {state[l].a + own * v, state[l].b + own};
      if (future) all.a += load(future + 2 * t * stride + l * W), all.b += load(future + (2 * t + 1) * stride + l * W);
      store(y + l * W, quotient(all.a, all.b));
      state[l].decay(s, c + l * W, weight * v, weight);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE { state[l].keep(s.state + c + l * W, stride); });
}

// As `wkv_means_adjoint`, but the gradients of the sums after are those of the sums before.
template <int VECTORS>
__attribute__((noinline)) static void plain_means_adjoint(const Channels& s, int64_t c) {
  const int64_t stride = s.stride;
  const float *weights = s.weights + c, *of_own = s.own + c, *future = s.future ? s.future + c : nullptr;
  float *sums = s.sums + c, *of_sums = s.of_sums + c;
  const bool add_x = s.add_x, add_g = s.add_g;
  PlainSums state[VECTORS];
  V du[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    state[l] = PlainSums::at(s.state + c + l * W, stride), du[l] = V{};
  });
  for (int64_t t = 0, count = s.count; t < count; ++t) {
    const float *of_v = s.g[t] + c, *dy = s.dy[t] + c;
    float *dx = s.dx[t] + c, *dg = s.dg[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t two = 2 * t * stride + l * W;
      const V weight = load(weights + t * stride + l * W), v = load(of_v + l * W), own = load(of_own + l * W) * weight;
      PlainSums all = {state[l].a + own * v, state[l].b + own};
      if (future) all.a += load(future + two), all.b += load(future + two + stride);
      else state[l].keep(sums + two, stride);
      const V of_num = quotient(load(dy + l * W), all.b), y = quotient(all.a, all.b), mine = of_num * own;
      const V of_exponent = mine * (v - y);
      put(dx + l * W, of_exponent, add_x), put(dg + l * W, mine, add_g);
      du[l] += of_exponent;
      store(of_sums + two, of_num), store(of_sums + two + stride, -of_num * y);
      state[l].decay(s, c + l * W, weight * v, weight);
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    state[l].keep(s.state + c + l * W, stride);
    store(s.du + c + l * W, load(s.du + c + l * W) + du[l]);
  });
}

// As `wkv_sums_adjoint`.
template <int VECTORS>
__attribute__((noinline)) static void plain_sums_adjoint(const Channels& s, int64_t c, bool back, const float* sums) {
  const int64_t stride = s.stride, count = s.count;
  const float *weights = s.weights + c, *of_sums = s.of_sums + c;
  PlainSums flow[VECTORS];
  V of_decay[VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    flow[l] = PlainSums::at(s.flow + c + l * W, stride), of_decay[l] = V{};
  });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = back ? count - 1 - i : i;
    const float* of_v = s.g[t] + c;
    float *dk = s.dx[t] + c, *dv = s.dg[t] + c;
    each<VECTORS>([&](auto l) LINESCAN_STAGE {
      const int64_t two = 2 * t * stride + l * W;
      const float* before = sums + c + two;
      const V weight = load(weights + t * stride + l * W), v = load(of_v + l * W);
      put(dk + l * W, weight * (v * flow[l].a + flow[l].b), true), put(dv + l * W, weight * flow[l].a, true);
      of_decay[l] += flow[l].a * load(before) + flow[l].b * load(before + stride);
      flow[l].decay(s, c + l * W, load(of_sums + two), load(of_sums + two + stride));
    });
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    flow[l].keep(s.flow + c + l * W, stride);
    store(s.dw + c + l * W, load(s.dw + c + l * W) - load(s.decay + c + l * W) * of_decay[l]);
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

static void take_plain(Arena& arena, int64_t widest, Channels& c) {
  c.plain = arena.take(widest), c.decay = arena.take(widest), c.rest = arena.take(widest), c.own = arena.take(widest);
  c.weights = arena.take(VECTOR_T * widest);
}

// The rates of a unit's channels as rows, and what plain sums need of them. Those of rates below 0 grow.
static void set_rates(const Vectors& s, int64_t b, int64_t k, int64_t channel, int64_t width, bool plain, float* w,
                      float* u, Channels& c) {
  zero(w + c.stride - W, W), zero(u + c.stride - W, W);
  std::memcpy(w, s.w.at(b, k) + channel, width * 4), std::memcpy(u, s.u.at(b, k) + channel, width * 4);
  for (int64_t i = 0; i < c.stride; i += W) {
    const V rate = load(w + i), decay = exp(-rate), x = decay - 1.0f;
    // -w - log(1 + x), of sums that last for more than a chunk
    const V rest = x * x * (0.5f - x * (1.0f / 3.0f - x * (0.25f - x * 0.2f))) - (rate + x);
    store(c.decay + i, decay), store(c.rest + i, absolute(x) < 1.0f / VECTOR_T ? rest : V{});
    store(c.own + i, exp(load(u + i)));
    c.plain[i] = plain && !any(rate * float(s.S) < -ORDINARY / 2);
  }
}

// Calls plain(integral_constant<int, VECTORS>, first channel) for plain sums among those abreast, `other` for others.
template <class N, class Plain, class Other>
LINESCAN_INLINE void either(const Channels& s, N n, int64_t at, const Plain& plain, const Other& other) {
  int count = 0;
  for (int l = 0; l < n(); ++l) count += s.plain[at + l * W] != 0.0f;
  if (count == n()) return plain(n, at);
  if (count == 0) return other(n, at);
  constexpr std::integral_constant<int, 1> one;
  for (int64_t c = at; c < at + n() * W; c += W) s.plain[c] != 0.0f ? plain(one, c) : other(one, c);
}

// The weights of the plain sums among those abreast.
template <class N>
LINESCAN_INLINE bool weigh_plain(const Channels& s, N n, int64_t at) {
  bool all = true;
  either(s, n, at, [&](auto n, int64_t at) { all &= weigh<n()>(s, at); }, [](auto, int64_t) {});
  return all;
}

// Calls f(first token, number) for all chunks, in the order of time or the other way.
template <class F>
static void through_time(int64_t tokens, bool back, const F& f) {
  const int64_t chunks = (tokens + VECTOR_T - 1) / VECTOR_T;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t chunk = back ? chunks - 1 - i : i, t0 = chunk * VECTOR_T;
    f(t0, tokens - t0 < VECTOR_T ? tokens - t0 : VECTOR_T);
  }
}

static void vector_forward(const Vectors& s, int64_t begin, int64_t end) {
  constexpr int64_t T = VECTOR_T;
  [[maybe_unused]] const FlushToZero flush;
  const bool gated = s.rule == VectorRule::gated, both = s.rule == VectorRule::wkv_both;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, marked = both ? s.S / T + 1 : 0;
  float *w, *u, *marks, *of_x, *of_g, *of_y;
  const auto place = [&](Arena arena, Channels& c) {
    c.w = w = arena.take(widest), c.u = u = arena.take(widest);
    of_x = arena.take(T * widest), of_g = arena.take(T * widest), of_y = arena.take(T * widest);
    c.state = arena.take(SUMS * widest), marks = arena.take(marked * SUMS * widest);
    if (both) c.future = arena.take(SUMS * T * widest);
    if (!gated) take_plain(arena, widest, c);
    return arena.used();
  };
  Channels c;
  Arena arena(place(Arena(), c));
  place(arena, c);
  c.tops = bool(s.state);
  int64_t reads[T], writes[T];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t per_sample = s.merge ? blocks : blocks * s.K, b = unit / per_sample, block = unit % blocks;
    const int64_t k0 = s.merge ? 0 : unit % per_sample / blocks, k1 = s.merge ? s.K : k0 + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    c.stride = (width + W - 1) / W * W;
    for (int64_t k = k0; k < k1; ++k) {
      if (!gated) set_rates(s, b, k, channel, width, !s.initial, w, u, c);
      enter(s, b, k, channel, width, c);
      const auto read = [&](int64_t t0, int64_t count) {
        c.count = count;
        s.route.steps(b, k, t0, count, reads, writes);
        read_rows(s.x, b, k, 0, channel, reads, count, width, c.stride, of_x, c.x);
        read_rows(s.g, b, k, 0, channel, reads, count, width, c.stride, of_g, c.g);
      };
      const auto future = [&](auto n, int64_t at, float* sums) {
        either(c, n, at, [&](auto n, int64_t at) { plain_sums<n()>(c, at, true, sums); },
               [&](auto n, int64_t at) { wkv_sums<n()>(c, at, true, sums, nullptr); });
      };
      float* const state = c.state;
      for (bool settled = !both; !settled;) {  // again, if some cannot be plain
        settled = true;
        through_time(s.S, true, [&](int64_t t0, int64_t count) {
          std::memcpy(marks + t0 / T * SUMS * c.stride, state, SUMS * c.stride * 4);
          read(t0, count);
          abreast(c.stride, [&](auto n, int64_t at) { settled &= weigh_plain(c, n, at), future(n, at, nullptr); });
        });
        empty_sums(c.stride, state);
      }
      const Target target = s.y.of_route(k);
      if (!target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      through_time(s.S, false, [&](int64_t t0, int64_t count) {
        read(t0, count);
        const bool left = write_rows(target, b, k, channel, writes, count, width, c.stride, of_y, c.y);
        abreast(c.stride, [&](auto n, int64_t at) {
          if (gated) return gated_sum<n(), false>(c, at);
          weigh_plain(c, n, at);
          if (both) c.state = marks + t0 / T * SUMS * c.stride, future(n, at, c.future), c.state = state;
          either(c, n, at, [&](auto n, int64_t at) { plain_means<n()>(c, at); },
                 [&](auto n, int64_t at) { wkv_means<n()>(c, at); });
        });
        if (left) scatter(target, b, k, channel, writes, count, width, c.stride, of_y);
      });
      for (int64_t i = 0; c.tops && !gated && i < c.stride; i += W) {  // relative to e^top
        if (c.plain[i] != 0.0f) leave_plain(c, i);
        float *a = c.state + i, *b = a + c.stride;
        const V factor = exp(-load(a + 3 * c.stride));
        store(a, load(a) * factor), store(b, load(b) * factor);
      }
      if (s.state) from_rows(c.state, width, s.numbers, c.stride, s.state.at(b, k) + channel * s.numbers, s.numbers);
    }
  }
}

static void vector_backward(const Vectors& s, int64_t begin, int64_t end) {
  constexpr int64_t T = VECTOR_T;
  [[maybe_unused]] const FlushToZero flush;
  const bool gated = s.rule == VectorRule::gated, both = s.rule == VectorRule::wkv_both;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, marked = s.S / T + 1;
  float *w, *u, *dtop, *kept, *marks, *of_x, *of_g, *of_y, *of_dx, *of_dg;
  const auto place = [&](Arena arena, Channels& c) {
    c.w = w = arena.take(widest), c.u = u = arena.take(widest), dtop = arena.take(widest);
    c.flow = arena.take(SUMS * widest), c.dw = arena.take(widest), c.du = arena.take(widest);
    of_x = arena.take(T * widest), of_g = arena.take(T * widest), of_y = arena.take(T * widest);
    of_dx = arena.take(T * widest), of_dg = arena.take(T * widest);
    c.state = arena.take(SUMS * widest), marks = arena.take(marked * SUMS * widest);
    c.sums = arena.take(SUMS * T * widest), c.steps = arena.take(2 * T * widest);
    kept = arena.take(2 * (gated || both ? s.S : T) * widest);
    if (both)
      c.future = arena.take(SUMS * T * widest), c.future_steps = arena.take(2 * T * widest),
      c.of_future = arena.take(2 * T * widest);
    if (!gated) take_plain(arena, widest, c);
    return arena.used();
  };
  Channels c;
  Arena arena(place(Arena(), c));
  place(arena, c);
  int64_t reads[T], writes[T];
  float* const state = c.state;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks;
    int64_t group, channel, width;
    s.blocks.locate(unit % blocks, group, channel, width);
    c.stride = (width + W - 1) / W * W;
    const auto across = [&](const auto& f) { abreast(c.stride, f); };
    for (int64_t k = 0; k < s.K; ++k) {
      const auto read = [&](int64_t t0, int64_t count, bool gradients) {
        c.count = count;
        s.route.steps(b, k, t0, count, reads, writes);
        read_rows(s.x, b, k, 0, channel, reads, count, width, c.stride, of_x, c.x);
        read_rows(s.g, b, k, 0, channel, reads, count, width, c.stride, of_g, c.g);
        if (gradients) read_rows(s.dy, b, k, 0, channel, writes, count, width, c.stride, of_y, c.dy);
      };
      // Calls f for the channels. dx and dg are added to if there is something in them, where they stand if they can.
      const auto write = [&](bool again, const auto& f) {
        const auto to = [&](const Target& target, float* buffer, float** at) {
          if (is_direct<W>(target.view, width)) {
            float* base = reinterpret_cast<float*>(target.view.at(b, k, 0, channel));
            point(base, target.view.token, reads, c.count, buffer, at);
            return target.of_route(k).add || again;
          }
          in_order(buffer, c.stride, c.count, at);
          zero(buffer, c.count * c.stride);
          return true;
        };
        const auto left = [&](Target target, const float* buffer) {
          if (is_direct<W>(target.view, width)) return;
          target = target.of_route(k), target.add |= again;
          scatter(target, b, k, channel, reads, c.count, width, c.stride, buffer);
        };
        c.add_x = to(s.dx, of_dx, c.dx), c.add_g = to(s.dg, of_dg, c.dg);
        across(f);
        left(s.dx, of_dx), left(s.dg, of_dg);
      };
      const auto mark = [&](int64_t t0) { return marks + t0 / T * SUMS * c.stride; };
      // What is kept of all tokens: all of gated sums, and of those on both sides the gradients of the first ones.
      const auto keep = [&](int64_t t0) {
        if (gated) c.sums = kept + t0 * c.stride, c.steps = kept + (s.S + t0) * c.stride;
        else c.of_sums = kept + (both ? 2 * t0 * c.stride : 0);
      };
      zero(c.flow, SUMS * c.stride), zero(c.dw, c.stride), zero(c.du, c.stride);
      if (s.dstate) to_rows(s.dstate.at(b, k) + channel * s.numbers, width, s.numbers, c.stride, c.flow);
      if (!gated) set_rates(s, b, k, channel, width, !s.initial && !s.dstate, w, u, c);
      c.dtop = s.dstate && !gated ? dtop : nullptr;

      // The states at the borders of chunks; of sums on both sides, those after. Again, if some cannot be plain.
      for (bool settled = false; !settled;) {
        settled = true;
        enter(s, b, k, channel, width, c);
        through_time(s.S, both, [&](int64_t t0, int64_t count) {
          std::memcpy(mark(t0), state, SUMS * c.stride * 4);
          read(t0, count, false), keep(t0);
          across([&](auto n, int64_t at) {
            if (gated) return gated_sum<n(), true>(c, at);
            settled &= weigh_plain(c, n, at);
            either(c, n, at, [&](auto n, int64_t at) { plain_sums<n()>(c, at, both, nullptr); },
                   [&](auto n, int64_t at) { wkv_sums<n()>(c, at, both, nullptr, nullptr); });
          });
        });
      }
      for (int64_t i = 0; c.dtop && i < c.stride; ++i) {  // of num, den and top to those of sums, and of what top was
        float *flow = c.flow + i, *last = state + i;
        const float factor = exp(splat(-last[3 * c.stride]))[0];
        flow[0] *= factor, flow[c.stride] *= factor;
        dtop[i] = flow[2 * c.stride] - flow[0] * last[0] - flow[c.stride] * last[c.stride];
      }
      if (both) {  // the gradients of the sums after, which run with time; those before take the marks' places
        empty_sums(c.stride, state);
        through_time(s.S, false, [&](int64_t t0, int64_t count) {
          read(t0, count, true), keep(t0);
          c.state = mark(t0);
          across([&](auto n, int64_t at) {
            weigh_plain(c, n, at);
            either(c, n, at, [&](auto n, int64_t at) { plain_sums<n()>(c, at, true, c.future); },
                   [&](auto n, int64_t at) { wkv_sums<n()>(c, at, true, c.future, c.future_steps); });
          });
          std::memcpy(c.state, state, SUMS * c.stride * 4);
          c.state = state;
          write(false, [&](auto n, int64_t at) {
            const auto plain = [&](auto n, int64_t at) {
              plain_means_adjoint<n()>(c, at), plain_sums_adjoint<n()>(c, at, false, c.future);
            };
            either(c, n, at, plain, [&](auto n, int64_t at) {
              wkv_means_adjoint<n()>(c, at);
              wkv_sums_adjoint<n()>(c, at, false, c.future, c.future_steps, c.of_future);
            });
          });
        });
        zero(c.flow, SUMS * c.stride);
      }
      through_time(s.S, true, [&](int64_t t0, int64_t count) {
        read(t0, count, !both), keep(t0);
        c.state = mark(t0);
        write(both, [&](auto n, int64_t at) {
          if (gated) return gated_sum_adjoint<n()>(c, at);
          weigh_plain(c, n, at);
          const auto plain = [&](auto n, int64_t at) {
            if (both) plain_sums<n()>(c, at, false, c.sums);
            else plain_means_adjoint<n()>(c, at);
            plain_sums_adjoint<n()>(c, at, true, c.sums);
          };
          either(c, n, at, plain, [&](auto n, int64_t at) {
            if (both) wkv_sums<n()>(c, at, false, c.sums, c.steps);
            else wkv_means_adjoint<n()>(c, at);
            wkv_sums_adjoint<n()>(c, at, true, c.sums, c.steps, c.of_sums);
          });
        });
      });
      c.state = state;

      if (s.dinitial) {
        enter(s, b, k, channel, width, c);
        for (int64_t i = 0; !gated && i < c.stride; ++i) {  // the other way
          float *flow = c.flow + i, *first = state + i;
          flow[2 * c.stride] = flow[0] * first[0] + flow[c.stride] * first[c.stride] + (c.dtop ? dtop[i] : 0.0f);
        }
        from_rows(c.flow, width, s.numbers, c.stride, s.dinitial.at(b, k) + channel * s.numbers, s.numbers);
      }
      if (!gated) {
        float* partial = s.partial + (b * s.K + k) * 2 * s.D + channel;
        std::memcpy(partial, c.dw, width * 4), std::memcpy(partial + s.D, c.du, width * 4);
      }
    }
  }
}
