// Vectors of W floats for one instruction set, and the functions of one variable that the kernels need.
// Included once by each instruction set, inside its namespace, after LINESCAN_WIDTH is set; hence no include guard.

constexpr int W = LINESCAN_WIDTH;
typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

#define LINESCAN_INLINE static inline __attribute__((always_inline))

LINESCAN_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
LINESCAN_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
LINESCAN_INLINE V splat(float x) { return x - V{}; }

// The compiler turns these two forms into one instruction; a NaN in x stays.
LINESCAN_INLINE V at_least(V x, V low) { return x < low ? low : x; }
LINESCAN_INLINE V at_most(V x, V high) { return x > high ? high : x; }

// 2^(n + r) for r in [-1/2, 1/2] and an integer n that was rounded by adding `magic`, which leaves it in the low bits.
// The polynomial is the relative minimax fit with constant term 1: at most 1 unit in the last place off.
constexpr float MAGIC = 0x1.8p23f, LOG2E = 0x1.715476p0f, LN2 = 0x1.62e430p-1f;

LINESCAN_INLINE V power_of_two(V n, V r) {
  V p = r * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  return (V)((I)p + ((I)n << 23));
}

// 2^x, within [2^-126, 2^128).
LINESCAN_INLINE V exp2(V x) {
  x = at_most(at_least(x, splat(-126.0f)), splat(0x1.fffffep6f));
  const V n = x + MAGIC;
  return power_of_two(n, x - (n - MAGIC));
}

// e^x, within the range of normal numbers. ln 2 is subtracted in two parts; the first has so few bits that its product
// with n is exact, so that large |x| lose nothing.
LINESCAN_INLINE V exp(V x) {
  x = at_most(at_least(x, splat(-87.3f)), splat(88.72f));
  const V n = x * LOG2E + MAGIC, whole = n - MAGIC;
  const V r = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  return power_of_two(n, r * LOG2E);
}

LINESCAN_INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }

LINESCAN_INLINE V sigmoid(V x) {
  const V e = exp(-absolute(x));
  return (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
}

// log(1 + e^x) = max(x, 0) + log1p(e) with e = e^-|x|, and log1p(e) = 2 atanh(s) with s = e / (2 + e) in (0, 1/3].
// Also hands out the derivative, the sigmoid of x, which costs one division more where it is used.
LINESCAN_INLINE V softplus(V x, V* slope = nullptr) {
  const V e = exp(-absolute(x));
  const V s = e / (e + 2.0f);
  const V z = s * s;
  V p = z * 0.24289558827877045f + 0.21430739760398865f;
  p = p * z + 0.2861659824848175f;
  p = p * z + 0.39998888969421387f;
  p = p * z + 0.6666667461395264f;
  p = p * z + 2.0f;
  if (slope) *slope = (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
  return at_least(x, V{}) + p * s;
}

// Sums of W vectors at once: lane i of the result is the sum over the lanes of x[i].
template <int STRIDE, int... LANE>
LINESCAN_INLINE V pairwise(V a, V b, std::integer_sequence<int, LANE...>) {
  constexpr auto pick = [](int lane, int offset) {
    const int inner = lane % (2 * STRIDE), base = lane - inner;
    return (inner < STRIDE ? base + inner : W + base + inner - STRIDE) + offset;
  };
  return __builtin_shufflevector(a, b, pick(LANE, 0)...) + __builtin_shufflevector(a, b, pick(LANE, STRIDE)...);
}
template <int COUNT>
LINESCAN_INLINE V lane_sums(const float* x) {  // of vectors x[0], x[W / COUNT], ...
  if constexpr (COUNT == 1) {
    return load(x);
  } else {
    // Vectors that differ in the lowest bit of their index meet first.
    constexpr int HALF = COUNT / 2;
    const V a = lane_sums<HALF>(x), b = lane_sums<HALF>(x + HALF * W);
    return pairwise<HALF>(a, b, std::make_integer_sequence<int, W>());
  }
}

// -- rows of tokens to and from float32 --------------------------------------------------------------------------------

LINESCAN_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
LINESCAN_INLINE uint16_t to_bfloat16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
LINESCAN_INLINE float from_float16(uint16_t x) {
  // Exponent and mantissa moved up, then scaled by a power of two, which is exact for denormals as well.
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13, scale_bits = 0x77800000;
  float f, scale;
  __builtin_memcpy(&f, &magnitude, 4);
  __builtin_memcpy(&scale, &scale_bits, 4);
  f *= scale;
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits;
  bits |= uint32_t(x & 0x8000) << 16;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
LINESCAN_INLINE uint16_t to_float16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 1/2 makes the float unit round at the right bit.
  float small, half = 0.5f;
  __builtin_memcpy(&small, &bits, 4);
  small += half;
  uint32_t denormal;
  __builtin_memcpy(&denormal, &small, 4);
  denormal -= 0x3f000000;
  const uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  uint32_t result = bits < 0x38800000 ? denormal : normal;
  result = bits >= 0x47800000 ? 0x7c00 : result;
  result = bits > 0x7f800000 ? 0x7e00 : result;
  return uint16_t(result | sign);
}

// Rows of `width` channels into out[row * stride], filled up with zeros; a row with a negative token is zero.
static void gather(const View& x, int64_t b, int64_t k, int64_t g, int64_t channel, const int64_t* token, int64_t rows,
                   int64_t width, int64_t stride, float* __restrict out) {
  const char* base = x.at(b, k, g, channel);
  for (int64_t t = 0; t < rows; ++t) {
    float* __restrict row = out + t * stride;
    for (int64_t c = width; c < stride; ++c) row[c] = 0.0f;
    if (token[t] < 0) {
      for (int64_t c = 0; c < width; ++c) row[c] = 0.0f;
    } else if (x.dtype == Dtype::float32) {
      const float* __restrict p = reinterpret_cast<const float*>(base) + token[t] * x.token;
      for (int64_t c = 0; c < width; ++c) row[c] = p[c];
    } else {
      const uint16_t* __restrict p = reinterpret_cast<const uint16_t*>(base) + token[t] * x.token;
      if (x.dtype == Dtype::bfloat16) {
        for (int64_t c = 0; c < width; ++c) row[c] = from_bfloat16(p[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) row[c] = from_float16(p[c]);
      }
    }
  }
}

// The way back; rows with a negative token are dropped.
static void scatter(const Target& target, int64_t b, int64_t k, int64_t channel, const int64_t* token, int64_t rows,
                    int64_t width, int64_t stride, const float* __restrict in) {
  const View& y = target.view;
  char* base = y.at(b, k, 0, channel);
  for (int64_t t = 0; t < rows; ++t) {
    const float* __restrict row = in + t * stride;
    if (token[t] < 0) continue;
    if (y.dtype == Dtype::float32) {
      float* __restrict p = reinterpret_cast<float*>(base) + token[t] * y.token;
      if (target.add) {
        for (int64_t c = 0; c < width; ++c) p[c] += row[c];
      } else {
        for (int64_t c = 0; c < width; ++c) p[c] = row[c];
      }
    } else {
      uint16_t* __restrict p = reinterpret_cast<uint16_t*>(base) + token[t] * y.token;
      if (y.dtype == Dtype::bfloat16) {
        for (int64_t c = 0; c < width; ++c) p[c] = to_bfloat16(row[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) p[c] = to_float16(row[c]);
      }
    }
  }
}

// (channels, n) of a parameter or state to vectors over channels, out[(c / W * n + i) * W + c % W], and back.
static void to_lanes(const float* x, int64_t channels, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n * W; ++i) out[channels / W * n * W + i] = 0.0f;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[(c / W * n + i) * W + c % W] = x[c * n + i] * scale;
}
static void from_lanes(const float* x, int64_t channels, int64_t n, float* out) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[c * n + i] = x[(c / W * n + i) * W + c % W];
}
LINESCAN_INLINE void zero(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}
