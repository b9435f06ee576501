// The causal depthwise convolution along a route, for one instruction set. Included inside its namespace.
//
// Every unit slides over time, a chunk at a time, with the last W - 1 inputs of its channels in front. Rows are reached
// through pointers, into the tensors where these hold float32, else into copies, as in the selective scan.

constexpr int CONV_T = 64;

// f(t, c, sum) for every pack of vectors of every token, with sum = bias + sum over j of weight[j] * x[t + j]; the rows of x begin
// `taps` - 1 before the first token.
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
    const int64_t per_sample = s.merge ? blocks : blocks * s.K, b = unit / per_sample, block = unit % blocks;
    const int64_t first_route = s.merge ? 0 : unit % per_sample / blocks, last_route = s.merge ? s.K : first_route + 1;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    const int64_t stride = (width + W - 1) / W * W;
    for (int64_t k = first_route; k < last_route; ++k) {
      to_rows(s.weight.at(b, k) + channel * s.W, width, s.W, stride, weight);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      if (s.initial) to_rows(s.initial.at(b, k) + channel * past, width, past, stride, before);
      else zero(before, past * stride);
      const Target target = s.y.of_route(k);
      if (!target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = 0; t0 < s.S; t0 += T) {
        const int64_t count = s.S - t0 < T ? s.S - t0 : T;
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
        for (int64_t j = 0; j < past; ++j)
          if (x[count + j] != before + j * stride) std::memcpy(before + j * stride, x[count + j], stride * 4);
      }
      from_rows(before, width, past, stride, s.state.at(b, k) + channel * past, past);
    }
  }
}

static void conv_backward(const Conv& s, int64_t begin, int64_t end) {
  constexpr int T = CONV_T;
  const int64_t blocks = s.blocks.count(), stride = (s.blocks.width + W - 1) / W * W, past = s.W - 1;
  const int64_t chunks = (s.S + T - 1) / T, long_rows = (past + T) * stride;
  Arena arena(2 * Arena::rounded(long_rows) + Arena::rounded(T * stride) + 2 * Arena::rounded(s.W * stride) +
              3 * Arena::rounded(past * stride) + 2 * Arena::rounded(stride));
  float *x = arena.take(long_rows), *grad = arena.take(long_rows), *dx = arena.take(T * stride),
        *weight = arena.take(s.W * stride), *dweight = arena.take(s.W * stride), *initial = arena.take(past * stride),
        *dstate = arena.take(past * stride), *dinitial = arena.take(past * stride), *bias = arena.take(stride),
        *dbias = arena.take(stride);
  zero(x, long_rows), zero(dx, T * stride), zero(weight, s.W * stride), zero(bias, stride);
  int64_t reads[T], writes[T], before[T];
  std::vector<float*> rows(past + T);
  in_order(x, stride, past + T, rows.data());

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, block = unit % blocks;
    int64_t group, channel, width;
    s.blocks.locate(block, group, channel, width);
    for (int64_t k = 0; k < s.K; ++k) {
      to_rows(s.weight.at(b, k) + channel * s.W, width, s.W, stride, weight);
      if (s.bias) std::memcpy(bias, s.bias.at(b, k) + channel, width * 4);
      zero(initial, past * stride), zero(dstate, past * stride), zero(dinitial, past * stride);
      if (s.initial) to_rows(s.initial.at(b, k) + channel * past, width, past, stride, initial);
      if (s.dstate) to_rows(s.dstate.at(b, k) + channel * past, width, past, stride, dstate);
      zero(dweight, s.W * stride), zero(dbias, stride), zero(grad, long_rows);
      // grad holds the gradients before SiLU of a chunk, followed by the first W - 1 of the chunk after it.
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * T, count = s.S - t0 < T ? s.S - t0 : T;
        if (chunk < chunks - 1) std::memmove(grad + count * stride, grad, past * stride * 4);
        for (int64_t i = 0; i < past; ++i) {
          const int64_t t = t0 - past + i;
          float* row = x + i * stride;
          if (t < 0) {
            std::memcpy(row, initial + (t + past) * stride, stride * 4);
          } else {
            s.route.steps(b, k, t, 1, before, writes);
            gather(s.x, b, k, 0, channel, before, 1, width, stride, row);
          }
        }
        s.route.steps(b, k, t0, count, reads, writes);
        gather(s.x, b, k, 0, channel, reads, count, width, stride, x + past * stride);
        gather(s.dy, b, k, 0, channel, writes, count, width, stride, grad);
        if (s.silu) {
          convolve(count, stride, s.W, rows.data(), weight, bias, [&](int64_t t, int64_t c, auto v) {
            float* row = grad + t * stride + c;
            const auto open = sigmoid(v);
            store(row, load<decltype(v)>(row) * open * (1.0f + v * (1.0f - open)));
          });
        }
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
      for (int64_t i = 0; i < past; ++i) {  // the inputs before the first token: outputs 0 .. i saw input i
        const int64_t kept = i - s.S;
        for (int64_t c = 0; c < stride; c += W) {
          V sum = kept >= 0 ? load(dstate + kept * stride + c) : V{};
          for (int64_t t = 0; t <= i && t < s.S; ++t)
            sum += load(grad + t * stride + c) * load(weight + (i - t) * stride + c);
          store(dinitial + i * stride + c, sum);
        }
      }
      if (s.dinitial) from_rows(dinitial, width, past, stride, s.dinitial.at(b, k) + channel * past, past);
      float* partial = s.partial + ((b * s.K + k) * s.D + channel) * (s.W + 1);
      from_rows(dweight, width, s.W, stride, partial, s.W + 1);
      from_rows(dbias, width, 1, stride, partial + s.W, s.W + 1);
    }
  }
}
