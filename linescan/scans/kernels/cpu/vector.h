// Vectors of W floats for one instruction set, and the functions of one variable that the kernels need.
// Included once by each instruction set, inside its namespace, after LINESCAN_WIDTH is set; hence no include guard.

constexpr int W = LINESCAN_WIDTH;
typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

#define LINESCAN_INLINE static inline __attribute__((always_inline))
#define LINESCAN_STAGE __attribute__((always_inline))

LINESCAN_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
LINESCAN_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
LINESCAN_INLINE V splat(float x) { return x - V{}; }

// While it lives, results below float32's normal numbers are 0: where they come up, as in what decays, every operation on
// them takes an x86 processor as long as a hundred others. Inputs are read as they are.
class FlushToZero {
#if defined(LINESCAN_X86)
 public:
  FlushToZero() { _mm_setcsr(before_ | 0x8000); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// max(low, x) and min(high, x) where a NaN in x stays.
LINESCAN_INLINE V at_least(V x, V low) {
#if LINESCAN_WIDTH == 16
  return _mm512_max_ps(low, x);
#elif LINESCAN_WIDTH == 8
  return _mm256_max_ps(low, x);
#elif defined(LINESCAN_X86)
  return _mm_max_ps(low, x);
#else
  return x < low ? low : x;
#endif
}
LINESCAN_INLINE V at_most(V x, V high) {
#if LINESCAN_WIDTH == 16
  return _mm512_min_ps(high, x);
#elif LINESCAN_WIDTH == 8
  return _mm256_min_ps(high, x);
#elif defined(LINESCAN_X86)
  return _mm_min_ps(high, x);
#else
  return x > high ? high : x;
#endif
}

LINESCAN_INLINE V root(V x) {
#if LINESCAN_WIDTH == 16
  return _mm512_sqrt_ps(x);
#elif LINESCAN_WIDTH == 8
  return _mm256_sqrt_ps(x);
#elif defined(LINESCAN_X86)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// -- functions of one variable, of vectors and packs --------------------------------------------------------------------

// N vectors that go through a function side by side, an operation at a time. The functions below are chains of two dozen
// dependent instructions, and a processor looks ahead over two or three such chains only.
template <int N>
struct Pack {
  V of[N];
};
constexpr int PACK = W == 16 ? 4 : 2;  // for 32 vector registers, or 16

template <class F, int... I>
LINESCAN_INLINE Pack<sizeof...(I)> pack_of(const F& f, std::integer_sequence<int, I...>) { return {{f(I)...}}; }
template <int N, class F>
LINESCAN_INLINE Pack<N> pack(const F& f) { return pack_of(f, std::make_integer_sequence<int, N>()); }
LINESCAN_INLINE V one_of(V x, int) { return x; }
template <int N>
LINESCAN_INLINE V one_of(const Pack<N>& x, int i) { return x.of[i]; }

#define LINESCAN_PACK_OPERATOR(OPERATOR)                                                            \
  template <int N>                                                                                  \
  LINESCAN_INLINE Pack<N> operator OPERATOR(const Pack<N>& a, const Pack<N>& b) {                   \
    return pack<N>([&](int i) LINESCAN_STAGE { return a.of[i] OPERATOR b.of[i]; });                 \
  }                                                                                                 \
  template <int N>                                                                                  \
  LINESCAN_INLINE Pack<N> operator OPERATOR(const Pack<N>& a, float b) {                            \
    return pack<N>([&](int i) LINESCAN_STAGE { return a.of[i] OPERATOR b; });                       \
  }                                                                                                 \
  template <int N>                                                                                  \
  LINESCAN_INLINE Pack<N> operator OPERATOR(float a, const Pack<N>& b) {                            \
    return pack<N>([&](int i) LINESCAN_STAGE { return a OPERATOR b.of[i]; });                       \
  }
LINESCAN_PACK_OPERATOR(+)
LINESCAN_PACK_OPERATOR(-)
LINESCAN_PACK_OPERATOR(*)

// Lets a function of vectors have a pack as its first argument.
#define LINESCAN_PACK_FUNCTION(NAME)                                                                \
  template <int N, class... More>                                                                   \
  LINESCAN_INLINE Pack<N> NAME(const Pack<N>& x, const More&... more) {                             \
    return pack<N>([&](int i) LINESCAN_STAGE { return NAME(x.of[i], one_of(more, i)...); });        \
  }
LINESCAN_PACK_FUNCTION(at_least)
LINESCAN_PACK_FUNCTION(at_most)

template <class T>
LINESCAN_INLINE T load(const float* p) {
  return pack<sizeof(T) / sizeof(V)>([&](int i) LINESCAN_STAGE { return load(p + i * W); });
}
template <int N>
LINESCAN_INLINE void store(float* p, const Pack<N>& x) {
  for (int i = 0; i < N; ++i) store(p + i * W, x.of[i]);
}

// Calls f(zero, channel), `zero` being of a pack's type, until all of `stride` channels are covered.
template <class F>
LINESCAN_INLINE void packs(int64_t stride, const F& f) {
  int64_t c = 0;
  for (; c + PACK * W <= stride; c += PACK * W) f(Pack<PACK>{}, c);
  for (; c < stride; c += W) f(Pack<1>{}, c);
}

// Powers of two. `sum` is x + MAGIC: the addition rounds x to a multiple n of 1 / STEPS and leaves n in the low bits.
// The rest r is small enough for a polynomial (the relative minimax fit with constant term 1), the power of n is an
// exponent and, with 16 lanes, one of 16 numbers in a register. At most 1 unit in the last place off.
constexpr float LOG2E = 0x1.715476p0f, LN2 = 0x1.62e430p-1f;

#if LINESCAN_WIDTH == 16
constexpr float MAGIC = 0x1.8p19f, LOWEST = -150.0f, HIGHEST = 130.0f;

LINESCAN_INLINE V root_of_two(V sum) {  // to the power of the sixteenths of n
  const V sixteenths = {0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
                        0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
                        0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                        0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};
  return _mm512_permutexvar_ps((__m512i)sum, sixteenths);
}
LINESCAN_INLINE V scaled(V p, V n) { return _mm512_scalef_ps(p, n); }
LINESCAN_PACK_FUNCTION(root_of_two)
LINESCAN_PACK_FUNCTION(scaled)

template <class T>
LINESCAN_INLINE T power_of_two(T sum, T r) {
  const T power = root_of_two(sum);
  T p = r * 0x1.c6ac6ap-5f + 0x1.ebfff4p-3f;
  p = p * r + 0x1.62e430p-1f;
  return scaled(p * (r * power) + power, sum - MAGIC);
}
#else
constexpr float MAGIC = 0x1.8p23f, LOWEST = -126.0f, HIGHEST = 0x1.fffffep6f;

LINESCAN_INLINE V scaled(V p, V sum) { return (V)((I)p + ((I)sum << 23)); }
LINESCAN_PACK_FUNCTION(scaled)

template <class T>
LINESCAN_INLINE T power_of_two(T sum, T r) {
  T p = r * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  return scaled(p, sum);
}
#endif

// n log(2) is subtracted in two parts; the first has so few bits that its product with n is exact.
template <class T>
LINESCAN_INLINE T exp_of_ordinary(T x) {  // from log(2^LOWEST) to log(2^HIGHEST)
  const T sum = x * LOG2E + MAGIC, n = sum - MAGIC;
  const T r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  return power_of_two(sum, r * LOG2E);
}
template <class T>
LINESCAN_INLINE T exp(T x) {
  return exp_of_ordinary(at_most(at_least(x, splat(LOWEST * LN2)), splat(HIGHEST * LN2)));
}

LINESCAN_INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }
LINESCAN_INLINE V minus_absolute(V x) { return (V)((I)x | INT32_MIN); }
LINESCAN_INLINE V if_negative(V x, V then, V otherwise) { return x < 0.0f ? then : otherwise; }
LINESCAN_PACK_FUNCTION(minus_absolute)
LINESCAN_PACK_FUNCTION(if_negative)
LINESCAN_INLINE bool any(I lanes) {  // of a comparison
  int some = 0;
  for (int i = 0; i < W; ++i) some |= lanes[i];
  return some;
}

// x / y for a y of ordinary size. A division keeps AVX-512's units busy for as long as a dozen products: here an estimate
// of 14 bits is made exact by the remainders of 1 / y and of the quotient.
#if LINESCAN_WIDTH == 16
LINESCAN_INLINE V inverse_estimate(V x) { return _mm512_rcp14_ps(x); }
LINESCAN_PACK_FUNCTION(inverse_estimate)

template <class T>
LINESCAN_INLINE T quotient(T x, T y) {
  T inverse = inverse_estimate(y);
  inverse = inverse + inverse * (1.0f - y * inverse);
  const T q = x * inverse;
  return q + inverse * (x - y * q);
}
#else
LINESCAN_INLINE V quotient(V x, V y) { return x / y; }
LINESCAN_PACK_FUNCTION(quotient)
#endif

template <class T>
LINESCAN_INLINE T sigmoid(T x) {
  const T e = exp(minus_absolute(x));
  return quotient(if_negative(x, e, splat(1.0f)), e + 1.0f);
}

// log(1 + e^x) = max(x, 0) + log1p(e) with e = e^-|x|, and log1p(e) = 2 atanh(s) with s = e / (2 + e) in (0, 1/3].
// Also hands out the derivative, the sigmoid of x, which costs one division more where it is used.
template <class T>
LINESCAN_INLINE T softplus(T x, T* slope = nullptr) {
  const T e = exp(minus_absolute(x));
  const T s = quotient(e, e + 2.0f);
  const T z = s * s;
  T p = z * 0.24289558827877045f + 0.21430739760398865f;
  p = p * z + 0.2861659824848175f;
  p = p * z + 0.39998888969421387f;
  p = p * z + 0.6666667461395264f;
  p = p * z + 2.0f;
  if (slope) *slope = quotient(if_negative(x, e, splat(1.0f)), e + 1.0f);
  return at_least(x, V{}) + p * s;
}

// -- chains of instructions, staggered ----------------------------------------------------------------------------------

// Every state of a scan is a chain of a dozen dependent instructions. A processor looks ahead over a few such chains only
// and would wait for their results a quarter of the time, so that they are put in a better order here: `staggered` calls
// stage(0) to stage(COUNT - 1) of each of its stages, and while one chain is in its first stage, the one before it is in
// the second, and so on.
template <int COUNT, int SLOT, int STAGE, class F, class... Later>
LINESCAN_INLINE void stages_of_slot(const F& stage, const Later&... later) {
  if constexpr (sizeof...(Later) > 0) stages_of_slot<COUNT, SLOT, STAGE + 1>(later...);
  if constexpr (SLOT >= STAGE && SLOT - STAGE < COUNT) stage(SLOT - STAGE);
}
template <int COUNT, int SLOT = 0, class... F>
LINESCAN_INLINE void staggered(const F&... stages) {
  stages_of_slot<COUNT, SLOT, 0>(stages...);
  if constexpr (SLOT + 2 < COUNT + int(sizeof...(F))) staggered<COUNT, SLOT + 1>(stages...);
}

// For the functions that use it: keeps GCC from an order of its own.
#if defined(__GNUC__) && !defined(__clang__)
#define LINESCAN_IN_ORDER __attribute__((noinline, optimize("no-schedule-insns2")))
#else
#define LINESCAN_IN_ORDER __attribute__((noinline))
#endif

// Keeps a value where it stands in that order, and apart from the arithmetic around it.
LINESCAN_INLINE void pin(V& x) {
#if defined(LINESCAN_X86)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#endif
}

// Makes the compiler load what p points to each time it is used: kept in registers, it drives the states out of them.
LINESCAN_INLINE void reload(const float* __restrict& p) { asm volatile("" : "+r"(p)); }

// 2^x y + z in stages. As `power_of_two`, but the coefficient of r^3 is taken into the table of powers: what is left is
// ONE + r ((r + SHIFT)^2 + SQUARE), one multiplication less and one addition more, for which processors have units of
// their own. The coefficient is chosen among those that fit such that all entries of the table are almost float32 numbers
// and the first one times ONE is 1: a state whose step is 0 stays as it is. The product is off by 1.5e-7 at most, of which
// the correctly rounded power, multiplied in float32, would have 1.2e-7.
struct Power {
#if LINESCAN_WIDTH == 4
  V x;

  void LINESCAN_STAGE start(V exponent) { x = exponent; }
  void LINESCAN_STAGE round() { x = at_most(at_least(x, splat(LOWEST)), splat(HIGHEST)); }
  void LINESCAN_STAGE split() {}
  void LINESCAN_STAGE times(V y) {
    const V sum = x + MAGIC;
    x = power_of_two(sum, x - (sum - MAGIC)) * y;
  }
  V LINESCAN_STAGE product() const { return x; }
  V LINESCAN_STAGE plus(V z) const { return x + z; }
#else
  V x, sum, power, rest;

  void LINESCAN_STAGE start(V exponent) {
    x = exponent;
    pin(x);
  }

#if LINESCAN_WIDTH == 16
  static constexpr float ONE = 0x1.18f778p+4f, SHIFT = 0x1.0de848p+1f, SQUARE = 0x1.ee6f9ap+2f;

  // Rounds down to sixteenths, so that the integer part is that of x itself. An infinite x leaves no rest.
  void LINESCAN_STAGE round() {
    sum = _mm512_add_round_ps(x, splat(MAGIC), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    pin(sum);
  }
  void LINESCAN_STAGE split() {
    const V sixteenths = {0x1.d280f4p-5f, 0x1.e72858p-5f, 0x1.fcb9d6p-5f, 0x1.099fe4p-4f,
                          0x1.156280p-4f, 0x1.21aa68p-4f, 0x1.2e7d80p-4f, 0x1.3be1f4p-4f,
                          0x1.49de32p-4f, 0x1.5878f2p-4f, 0x1.67b93ap-4f, 0x1.77a65ep-4f,
                          0x1.884804p-4f, 0x1.99a62ap-4f, 0x1.abc92ap-4f, 0x1.beb9bap-4f};
    power = _mm512_permutexvar_ps((__m512i)sum, sixteenths);
    pin(power);
    rest = _mm512_reduce_ps(x, 4 << 4 | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    pin(rest);
  }
  V LINESCAN_STAGE scaled() const { return _mm512_scalef_ps(power, x); }
#else
  static constexpr float GRID = 0x1.8p20f, ONE = 0x1.1f7dbep+4f, SHIFT = 0x1.144a9ap+1f, SQUARE = 0x1.f2e740p+2f;

  void LINESCAN_STAGE round() {
    x = at_most(at_least(x, splat(-120.0f)), splat(HIGHEST));
    sum = x + GRID;
    pin(sum);
  }
  void LINESCAN_STAGE split() {
    // Less the three low bits of `sum`, which its shift brings into the exponent with the others.
    const I eighths = {0x3d63f553, 0x3d68971d, 0x3d678b79, 0x3d63d00b,
                       0x3d6130dc, 0x3d5fc7a6, 0x3d5fb077, 0x3d6109e7};
    power = _mm256_permutevar8x32_ps((V)eighths, (__m256i)sum);
    pin(power);
    rest = sum - GRID;
    pin(rest);
    rest = x - rest;
    pin(rest);
  }
  V LINESCAN_STAGE scaled() const { return (V)((I)power + ((I)sum << 20)); }
#endif

  void LINESCAN_STAGE times(V y) {
    power = scaled();
    pin(power);
    sum = rest + SHIFT;
    pin(sum);
    sum = sum * sum + SQUARE;
    pin(sum);
    power *= y;
    pin(power);
    sum = sum * rest + ONE;
    pin(sum);
  }
  V LINESCAN_STAGE product() const { return power * sum; }
  V LINESCAN_STAGE plus(V z) const { return power * sum + z; }
#endif
};

// e^x in fewer instructions than `exp` has, for an x that is not far above 0: off by 2e-7 of 1 at most, and 1 for 0.
LINESCAN_INLINE V exp_of_less(V x) {
  Power power;
  power.start(x * LOG2E);
  power.round(), power.split(), power.times(splat(1.0f));
  return power.product();
}

// Lanes picked out of a and b, numbered through; GCC has clang's function since version 12.
template <int... LANE>
LINESCAN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, LANE...);
#else
  return __builtin_shuffle(a, b, I{LANE...});
#endif
}

// Sums of W vectors at once: lane i of the result is the sum over the lanes of x[i].
template <int STRIDE, int... LANE>
LINESCAN_INLINE V pairwise(V a, V b, std::integer_sequence<int, LANE...>) {
  const V own = shuffle<(LANE & STRIDE ? W + LANE : LANE)...>(a, b);
  const V other = shuffle<(LANE & STRIDE ? LANE : W + LANE)...>(a, b);
  return own + shuffle<(LANE ^ STRIDE)...>(other, other);
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

LINESCAN_INLINE void zero(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
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

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
LINESCAN_INLINE float widen(float x) { return x; }
LINESCAN_INLINE float widen(BFloat16 x) { return from_bfloat16(x.bits); }
LINESCAN_INLINE float widen(Float16 x) { return from_float16(x.bits); }
LINESCAN_INLINE void narrow(float x, float& y) { y = x; }
LINESCAN_INLINE void narrow(float x, BFloat16& y) { y.bits = to_bfloat16(x); }
LINESCAN_INLINE void narrow(float x, Float16& y) { y.bits = to_float16(x); }

// Rows that are on their way from memory. A vector of a row is too little for a processor to see where the next one lies.
constexpr int AHEAD = 16;
LINESCAN_INLINE void fetch_ahead(float* const* rows, int64_t t, int64_t count, int64_t channel, int bytes = 4 * W) {
  const float* row = rows[t + AHEAD < count ? t + AHEAD : count - 1] + channel;
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i / 4);
}

template <class T>
__attribute__((noinline)) static void gather_rows(const T* base, int64_t pitch, const int64_t* token, int64_t rows,
                                                  int64_t width, int64_t stride, float* __restrict out) {
  const int64_t whole = width / W * W;
  for (int64_t t = 0; t < rows; ++t, out += stride) {
    if (token[t] < 0) {
      for (int64_t c = 0; c < stride; ++c) out[c] = 0.0f;
      continue;
    }
    const T* row = base + token[t] * pitch;
    if (t + AHEAD < rows && token[t + AHEAD] >= 0) {
      const char* later = reinterpret_cast<const char*>(base + token[t + AHEAD] * pitch);
      for (int64_t i = 0; i < width * int64_t(sizeof(T)); i += 64) __builtin_prefetch(later + i);
    }
    for (int64_t c = 0; c < whole; c += W)
      for (int i = 0; i < W; ++i) out[c + i] = widen(row[c + i]);
    for (int64_t c = whole; c < stride; ++c) out[c] = c < width ? widen(row[c]) : 0.0f;
  }
}

// Rows of `width` channels into out[row * stride], filled up with zeros; a row with a negative token is zero.
static void gather(const View& x, int64_t b, int64_t k, int64_t g, int64_t channel, const int64_t* token, int64_t rows,
                   int64_t width, int64_t stride, float* out) {
  const char* base = x.at(b, k, g, channel);
  if (x.dtype == Dtype::float32)
    gather_rows(reinterpret_cast<const float*>(base), x.token, token, rows, width, stride, out);
  else if (x.dtype == Dtype::bfloat16)
    gather_rows(reinterpret_cast<const BFloat16*>(base), x.token, token, rows, width, stride, out);
  else
    gather_rows(reinterpret_cast<const Float16*>(base), x.token, token, rows, width, stride, out);
}

// W numbers at once, where the compiler does not find the instruction for itself.
template <class T>
LINESCAN_INLINE void narrow_vector(const float* x, T* y) {
#if LINESCAN_WIDTH == 16
  if constexpr (std::is_same_v<T, Float16>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(load(x), 0));
#elif LINESCAN_WIDTH == 8
  if constexpr (std::is_same_v<T, Float16>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(load(x), 0));
#endif
  for (int i = 0; i < W; ++i) narrow(x[i], y[i]);
}

template <bool ADD, class T>
__attribute__((noinline)) static void scatter_rows(T* base, int64_t pitch, const int64_t* token, int64_t rows,
                                                   int64_t width, int64_t stride, const float* __restrict in) {
  const int64_t whole = width / W * W;
  for (int64_t t = 0; t < rows; ++t, in += stride) {
    if (t + AHEAD < rows && token[t + AHEAD] >= 0) {
      char* later = reinterpret_cast<char*>(base + token[t + AHEAD] * pitch);
      for (int64_t i = 0; i < width * int64_t(sizeof(T)); i += 64) __builtin_prefetch(later + i, 1);
    }
    if (token[t] < 0) continue;
    T* row = base + token[t] * pitch;
    if constexpr (ADD) {
      for (int64_t c = 0; c < width; ++c) row[c] += in[c];
    } else {
      for (int64_t c = 0; c < whole; c += W) narrow_vector(in + c, row + c);
      for (int64_t c = whole; c < width; ++c) narrow(in[c], row[c]);
    }
  }
}

// The way back; rows with a negative token are dropped. Only float32 rows are added to.
static void scatter(const Target& target, int64_t b, int64_t k, int64_t channel, const int64_t* token, int64_t rows,
                    int64_t width, int64_t stride, const float* in) {
  const View& y = target.view;
  char* base = y.at(b, k, 0, channel);
  if (target.add)
    scatter_rows<true>(reinterpret_cast<float*>(base), y.token, token, rows, width, stride, in);
  else if (y.dtype == Dtype::float32)
    scatter_rows<false>(reinterpret_cast<float*>(base), y.token, token, rows, width, stride, in);
  else if (y.dtype == Dtype::bfloat16)
    scatter_rows<false>(reinterpret_cast<BFloat16*>(base), y.token, token, rows, width, stride, in);
  else
    scatter_rows<false>(reinterpret_cast<Float16*>(base), y.token, token, rows, width, stride, in);
}

// Rows of float32 as the loops read and write them, in steps of so many numbers: where they stand if they are whole
// steps of float32, else in a buffer. A token of -1 is the buffer's first row in the first case.
template <int STEP>
static bool is_direct(const View& x, int64_t width) { return x.dtype == Dtype::float32 && width % STEP == 0; }

// The tokens from `first` on in the order in which they are stored.
LINESCAN_INLINE void as_stored(int64_t first, int64_t count, int64_t* tokens) {
  for (int64_t t = 0; t < count; ++t) tokens[t] = first + t;
}
LINESCAN_INLINE void in_order(float* buffer, int64_t stride, int64_t rows, float** at) {
  for (int64_t t = 0; t < rows; ++t) at[t] = buffer + t * stride;
}
LINESCAN_INLINE void point(float* base, int64_t pitch, const int64_t* token, int64_t rows, float* missing, float** at) {
  for (int64_t t = 0; t < rows; ++t) at[t] = token[t] < 0 ? missing : base + token[t] * pitch;
}

// Inputs: a row that is missing is zero.
template <int STEP = W>
static void read_rows(const View& x, int64_t b, int64_t k, int64_t g, int64_t channel, const int64_t* token,
                      int64_t rows, int64_t width, int64_t stride, float* buffer, float** at) {
  if (is_direct<STEP>(x, width)) {
    zero(buffer, stride);
    point(reinterpret_cast<float*>(x.at(b, k, g, channel)), x.token, token, rows, buffer, at);
  } else {
    gather(x, b, k, g, channel, token, rows, width, stride, buffer);
    in_order(buffer, stride, rows, at);
  }
}

// Outputs: those in the buffer, and only those, are left to `scatter`. Returns whether there are any.
static bool write_rows(const Target& target, int64_t b, int64_t k, int64_t channel, const int64_t* token, int64_t rows,
                       int64_t width, int64_t stride, float* buffer, float** at) {
  const View& y = target.view;
  const bool direct = !target.add && is_direct<W>(y, width);
  if (direct) point(reinterpret_cast<float*>(y.at(b, k, 0, channel)), y.token, token, rows, buffer, at);
  else in_order(buffer, stride, rows, at);
  return !direct;
}

// W rows of W numbers, `pitch` apart, to their columns: in each round rows a power of two apart exchange half their lanes.
template <int STRIDE, int... LANE>
LINESCAN_INLINE void exchange(V& a, V& b, std::integer_sequence<int, LANE...>) {
  const V first = shuffle<(LANE & STRIDE ? W + LANE - STRIDE : LANE)...>(a, b);
  b = shuffle<(LANE & STRIDE ? W + LANE : LANE + STRIDE)...>(a, b);
  a = first;
}
template <int STRIDE = 1>
LINESCAN_INLINE void transpose(V* rows) {
  if constexpr (STRIDE < W) {
    for (int i = 0; i < W; ++i)
      if (!(i & STRIDE)) exchange<STRIDE>(rows[i], rows[i + STRIDE], std::make_integer_sequence<int, W>());
    transpose<2 * STRIDE>(rows);
  }
}
__attribute__((noinline)) static void transpose(const float* x, int64_t pitch, float scale, float* out,
                                                int64_t out_pitch) {
  V rows[W];
  for (int i = 0; i < W; ++i) rows[i] = load(x + i * pitch) * scale;
  transpose(rows);
  for (int i = 0; i < W; ++i) store(out + i * out_pitch, rows[i]);
}

// Zeros for the tokens that a route never writes.
static void clear_gaps(const View& y, const Route& route, int64_t b, int64_t k, int64_t channel, int64_t width) {
  if (!route.data) return;
  const int64_t row = b * route.rows + k, size = y.dtype == Dtype::float32 ? 4 : 2;
  for (int64_t i = route.gaps_begin[row]; i < route.gaps_begin[row + 1]; ++i)
    std::memset(y.at(b, k, 0, channel) + route.gaps[i] * y.token * size, 0, width * size);
}

// (channels, n) of a parameter or state to vectors over channels, out[(c / W * n + i) * W + c % W], and back.
static void to_lanes(const float* x, int64_t channels, int64_t n, float scale, float* out) {
  const int64_t whole = n % W ? 0 : channels / W * W;
  for (int64_t c = 0; c < whole; c += W)
    for (int64_t i = 0; i < n; i += W) transpose(x + c * n + i, n, scale, out + (c * n + i * W), W);
  if (channels % W)
    for (int64_t i = 0; i < n * W; ++i) out[channels / W * n * W + i] = 0.0f;
  for (int64_t c = whole; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[(c / W * n + i) * W + c % W] = x[c * n + i] * scale;
}
static void from_lanes(const float* x, int64_t channels, int64_t n, float* out) {
  const int64_t whole = n % W ? 0 : channels / W * W;
  for (int64_t c = 0; c < whole; c += W)
    for (int64_t i = 0; i < n; i += W) transpose(x + (c * n + i * W), W, 1.0f, out + c * n + i, n);
  for (int64_t c = whole; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[c * n + i] = x[(c / W * n + i) * W + c % W];
}
