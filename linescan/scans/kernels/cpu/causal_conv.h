// The causal depthwise convolution along a route, for one instruction set. Included inside its namespace.
//
// Every unit slides over a slab of time, a chunk at a time, with the W - 1 inputs before it in front. Rows are reached
// through pointers, into the tensors where these hold float32, else into copies, as in the selective scan.

constexpr int CONV_T = 64;

// f(t, c, sum) for every pack of vectors of every token, with sum = bias + sum over j of weight[j] * x[t + j]; the rows
// of x begin `taps` - 1 before the first token.
template <class F>
LINESCAN_INLINE void convolve(int64_t count, int64_t stride, int64_t taps, float* const* x,
                              const float* __restrict weight, const float* __restrict bias, F f) {
  for (int64_t t = 0; t < count; ++t) {
    packs(stride, [&](auto zero, int64_t c) LINESCAN_STAGE {
      using T = decltype(zero);
      fetch_ahead(x, t, count + taps - 1, c, sizeof(T));
      T sum = load<T>(bias + c);
      for (int64_t j = 0; j < taps; ++j) sum = sum + load<T>(x[t + j] + c) * load<T>(weight + j * stride + c);
      f(t, c, sum);
    });
  }
}

// (channels, taps) of weights or states as rows over channels, and back.
static void to_rows(const float* x, int64_t channels, int64_t taps, int64_t stride, float* out) {
  for (int64_t j = 0; j < taps; ++j)
    for (int64_t c = 0; c < channels; ++c) out[j * stride + c] = x[c * taps + j];
}
static void from_rows(const float* x, int64_t channels, int64_t taps, int64_t stride, float* out, int64_t pitch) {
  for (int64_t j = 0; j < taps; ++j)
    for (int64_t c = 0; c < channels; ++c) out[c * pitch + j] = x[j * stride + c];
}

// The inputs before token t of a route as rows over channels: taps - 1 of them, the first ones from the initial state.
static void inputs_before(const Conv& s, int64_t b, int64_t k, int64_t channel, int64_t width, int64_t stride, int64_t t,
                          float* out) {
  const int64_t past = s.W - 1, first = t < past ? t : past;  // how many of them are tokens
  if (first < past) {
    if (s.initial) to_rows(s.initial.at(b, k) + channel * past, width, past, stride, out);
    else zero(out, past * stride);
    std::memmove(out, out + t * stride, (past - first) * stride * 4);
  }
  for (int64_t i = past - first; i < past; ++i) {
    int64_t reads, writes;
    s.route.steps(b, k, t - past + i, 1, &reads, &writes);
    gather(s.x, b, k, 0, channel, &reads, 1, width, stride, out + i * stride);
  }
}

static void conv_forward(const Conv& s, int64_t begin, int64_t end) {
  constexpr int T = CONV_T;
  const int64_t blocks = s.blocks.count(), widest = (s.blocks.width + W - 1) / W * W, past = s.W - 1;
  Arena arena(2 * Arena::rounded(T * widest) + Arena::rounded(past * widest) + Arena::rounded(s.W * widest) +
              Arena::rounded(widest));
  float *of_x = arena.take(T * widest), *of_y = arena.take(T * widest), *before = arena.take(past * widest),
        *weight = arena.take(s.W * widest), *bias = arena.take(widest);
  zero(before, past * widest), zero(weight, s.W * widest), zero(bias, widest);
  int64_t reads[T], writes[T];
  std::vector<float*> rows(past + T);
  float **x = rows.data(), *y[T];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % blocks, slab = unit / blocks % s.slabs(), sample = unit / blocks / s.slabs();
    const int64_t b = s.merge ? sample : sample / s.K;
    const int64_t first_route = s.merge ? 0 : sample % s.K, last_route = s.merge ? s.K : first_route + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t stride = (width + W - 1) / W * W, last = s.end_of(slab);
    for (int64_t k = first_route; k < last_route; ++k) {
      to_rows(s.weight.at(b, k) + channel * s.W, width, s.W, stride, weight);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      const Target target = s.y.of_route(k);
      if (!target.add && slab == 0) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = slab * s.slab; t0 < last; t0 += T) {
        const int64_t count = last - t0 < T ? last - t0 : T;
        inputs_before(s, b, k, channel, width, stride, t0, before);
        s.route.steps(b, k, t0, count, reads, writes);
        in_order(before, stride, past, x);
        read_rows(s.x, b, k, 0, channel, reads, count, width, stride, of_x, x + past);
        const bool left = write_rows(target, b, k, channel, writes, count, width, stride, of_y, y);
        const auto silu = [&](int64_t t, int64_t c, auto v) {
          fetch_ahead(y, t, count, c, sizeof v);
          store(y[t] + c, v * sigmoid(v));
        };
        const auto plain = [&](int64_t t, int64_t c, auto v) { store(y[t] + c, v); };
        if (!s.silu) convolve(count, stride, s.W, x, weight, bias, plain);
        else if (s.W == 4) convolve(count, stride, 4, x, weight, bias, silu);
        else convolve(count, stride, s.W, x, weight, bias, silu);
        if (left) scatter(target, b, k, channel, writes, count, width, stride, of_y);
      }
      if (last < s.S) continue;
      inputs_before(s, b, k, channel, width, stride, s.S, before);
      from_rows(before, width, past, stride, s.state.at(b, k) + channel * past, past);
    }
  }
}

static void conv_backward(const Conv& s, int64_t begin, int64_t end) {
  constexpr int T = CONV_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, past = s.W - 1;
  const int64_t long_rows = (past + (past < T ? T : past)) * stride;
  Arena arena(2 * Arena::rounded(long_rows) + Arena::rounded(T * stride) + 2 * Arena::rounded(s.W * stride) +
              2 * Arena::rounded(past * stride) + 2 * Arena::rounded(stride));
  float *x = arena.take(long_rows), *grad = arena.take(long_rows), *dx = arena.take(T * stride),
        *weight = arena.take(s.W * stride), *dweight = arena.take(s.W * stride), *dstate = arena.take(past * stride),
        *dinitial = arena.take(past * stride), *bias = arena.take(stride), *dbias = arena.take(stride);
  zero(x, long_rows), zero(dx, T * stride), zero(weight, s.W * stride), zero(bias, stride);
  std::vector<int64_t> steps(2 * (past + T));
  int64_t *reads = steps.data(), *writes = reads + past + T;
  std::vector<float*> rows(long_rows / stride);
  in_order(x, stride, rows.size(), rows.data());

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % blocks, slab = unit / blocks % s.slabs(), b = unit / blocks / s.slabs();
    const int64_t first = slab * s.slab, last = s.end_of(slab);
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    for (int64_t k = 0; k < s.K; ++k) {
      to_rows(s.weight.at(b, k) + channel * s.W, width, s.W, stride, weight);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      zero(dstate, past * stride), zero(dinitial, past * stride);
      if (s.dstate) to_rows(s.dstate.at(b, k) + channel * past, width, past, stride, dstate);
      zero(dweight, s.W * stride), zero(dbias, stride), zero(grad, long_rows);
      // The inputs of tokens, with those before them in front, and the gradients before SiLU.
      const auto gradients = [&](int64_t t0, int64_t count) {
        inputs_before(s, b, k, channel, width, stride, t0, x);
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.x, b, k, 0, channel, reads, count, width, stride, x + past * stride);
        gather(s.dy, b, k, 0, channel, writes, count, width, stride, grad);
        if (!s.silu) return;
        convolve(count, stride, s.W, rows.data(), weight, bias, [&](int64_t t, int64_t c, auto v) {
          float* row = grad + t * stride + c;
          const auto open = sigmoid(v);
          store(row, load<decltype(v)>(row) * open * (1.0f + v * (1.0f - open)));
        });
      };
      // grad holds those of a chunk, followed by the first W - 1 of what comes after it, which may be another unit's.
      if (last < s.S) gradients(last, s.S - last < past ? s.S - last : past);
      for (int64_t t0 = first + (last - first - 1) / T * T; t0 >= first; t0 -= T) {
        const int64_t count = last - t0 < T ? last - t0 : T;
        std::memmove(grad + count * stride, grad, past * stride * 4);
        gradients(t0, count);
        for (int64_t c = 0; c < stride; c += W) {
          V sum = load(dbias + c);
          for (int64_t t = 0; t < count; ++t) sum += load(grad + t * stride + c);
          store(dbias + c, sum);
          for (int64_t j = 0; j < s.W; ++j) {
            V tap = load(dweight + j * stride + c);
            for (int64_t t = 0; t < count; ++t) tap += load(grad + t * stride + c) * load(x + (t + j) * stride + c);
            store(dweight + j * stride + c, tap);
          }
          for (int64_t t = 0; t < count; ++t) {
            // Token t stands in the final state too if it is among the last W - 1.
            const int64_t kept = t0 + t - (s.S - past);
            V sum = kept >= 0 ? load(dstate + kept * stride + c) : V{};
            for (int64_t j = 0; j < s.W; ++j)
              sum += load(grad + (t + past - j) * stride + c) * load(weight + j * stride + c);
            store(dx + t * stride + c, sum);
          }
        }
        scatter(s.dx.of_route(k), b, k, channel, reads, count, width, stride, dx);
      }
      for (int64_t i = 0; i < past && slab == 0; ++i) {  // the inputs before the first token: outputs 0 .. i saw input i
        const int64_t kept = i - s.S;
        for (int64_t c = 0; c < stride; c += W) {
          V sum = kept >= 0 ? load(dstate + kept * stride + c) : V{};
          for (int64_t t = 0; t <= i && t < s.S; ++t)
            sum += load(grad + t * stride + c) * load(weight + (i - t) * stride + c);
          store(dinitial + i * stride + c, sum);
        }
      }
      if (s.dinitial && slab == 0) from_rows(dinitial, width, past, stride, s.dinitial.at(b, k) + channel * past, past);
      float* partial = s.partial + ((b * s.K + k) * s.slabs() + slab) * (s.W + 1) * s.D + channel;
      for (int64_t j = 0; j < s.W; ++j) std::memcpy(partial + j * s.D, dweight + j * stride, width * 4);
      std::memcpy(partial + s.W * s.D, dbias, width * 4);
    }
  }
}
