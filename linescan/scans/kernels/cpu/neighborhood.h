// Neighbourhood attention for one instruction set. Included inside its namespace.
//
// A unit of work takes a strip of neighbouring columns down a band of rows, of one head. The keys that the strip reaches
// in a row of the map stand side by side in lanes, channel by channel. So the products of a query with all of them are
// sums of whole vectors, and a key outside of its window is cut off afterwards. Rows of keys and values are brought in
// once, and make room for others when the windows have passed them.

constexpr int KEY_VECTORS = W == 16 ? 6 : 4, VALUE_VECTORS = W == 16 ? 3 : 2;  // that two queries meet in registers

// The first key in the window of the p-th of `size` positions.
LINESCAN_INLINE int64_t window_start(int64_t p, int64_t window, int64_t size) {
  const int64_t start = p - window / 2, last = size - window;
  return start < 0 ? 0 : start < last ? start : last;
}

// f(integral_constant<int, count>), which is MOST at most.
template <int MOST, class F>
LINESCAN_INLINE void with_constant(int64_t count, const F& f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_constant<MOST - 1>(count, f);
  f(std::integral_constant<int, MOST>());
}

// Calls f(integral_constant<int, n>, first) for `count` vectors, in parts of nearly the same size n up to MOST.
template <int MOST, class F>
LINESCAN_INLINE void in_parts(int64_t count, const F& f) {
  const int64_t parts = (count + MOST - 1) / MOST;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = count * i / parts;
    with_constant<MOST>(count * (i + 1) / parts - first, [&](auto n) LINESCAN_STAGE { f(n, first); });
  }
}

// f over all lanes, in each lane.
template <int STRIDE, int... LANE>
LINESCAN_INLINE V swapped(V x, std::integer_sequence<int, LANE...>) { return shuffle<(LANE ^ STRIDE)...>(x, x); }
template <int STRIDE = W / 2, class F>
LINESCAN_INLINE V over_lanes(V x, const F& f) {
  x = f(x, swapped<STRIDE>(x, std::make_integer_sequence<int, W>()));
  if constexpr (STRIDE > 1) return over_lanes<STRIDE / 2>(x, f);
  else return x;
}

// Two queries with VECTORS vectors of keys, `pitch` apart, of which there are W numbers for each channel.
template <int VECTORS>
__attribute__((noinline)) static void products(const float* a, const float* b, int64_t channels, const float* keys,
                                               int64_t pitch, float* of_a, float* of_b) {
  V sums[2][VECTORS];
  each<VECTORS>([&](auto j) LINESCAN_STAGE { sums[0][j] = sums[1][j] = V{}; });
  for (int64_t c = 0; c < channels; ++c, keys += W) {
    const V x = splat(a[c]), y = splat(b[c]);
    each<VECTORS>([&](auto j) LINESCAN_STAGE {
      const V key = load(keys + j * pitch);
      sums[0][j] += x * key, sums[1][j] += y * key;
    });
  }
  each<VECTORS>([&](auto j) LINESCAN_STAGE { store(of_a + j * W, sums[0][j]), store(of_b + j * W, sums[1][j]); });
}

// Logits and their bias, which has a row for each row of keys, to exponentials relative to the largest. `cut` is 0 in the
// window and negative outside, where what comes out is 0; its exponential would be a denormal number, which takes long.
// Returns 1 over the sum.
__attribute__((noinline)) static V exponentials(float* logits, int64_t rows, int64_t span, const float* const* bias,
                                                int64_t shift, const float* cut) {
  V most = splat(-__builtin_inff()), sum = V{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < span; c += W) {
      float* at = logits + row * span + c;
      const V outside = load(cut + c), x = load(at) + load(bias[row] + shift + c);
      store(at, x);
      most = at_least(outside < 0.0f ? outside : x, most);
    }
  most = over_lanes(most, [](V x, V y) LINESCAN_STAGE { return at_least(x, y); });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < span; c += W) {
      float* at = logits + row * span + c;
      const V outside = load(cut + c), x = exp(outside < 0.0f ? V{} : load(at) - most);
      const V kept = outside < 0.0f ? V{} : x;
      store(at, kept);
      sum += kept;
    }
  return splat(1.0f) / over_lanes(sum, [](V x, V y) LINESCAN_STAGE { return x + y; });
}

// A query of a pair: its weights of the span's keys, where its window begins there, and where its output goes.
struct Reader {
  const float* weights;
  int64_t start;
  V scale;
  float* out;
};

// What two queries read, the second one's window beginning no earlier than the first one's, in VECTORS vectors of the
// values. Keys that both see are loaded once.
template <int VECTORS>
__attribute__((noinline)) static void read_values(const Reader& a, const Reader& b, int64_t rows, int64_t window,
                                                  int64_t span, const float* values, int64_t width) {
  V sums[2][2][VECTORS];
  each<VECTORS>([&](auto l) LINESCAN_STAGE { sums[0][0][l] = sums[0][1][l] = sums[1][0][l] = sums[1][1][l] = V{}; });
  const auto alone = [&](int which, float weight, const float* row) LINESCAN_STAGE {
    each<VECTORS>([&](auto l) LINESCAN_STAGE { sums[which][0][l] += splat(weight) * load(row + l * W); });
  };
  for (int64_t row = 0; row < rows; ++row, values += span * width) {
    const float *of_a = a.weights + row * span, *of_b = b.weights + row * span;
    const int64_t both = a.start + window;
    const auto shared = [&](int turn, int64_t key) LINESCAN_STAGE {
      const V x = splat(of_a[key]), y = splat(of_b[key]);
      each<VECTORS>([&](auto l) LINESCAN_STAGE {
        const V value = load(values + key * width + l * W);
        sums[0][turn][l] += x * value, sums[1][turn][l] += y * value;
      });
    };
    int64_t key = a.start;
    for (; key < b.start; ++key) alone(0, of_a[key], values + key * width);
    for (; key + 2 <= both; key += 2) shared(0, key), shared(1, key + 1);
    for (; key < both; ++key) shared(0, key);
    for (; key < b.start + window; ++key) alone(1, of_b[key], values + key * width);
  }
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    store(a.out + l * W, (sums[0][0][l] + sums[0][1][l]) * a.scale);
    store(b.out + l * W, (sums[1][0][l] + sums[1][1][l]) * b.scale);
  });
}

static void neighborhood_forward(const Neighborhood& s, int64_t begin, int64_t end) {
  const int64_t rows = s.window[0], window = s.window[1], span = s.span, vectors = span / W, tile = span - window + 1;
  const int64_t depth = (s.D + W - 1) / W * W, width = (s.M + W - 1) / W * W;
  const int64_t table = 2 * window - 1 + 2 * span;  // a row of the bias, with room on either side
  float *keys, *values, *raw, *queries, *outputs, *logits[2], *biases, *cuts;
  const auto place = [&](Arena arena) {
    keys = arena.take(rows * span * depth), values = arena.take(rows * span * width), raw = arena.take(span * depth);
    queries = arena.take(tile * depth), outputs = arena.take(tile * width);
    for (float*& of_query : logits) of_query = arena.take(rows * span);
    biases = arena.take((2 * rows - 1) * table), cuts = arena.take(2 * span + window);
    return arena.used();
  };
  Arena arena(place(Arena()));
  place(arena);
  std::vector<const float*> bias(rows);
  std::vector<int64_t> tokens(span);
  zero(biases, (2 * rows - 1) * table);
  for (int64_t i = 0; i < 2 * span + window; ++i)
    cuts[i] = i < span || i >= span + window ? -__builtin_inff() : 0.0f;

  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t rest = unit;
    const auto next = [&](int64_t count) {
      const int64_t at = rest % count;
      rest /= count;
      return at;
    };
    const int64_t band = next(s.bands), strip = next(s.strips), y0 = next(s.dilation[0]), x0 = next(s.dilation[1]);
    const int64_t head = next(s.heads), b = rest;
    // Of the positions that stand `dilation` apart, those from (y0, x0) on.
    const int64_t height = (s.height - y0 + s.dilation[0] - 1) / s.dilation[0];
    const int64_t breadth = (s.breadth - x0 + s.dilation[1] - 1) / s.dilation[1];
    const int64_t left = breadth * strip / s.strips, count = breadth * (strip + 1) / s.strips - left;
    const int64_t top = height * band / s.bands, bottom = height * (band + 1) / s.bands;
    const int64_t reach = window_start(left, window, breadth);  // the first key of the span
    const auto find = [&](int64_t row, int64_t first, int64_t number) {
      for (int64_t i = 0; i < number; ++i) {
        const int64_t column = first + i;
        tokens[i] = column < breadth ? (y0 + row * s.dilation[0]) * s.breadth + x0 + column * s.dilation[1] : -1;
      }
    };
    if (count == 0) continue;
    if (s.bias)
      for (int64_t i = 0; i < 2 * rows - 1; ++i)
        std::memcpy(biases + i * table + span, s.bias.at(0, head) + i * (2 * window - 1), (2 * window - 1) * 4);

    int64_t loaded = window_start(top, rows, height);  // rows of keys and values, each in its place modulo `rows`
    for (int64_t row = top; row < bottom; ++row) {
      const int64_t start = window_start(row, rows, height);
      for (; loaded < start + rows; ++loaded) {
        find(loaded, reach, span);
        float* to = keys + loaded % rows * span * depth;
        gather(s.k, b, 0, head, 0, tokens.data(), span, s.D, depth, raw);
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t c = 0; c < depth; c += W)
            transpose(raw + v * W * depth + c, depth, s.scale, to + (v * depth + c) * W, W);
        gather(s.v, b, 0, head, 0, tokens.data(), span, s.M, width, values + loaded % rows * span * width);
      }
      for (int64_t i = 0; i < rows; ++i)
        bias[(start + i) % rows] = biases + (start + i - row + rows - 1) * table + span + window - 1;
      find(row, left, count);
      gather(s.q, b, 0, head, 0, tokens.data(), count, s.D, depth, queries);
      for (int64_t i = 0; i < count; i += 2) {
        const int64_t pair[2] = {i, i + 1 < count ? i + 1 : i};
        in_parts<KEY_VECTORS>(rows * vectors, [&](auto n, int64_t first) LINESCAN_STAGE {
          products<n()>(queries + pair[0] * depth, queries + pair[1] * depth, s.D, keys + first * depth * W, depth * W,
                        logits[0] + first * W, logits[1] + first * W);
        });
        Reader readers[2];
        for (int which = 0; which < 2; ++which) {
          const int64_t x = left + pair[which], offset = window_start(x, window, breadth) - reach;
          float* own = logits[which];
          const V scale = exponentials(own, rows, span, bias.data(), reach - x, cuts + span - offset);
          readers[which] = {own, offset, scale, outputs + pair[which] * width};
        }
        in_parts<VALUE_VECTORS>(width / W, [&](auto n, int64_t first) LINESCAN_STAGE {
          Reader a = readers[0], z = readers[1];
          a.out += first * W, z.out += first * W;
          read_values<n()>(a, z, rows, window, span, values + first * W, width);
        });
      }
      scatter(s.y, b, 0, head * s.M, tokens.data(), count, s.M, width, outputs);
    }
  }
}
