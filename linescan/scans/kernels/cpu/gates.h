// What recurrences are given, made of projections of the tokens in one pass over memory: functions of numbers side by side,
// or of heads. Included inside the namespace of an instruction set; hence no include guard.

// e^x - 1 of an x <= 0: near 0 the series, elsewhere there is nothing to lose.
LINESCAN_INLINE V exp_less_one(V x) {
  V p = x * (1.0f / 5040) + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  return x > -0.35f ? p * (x * x) + x : exp(x) - 1.0f;
}

// The sigmoid and its derivative, which has all its digits on both sides.
LINESCAN_INLINE V sigmoid(V x, V& slope) {
  const V e = exp(-absolute(x)), inverse = quotient(splat(1.0f), e + 1.0f);
  slope = e * inverse * inverse;
  return x < 0.0f ? e * inverse : inverse;
}

// The first n lanes; the others are zero. All lanes without a number.
LINESCAN_INLINE V load(const float* p, int64_t n) {
  float lanes[W] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
LINESCAN_INLINE void store(float* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
struct AllLanes {};
LINESCAN_INLINE V load(const float* p, AllLanes) { return load(p); }
LINESCAN_INLINE void store(float* p, V v, AllLanes) { store(p, v); }

// Calls f(channel, lanes) for all vectors of a row.
template <class F>
LINESCAN_INLINE void along(int64_t D, const F& f) {
  int64_t c = 0;
  for (; c + W <= D; c += W) f(c, AllLanes());
  if (c < D) f(c, D - c);
}

// -- functions of numbers -----------------------------------------------------------------------------------------------

// y of x, and the gradients of x from those of y; `c` is a factor, `p` a parameter of the channel.
struct LogSigmoid {  // c log sigmoid(x)
  static constexpr int IN = 1, OUT = 1;
  static constexpr bool PARAMETER = false;
  LINESCAN_STAGE static void forward(float c, const V* x, V, V* y) { y[0] = -c * softplus(-x[0]); }
  LINESCAN_STAGE static void backward(float c, const V* x, V, const V* dy, V* dx, V&) { dx[0] = c * sigmoid(-x[0]) * dy[0]; }
};
struct Sigmoid {  // c sigmoid(x)
  static constexpr int IN = 1, OUT = 1;
  static constexpr bool PARAMETER = false;
  LINESCAN_STAGE static void forward(float c, const V* x, V, V* y) { y[0] = c * sigmoid(x[0]); }
  LINESCAN_STAGE static void backward(float c, const V* x, V, const V* dy, V* dx, V&) {
    V slope;
    sigmoid(x[0], slope);
    dx[0] = c * slope * dy[0];
  }
};
struct Exponential {  // c e^x, of an x of 20 at most
  static constexpr int IN = 1, OUT = 1;
  static constexpr bool PARAMETER = false;
  static constexpr float MOST = 20.0f;
  LINESCAN_STAGE static void forward(float c, const V* x, V, V* y) { y[0] = c * exp(at_most(x[0], splat(MOST))); }
  LINESCAN_STAGE static void backward(float c, const V* x, V, const V* dy, V* dx, V&) {
    dx[0] = x[0] > MOST ? V{} : c * exp(x[0]) * dy[0];
  }
};
struct Forget {  // sigmoid(-x) and log sigmoid(x)
  static constexpr int IN = 1, OUT = 2;
  static constexpr bool PARAMETER = false;
  LINESCAN_STAGE static void forward(float, const V* x, V, V* y) { y[1] = -softplus(-x[0], &y[0]); }
  LINESCAN_STAGE static void backward(float, const V* x, V, const V* dy, V* dx, V&) {
    V slope;
    const V forgotten = sigmoid(-x[0], slope);
    dx[0] = forgotten * dy[1] - slope * dy[0];
  }
};
struct Share {  // sigmoid(x2) of x0 and of x1
  static constexpr int IN = 3, OUT = 2;
  static constexpr bool PARAMETER = false;
  LINESCAN_STAGE static void forward(float, const V* x, V, V* y) {
    const V share = sigmoid(x[2]);
    y[0] = share * x[0], y[1] = share * x[1];
  }
  LINESCAN_STAGE static void backward(float, const V* x, V, const V* dy, V* dx, V&) {
    V slope;
    const V share = sigmoid(x[2], slope);
    dx[0] = share * dy[0], dx[1] = share * dy[1], dx[2] = slope * (x[0] * dy[0] + x[1] * dy[1]);
  }
};
struct OfBlend {  // (1 - e^g) x0 and g = c log sigmoid(x1)
  static constexpr int IN = 2, OUT = 2;
  static constexpr bool PARAMETER = false;
  LINESCAN_STAGE static void forward(float c, const V* x, V, V* y) {
    y[1] = -c * softplus(-x[1]), y[0] = -exp_less_one(y[1]) * x[0];
  }
  LINESCAN_STAGE static void backward(float c, const V* x, V, const V* dy, V* dx, V&) {
    V slope;
    const V taken = -exp_less_one(-c * softplus(-x[1], &slope));
    dx[0] = taken * dy[0], dx[1] = c * slope * (dy[1] - (1.0f - taken) * (x[0] * dy[0]));
  }
};
struct LinearUnit {  // sqrt(1 - e^2g) sigmoid(x1) x0 and g = p sigmoid(x2); c is the largest derivative of the root
  static constexpr int IN = 3, OUT = 2;
  static constexpr bool PARAMETER = true;
  LINESCAN_STAGE static void forward(float, const V* x, V p, V* y) {
    y[1] = p * sigmoid(x[2]);
    y[0] = root(-exp_less_one(2.0f * y[1])) * sigmoid(x[1]) * x[0];
  }
  LINESCAN_STAGE static void backward(float c, const V* x, V p, const V* dy, V* dx, V& dp) {
    V of_input, of_decay;
    const V input = sigmoid(x[1], of_input), decay = sigmoid(x[2], of_decay);
    const V rest = -exp_less_one(2.0f * p * decay), factor = root(rest);
    const V steep = factor > 0.5f / c ? 0.5f / factor : splat(c);
    const V of_factor = dy[0] * input * x[0], of_g = dy[1] - 2.0f * of_factor * steep * (1.0f - rest);
    dx[0] = dy[0] * factor * input, dx[1] = dy[0] * factor * x[0] * of_input, dx[2] = of_g * p * of_decay;
    dp += of_g * decay;
  }
};

// -- functions of heads -------------------------------------------------------------------------------------------------

constexpr float SHORTEST = 1e-12f;  // what a row is divided by, at least

// One over the length of a row, at least SHORTEST, in all lanes.
LINESCAN_INLINE V inverse_length(const float* x, int64_t n) {
  V squares = {};
  along(n, [&](int64_t c, auto lanes) LINESCAN_STAGE {
    const V v = load(x + c, lanes);
    squares += v * v;
  });
  return 1.0f / at_least(root(total_in_lanes(squares)), splat(SHORTEST));
}

// x / |x|; or with a `strength` minus that, and strength x / |x|.
LINESCAN_INLINE void unit(const float* x, const float* strength, int64_t n, float* a, float* b) {
  const V inverse = inverse_length(x, n);
  along(n, [&](int64_t c, auto lanes) LINESCAN_STAGE {
    const V v = load(x + c, lanes) * inverse;
    store(a + c, strength ? -v : v, lanes);
    if (strength) store(b + c, *strength * v, lanes);
  });
}
LINESCAN_INLINE void unit_adjoint(const float* x, const float* strength, int64_t n, const float* da, const float* db,
                                  bool add, float* dx, float* dstrength) {
  const V inverse = inverse_length(x, n);
  const auto of_unit = [&](int64_t c, auto lanes) LINESCAN_STAGE {
    const V of_a = load(da + c, lanes);
    return strength ? *strength * load(db + c, lanes) - of_a : of_a;
  };
  V inside = {}, of_strength = {};
  along(n, [&](int64_t c, auto lanes) LINESCAN_STAGE {
    const V v = load(x + c, lanes) * inverse;
    inside += of_unit(c, lanes) * v;
    if (strength) of_strength += load(db + c, lanes) * v;
  });
  inside = inverse[0] * SHORTEST < 1.0f ? total_in_lanes(inside) : V{};
  along(n, [&](int64_t c, auto lanes) LINESCAN_STAGE {
    const V of_x = inverse * (of_unit(c, lanes) - inside * (load(x + c, lanes) * inverse));
    store(dx + c, add ? load(dx + c, lanes) + of_x : of_x, lanes);
  });
  if (strength) *dstrength = (add ? *dstrength : 0.0f) + total(of_strength);
}

// -- units of work ------------------------------------------------------------------------------------------------------

constexpr int64_t LATER = 4;  // tokens from which on rows are called from memory

// A row of floats, and how far away the one is that is called from memory meanwhile.
struct Row {
  float* data = nullptr;
  int64_t later = 0;

  LINESCAN_STAGE V read(int64_t c, AllLanes lanes) const {
    __builtin_prefetch(data + c + later);
    return load(data + c, lanes);
  }
  LINESCAN_STAGE V read(int64_t c, int64_t lanes) const { return load(data + c, lanes); }
  LINESCAN_STAGE void write(int64_t c, V v, AllLanes lanes) const {
    __builtin_prefetch(data + c + later, 1);
    store(data + c, v, lanes);
  }
  LINESCAN_STAGE void write(int64_t c, V v, int64_t lanes) const { store(data + c, v, lanes); }
};

// Calls f(route, place of a row in a view) for the tokens of a unit, routes innermost.
template <class F>
LINESCAN_INLINE void over_rows(const Gates& s, int64_t unit, const F& f) {
  const int64_t slabs = s.slabs(), b = unit / slabs, t0 = unit % slabs * s.SLAB;
  for (int64_t t = t0; t < s.L && t < t0 + s.SLAB; ++t) {
    const int64_t ahead = s.L - 1 - t < LATER ? s.L - 1 - t : LATER;
    for (int64_t k = 0; k < s.K; ++k)
      f(k, [&](const View& x) LINESCAN_STAGE {
        return Row{reinterpret_cast<float*>(x.at(b, k, 0, 0)) + t * x.token, ahead * x.token};
      });
  }
}

template <class F>
static void gates_of_numbers(const Gates& s, int64_t unit) {
  const int64_t D = s.D;
  const float factor = s.factor, *parameter = s.parameter;
  over_rows(s, unit, [&](int64_t, const auto& at) LINESCAN_STAGE {
    Row in[F::IN], out[F::OUT];
    for (int i = 0; i < F::IN; ++i) in[i] = at(s.in[i]);
    for (int i = 0; i < F::OUT; ++i) out[i] = at(s.out[i]);
    along(D, [&](int64_t c, auto lanes) LINESCAN_STAGE {
      V x[F::IN], y[F::OUT], p = {};
      each<F::IN>([&](auto i) LINESCAN_STAGE { x[i] = in[i].read(c, lanes); });
      if (F::PARAMETER) p = load(parameter + c, lanes);
      F::forward(factor, x, p, y);
      each<F::OUT>([&](auto i) LINESCAN_STAGE { out[i].write(c, y[i], lanes); });
    });
  });
}

template <class F>
static void adjoint_of_numbers(const Gates& s, int64_t unit) {
  const int64_t D = s.D;
  const float factor = s.factor, *parameter = s.parameter;
  float* const partial = F::PARAMETER ? s.partial + unit * D : nullptr;
  if (F::PARAMETER) zero(partial, D);
  over_rows(s, unit, [&](int64_t k, const auto& at) LINESCAN_STAGE {
    Row in[F::IN], grad[F::OUT], of_in[F::IN];
    bool add[F::IN];
    for (int i = 0; i < F::IN; ++i)
      in[i] = at(s.in[i]), of_in[i] = at(s.of_in[i].view), add[i] = s.of_in[i].shared && k > 0;
    for (int i = 0; i < F::OUT; ++i) grad[i] = at(s.out[i]);
    along(D, [&](int64_t c, auto lanes) LINESCAN_STAGE {
      V x[F::IN], dy[F::OUT], dx[F::IN], p = {}, dp = {};
      each<F::IN>([&](auto i) LINESCAN_STAGE { x[i] = in[i].read(c, lanes); });
      each<F::OUT>([&](auto i) LINESCAN_STAGE { dy[i] = grad[i].read(c, lanes); });
      if (F::PARAMETER) p = load(parameter + c, lanes), dp = load(partial + c, lanes);
      F::backward(factor, x, p, dy, dx, dp);
      each<F::IN>([&](auto i) LINESCAN_STAGE {
        of_in[i].write(c, add[i] ? load(of_in[i].data + c, lanes) + dx[i] : dx[i], lanes);
      });
      if (F::PARAMETER) store(partial + c, dp, lanes);
    });
  });
}

static void gates_of_heads(const Gates& s, int64_t unit_of_work, bool back) {
  const bool erase = s.gate == Gate::erase;
  over_rows(s, unit_of_work, [&](int64_t k, const auto& at) LINESCAN_STAGE {
    const Row x = at(s.in[0]), a = at(s.out[0]), dx = back ? at(s.of_in[0].view) : Row();
    const float* strength = erase ? at(s.in[1]).data : nullptr;
    float *b = erase ? at(s.out[1]).data : nullptr, *dstrength = back && erase ? at(s.of_in[1].view).data : nullptr;
    for (int64_t h = 0, c = 0; c < s.D; ++h, c += s.head) {
      const float* of_head = erase ? strength + h : nullptr;
      float *const b_at = erase ? b + c : nullptr, *const of_strength = dstrength ? dstrength + h : nullptr;
      if (back)
        unit_adjoint(x.data + c, of_head, s.head, a.data + c, b_at, s.of_in[0].shared && k > 0, dx.data + c, of_strength);
      else unit(x.data + c, of_head, s.head, a.data + c, b_at);
    }
  });
}

template <class F>
static void gates_as(const Gates& s, int64_t unit, bool back) {
  if (back) adjoint_of_numbers<F>(s, unit);
  else gates_of_numbers<F>(s, unit);
}

static void gates(const Gates& s, bool back, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (s.gate == Gate::log_sigmoid) gates_as<LogSigmoid>(s, i, back);
    else if (s.gate == Gate::sigmoid) gates_as<Sigmoid>(s, i, back);
    else if (s.gate == Gate::exponential) gates_as<Exponential>(s, i, back);
    else if (s.gate == Gate::forget) gates_as<Forget>(s, i, back);
    else if (s.gate == Gate::share) gates_as<Share>(s, i, back);
    else if (s.gate == Gate::blend) gates_as<OfBlend>(s, i, back);
    else if (s.gate == Gate::linear_unit) gates_as<LinearUnit>(s, i, back);
    else gates_of_heads(s, i, back);
  }
}
