// What tokens go through between products and recurrences: blends with neighbours, norms and rotations, for one set.
// Included inside its namespace, after merge.h; hence no include guard.

// Channels [begin, end) of a token, blended with those of a neighbour, once for every mix: into rows `pitch` apart.
LINESCAN_INLINE void blend_channels(const Blend& s, const float* token, const float* near, float* out, int64_t pitch,
                                    int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / W * W;
  const float *from = s.own ? near : token, *to = s.own ? token : near;
  for (int64_t c = begin; c < whole; c += W) {
    const V start = load(from + c), step = load(to + c) - start;
    for (int64_t k = 0; k < s.K; ++k) {
      float* at = out + k * pitch + c;
      const V mix = s.added ? load(s.mix + k * s.C + c) + load(at) : load(s.mix + k * s.C + c);
      store(at, start + step * mix);
    }
  }
  for (int64_t c = whole; c < end; ++c)
    for (int64_t k = 0; k < s.K; ++k) {
      float* at = out + k * pitch + c;
      *at = from[c] + (to[c] - from[c]) * (s.mix[k * s.C + c] + (s.added ? *at : 0.0f));
    }
}

// Tokens blended with their neighbours on a grid: the channels of a head in five groups, whose neighbours are those on the
// left, on the right, above, below, and the token itself. Beyond the grid is zero. A unit is a token.
static void shift_blend(const Blend& s, int64_t begin, int64_t end) {
  const int64_t channels = s.C / s.heads, step = s.pixels * s.C, row_step = step * s.breadth;
  Arena arena(Arena::rounded(s.C) + Arena::rounded(s.K * s.C));
  float *const nothing = arena.take(s.C), *const buffer = arena.take(s.K * s.C);
  zero(nothing, s.C);
  const bool direct = is_direct<1>(s.out, s.C);
  const int64_t pitch = direct ? s.out.route : s.C, start = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit % s.L, row = t / s.breadth, column = t % s.breadth;
    const int64_t at = unit * s.C;
    const float* token = s.x + at;
    float* out = direct ? reinterpret_cast<float*>(s.out.at(0, 0, 0, at)) : buffer;
    for (int64_t k = 0; k < s.K && s.added && !direct; ++k)
      gather(s.out, 0, k, 0, at, &start, 1, s.C, s.C, buffer + k * s.C);
    const float* near[] = {
        column >= s.pixels ? token - step : nothing,
        column + s.pixels < s.breadth ? token + step : nothing,
        row >= s.pixels ? token - row_step : nothing,
        row + s.pixels < s.height ? token + row_step : nothing,
        token,
    };
    const bool on_grid = row < s.height;  // class tokens come last
    for (int64_t first = 0; first < s.C; first += channels)
      for (int i = 0; i < 5; ++i)
        blend_channels(s, token, on_grid ? near[i] : token, out, pitch, first + s.ends[i], first + s.ends[i + 1]);
    for (int64_t k = 0; k < s.K && !direct; ++k) scatter({s.out}, 0, k, at, &start, 1, s.C, s.C, buffer + k * s.C);
  }
}

// (x - mean) / deviation * weight + bias in every group of channels, times silu(gate). A unit is a row.
template <bool CENTRED, bool GATED>
static void norm_rows(const Norm& s, int64_t begin, int64_t end) {
  constexpr int ROWS = 8;  // groups of channels at a time
  const int64_t D = s.channels, groups = s.C / D;
  Arena arena(3 * Arena::rounded(ROWS * D));
  float *of_x = arena.take(ROWS * D), *of_gate = arena.take(ROWS * D), *of_out = arena.take(ROWS * D);
  int64_t numbers[ROWS];
  for (int64_t first = begin * groups, last = end * groups; first < last; first += ROWS) {
    const int64_t count = last - first < ROWS ? last - first : ROWS;
    as_stored(first, count, numbers);
    const auto rows = [&](const View& view, float* buffer, bool read) {
      if (is_direct<1>(view, D)) return reinterpret_cast<float*>(view.at(0, 0, 0, first * D));
      if (read) gather(view, 0, 0, 0, 0, numbers, count, D, D, buffer);
      return buffer;
    };
    const float *x = rows(s.x, of_x, true), *gate = GATED ? rows(s.gate, of_gate, true) : nullptr;
    float* y = rows(s.out, of_out, false);
    for (int64_t t = 0; t < count; ++t, x += D, y += D, gate += GATED ? D : 0) {
      const int64_t channel = (first + t) % groups * D;
      const float *weight = s.weight + channel, *bias = CENTRED ? s.bias + channel : nullptr;
      const auto mean_of = [&](auto f) LINESCAN_STAGE { return over_row(D, f) * (1.0f / D); };
      const float mean = CENTRED ? mean_of([&](int64_t c) LINESCAN_STAGE { return load(x + c); }) : 0.0f;
      const auto centred = [&](int64_t c) LINESCAN_STAGE { return CENTRED ? load(x + c) - mean : load(x + c); };
      // The mean is rounded: what is left has one, too, which counts where a row stands far from zero.
      const float rest = CENTRED ? mean_of(centred) : 0.0f;
      const float square = mean_of([&](int64_t c) LINESCAN_STAGE { return centred(c) * centred(c); });
      const float variance = square > rest * rest ? square - rest * rest : 0.0f, scale = 1.0f / std::sqrt(variance + s.eps);
      for (int64_t c = 0; c < D; c += W) {
        V normed = (centred(c) - rest) * scale * load(weight + c);
        if constexpr (CENTRED) normed += load(bias + c);
        if constexpr (GATED) {
          const V open = load(gate + c);
          normed *= open * sigmoid(open);
        }
        store(y + c, normed);
      }
    }
    if (!is_direct<1>(s.out, D)) scatter({s.out}, 0, 0, 0, numbers, count, D, D, of_out);
  }
}
static void norm(const Norm& s, int64_t begin, int64_t end) {
  if (s.bias && s.gate) norm_rows<true, true>(s, begin, end);
  else if (s.bias) norm_rows<true, false>(s, begin, end);
  else if (s.gate) norm_rows<false, true>(s, begin, end);
  else norm_rows<false, false>(s, begin, end);
}

// (a, b) -> (a cos - b sin, b cos + a sin). A unit is a row.
template <int... LANE>
LINESCAN_INLINE V turned(V x, V cos, V sin, std::integer_sequence<int, LANE...>) {
  return x * cos + shuffle<(LANE ^ 1)...>(x, x) * (sin * V{(LANE % 2 ? 1.0f : -1.0f)...});
}
static void rotate(const Rotation& s, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t at = unit % s.L * s.channels;
    for (int64_t head = 0; head < s.C; head += s.channels)
      for (int64_t c = 0; c < s.channels; c += W) {
        const V cos = load(s.cos + at + c), sin = load(s.sin + at + c);
        store(s.out + unit * s.C + head + c,
              turned(load(s.x + unit * s.pitch + head + c), cos, sin, std::make_integer_sequence<int, W>()));
      }
  }
}
