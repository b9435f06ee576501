// Recurrences of matrix states for one instruction set. Included inside its namespace; hence no include guard.
//
// A state has rows (keys) and columns (values, the lanes of vectors). A token decays it, writes outer products y z^T
// into it, and reads x^T S out of it. Tokens are taken in blocks of BLOCK: of the state that enters a block all reads
// are made at once, what the block's tokens have to do with each other are products of rows (`scores`), and then the
// state takes all writes at once. So it is loaded twice and stored once in BLOCK tokens, and an element costs
// READS + WRITES + 1 / BLOCK multiply-adds a token, where its equation has one for the decay and one more for the first
// write. Decays only ever multiply, so none is larger than 1.

constexpr int BLOCK = 4;
constexpr int PITCH = 64;  // coefficients of so many rows stand together, at distances known to the compiler

// Calls f(integral_constant<int, i>) for i = 0 to COUNT - 1.
template <class F, int... I>
LINESCAN_INLINE void each_of(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class F>
LINESCAN_INLINE void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, COUNT>());
}

// -- update rules -------------------------------------------------------------------------------------------------------

// What a token does, in order: reads that are not AFTER the decay, the decay, the other reads, and writes; reads see the
// token's OWN write too, where told. TIED: the first read and the first write are of the same rows. DEPENDENT: the first
// write takes columns gamma (first read - base). BONUS: rows are weighed in what a token reads of its own write.
struct Gated {  // S = diag(a) S + k v^T, o = S^T q
  static constexpr int READS = 1, WRITES = 1;
  static constexpr bool DEPENDENT = false, TIED = false, BONUS = false;
  static constexpr bool AFTER[2] = {true}, PRE[2] = {}, OWN[2][2] = {{true}};
};
struct Late : Gated {  // o = (S + diag(u) k v^T)^T q, then S = diag(a) S + k v^T
  static constexpr bool AFTER[2] = {false}, BONUS = true;
};
struct Delta {  // P = diag(a) S, S = P + beta k (v - P^T k)^T, o = S^T q
  static constexpr int READS = 2, WRITES = 1;
  static constexpr bool DEPENDENT = true, TIED = true, BONUS = false;
  static constexpr bool AFTER[2] = {true, true}, PRE[2] = {}, OWN[2][2] = {{false}, {true}};
};
struct LowRank {  // S = diag(a) S + b (S^T c)^T + k v^T, o = S^T q
  static constexpr int READS = 2, WRITES = 2;
  static constexpr bool DEPENDENT = true, TIED = false, BONUS = false;
  static constexpr bool AFTER[2] = {false, true}, PRE[2] = {}, OWN[2][2] = {{}, {true, true}};
};

// Only what the dependent write needs.
template <class F>
struct Solve : F {
  static constexpr int READS = 1;
};

// The adjoint, a recurrence of the same kind from the last token to the first: what was written with is read with, and
// the other way round. Its reads come before the decay, its writes before (PRE) or after it.
template <class F>
struct Adjoint {
  static constexpr int READS = F::WRITES, WRITES = F::READS;
  static constexpr bool DEPENDENT = F::DEPENDENT, BONUS = F::BONUS;
  static constexpr bool AFTER[2] = {}, PRE[2] = {F::AFTER[0], F::AFTER[1]},
                        OWN[2][2] = {{F::OWN[0][0], F::OWN[1][0]}, {F::OWN[0][1], F::OWN[1][1]}};
};

// Scores of a block, write by write: for every read those of a later read with an earlier write, then the token's own.
constexpr int PAIRS = BLOCK * (BLOCK - 1) / 2;
template <class F>
constexpr int scores_before(int read, int write) {
  int count = 0;
  for (int r = 0; r < read; ++r) count += PAIRS + (F::OWN[r][write] ? BLOCK : 0);
  return count;
}
template <class F>
constexpr int SCORES = (scores_before<F>(F::READS, F::WRITES - 1) + W - 1) / W * W;  // of a write, as whole vectors
template <class F>
constexpr int score(int read, int write, int t, int s) {
  return SCORES<F> * write + scores_before<F>(read, write) + (t == s ? PAIRS + t : t * (t - 1) / 2 + s);
}
template <class F>
constexpr int LINES = (F::READS + F::WRITES) * BLOCK + 1;  // of coefficients

// -- a block of tokens --------------------------------------------------------------------------------------------------

// A walk of a state through time. Rows of tokens are pointers in time order.
struct Walk {
  int64_t rows = 0, stride = 0, columns = 0;  // of the state; rows as whole vectors; columns as whole vectors
  float *state = nullptr, *coefficients = nullptr;
  float *const *x[2] = {}, *const *y[2] = {}, *const *z[2] = {}, *const *out[2] = {};  // of reads and writes
  float* const* base = nullptr;
  const float *decay = nullptr, *gamma = nullptr, *bonus = nullptr;  // rows of decays one after the other
  float* own[2] = {};  // scores of the last read with the token's own write, kept instead of used
  float scale = 1.0f, skip = 0.0f;  // of outputs; added to the score of a token's own write
};

// Coefficients of a block's reads and writes, with the decays from and to the block's ends, and its scores. KEYS: the
// state lies on its side, so that decays are those of its columns.
template <class F, bool DECAY, bool KEYS>
__attribute__((noinline)) static void weigh(const Walk& s, const int64_t (&at)[BLOCK], float* __restrict scores) {
  constexpr bool ROWS = DECAY && !KEYS, SCALED = KEYS && F::DEPENDENT;
  each<F::WRITES>([&](auto w) LINESCAN_STAGE {
    V sums[SCORES<F>] = {};
    for (int64_t i = 0; i < s.stride; i += W) {
      float* lines = s.coefficients + i / PITCH * PITCH * LINES<F> + i % PITCH;
      V decay[BLOCK], x[F::READS][BLOCK];
      each<BLOCK>([&](auto t) LINESCAN_STAGE {
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          x[r][t] = load(s.x[r][at[t]] + i);
          if (SCALED && r == 0) x[r][t] *= s.gamma[at[t]];
        });
        if (ROWS) decay[t] = load(s.decay + at[t] * s.stride + i);
      });
      if (w == 0) {
        V whole = splat(1.0f);
        const auto keep = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after)
              store(lines + (r * BLOCK + t) * PITCH, ROWS && (after || t > 0) ? x[r][t] * whole : x[r][t]);
          });
        };
        each<BLOCK>([&](auto t) LINESCAN_STAGE {
          keep(t, false);
          if (ROWS) whole = t == 0 ? decay[t] : whole * decay[t];
          keep(t, true);
        });
        if (ROWS) store(lines + (LINES<F> - 1) * PITCH, whole);
      }
      each<BLOCK>([&](auto from) LINESCAN_STAGE {
        V y = load(s.y[w][at[from]] + i);
        if (SCALED && w == 0) y *= s.gamma[at[from]];
        const auto meet = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after) sums[score<F>(r, w, t, from) - SCORES<F> * w] += x[r][t] * y;
          });
        };
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          if constexpr (F::OWN[r][w])
            sums[score<F>(r, w, from, from) - SCORES<F> * w] +=
                x[r][from] * (F::BONUS && !KEYS ? y * load(s.bonus + i) : y);
        });
        if (ROWS && F::PRE[w]) y *= decay[from];
        each<BLOCK - 1 - from>([&](auto later) LINESCAN_STAGE {
          constexpr std::integral_constant<int, from + 1 + later> t;
          meet(t, false);
          if (ROWS) y *= decay[t];
          meet(t, true);
        });
        store(lines + ((F::READS + w) * BLOCK + from) * PITCH, y);
      });
    }
    for (int i = 0; i < SCORES<F>; i += W)
      store(scores + SCORES<F> * w + i, lane_sums<W>(reinterpret_cast<const float*>(sums + i)));
  });
}

// out[c] = sum over the rows of coefficient c times the state; VECTORS of its columns.
template <int COUNT, int VECTORS, int ALL>
LINESCAN_INLINE void read(int64_t rows, int64_t pitch, const float* state, const float* lines, V (&out)[COUNT][VECTORS]) {
  each<COUNT>([&](auto c) LINESCAN_STAGE { each<VECTORS>([&](auto l) LINESCAN_STAGE { out[c][l] = V{}; }); });
  for (int64_t first = 0; first < rows; first += PITCH, lines += PITCH * ALL) {
    const int64_t some = rows - first < PITCH ? rows - first : PITCH;
    for (int64_t i = 0; i < some; ++i, state += pitch) {
      V row[VECTORS];
      each<VECTORS>([&](auto l) LINESCAN_STAGE { row[l] = load(state + l * W); });
      each<COUNT>([&](auto c) LINESCAN_STAGE {
        const V x = splat(lines[c * PITCH + i]);
        each<VECTORS>([&](auto l) LINESCAN_STAGE { out[c][l] += x * row[l]; });
      });
    }
  }
}

// state = decay state + sum over c of coefficient c times z[c]; the decay is a line of coefficients, or `whole` of KEYS.
template <bool DECAY, bool KEYS, int COUNT, int VECTORS, int ALL>
LINESCAN_INLINE void write(int64_t rows, int64_t pitch, float* state, const float* lines, const V (&whole)[VECTORS],
                           const V (&z)[COUNT][VECTORS]) {
  for (int64_t first = 0; first < rows; first += PITCH, lines += PITCH * ALL) {
    const int64_t some = rows - first < PITCH ? rows - first : PITCH;
    for (int64_t i = 0; i < some; ++i, state += pitch) {
      V row[VECTORS];
      each<VECTORS>([&](auto l) LINESCAN_STAGE {
        row[l] = load(state + l * W);
        if (DECAY) row[l] *= KEYS ? whole[l] : splat(lines[COUNT * PITCH + i]);
      });
      each<COUNT>([&](auto c) LINESCAN_STAGE {
        const V y = splat(lines[c * PITCH + i]);
        each<VECTORS>([&](auto l) LINESCAN_STAGE { row[l] += y * z[c][l]; });
      });
      each<VECTORS>([&](auto l) LINESCAN_STAGE { store(state + l * W, row[l]); });
    }
  }
}

// Takes a block through VECTORS of the state's columns: reads, what its tokens have to do with each other, writes.
template <class F, bool DECAY, bool KEYS, int VECTORS>
__attribute__((noinline)) static void sweep(const Walk& s, const int64_t (&at)[BLOCK], int64_t column,
                                            const float* __restrict scores) {
  constexpr bool DEPENDENT = F::DEPENDENT && !KEYS;
  V out[F::READS * BLOCK][VECTORS], z[F::WRITES * BLOCK][VECTORS], decay[BLOCK][VECTORS], whole[VECTORS];
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  read<F::READS * BLOCK, VECTORS, LINES<F>>(s.rows, s.columns, s.state + column, s.coefficients, out);
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      if (w > 0 || !DEPENDENT)
        vectors([&](auto l) LINESCAN_STAGE { z[w * BLOCK + t][l] = load(s.z[w][at[t]] + column + l * W); });
    });
  });
  if constexpr (DECAY && KEYS) {  // here decays are not in the coefficients
    const auto keep = [&](auto t, bool after) LINESCAN_STAGE {
      each<F::READS>([&](auto r) LINESCAN_STAGE {
        if (F::AFTER[r] == after && (after || t > 0))
          vectors([&](auto l) LINESCAN_STAGE { out[r * BLOCK + t][l] *= whole[l]; });
      });
    };
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      vectors([&](auto l) LINESCAN_STAGE { decay[t][l] = load(s.decay + at[t] * s.columns + column + l * W); });
      keep(t, false);
      vectors([&](auto l) LINESCAN_STAGE { whole[l] = t == 0 ? decay[t][l] : whole[l] * decay[t][l]; });
      keep(t, true);
    });
  }
  if constexpr (KEYS) {
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      each<BLOCK>([&](auto from) LINESCAN_STAGE {
        V(&mine)[VECTORS] = z[w * BLOCK + from];
        const auto meet = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after)
              vectors([&](auto l) LINESCAN_STAGE { out[r * BLOCK + t][l] += scores[score<F>(r, w, t, from)] * mine[l]; });
          });
        };
        if (DECAY && F::PRE[w]) vectors([&](auto l) LINESCAN_STAGE { mine[l] *= decay[from][l]; });
        each<BLOCK - 1 - from>([&](auto later) LINESCAN_STAGE {
          constexpr std::integral_constant<int, from + 1 + later> t;
          meet(t, false);
          if (DECAY) vectors([&](auto l) LINESCAN_STAGE { mine[l] *= decay[t][l]; });
          meet(t, true);
        });
        if constexpr (F::OWN[F::READS - 1][w])
          if (s.own[w]) s.own[w][at[from]] = scores[score<F>(F::READS - 1, w, from, from)];
      });
    });
  }
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE {
      V(&mine)[VECTORS] = out[r * BLOCK + t];
      each<F::WRITES>([&](auto w) LINESCAN_STAGE {
        each<t + 1>([&](auto from) LINESCAN_STAGE {
          if constexpr (!KEYS && (from < t || F::OWN[r][w])) {
            const float weight = scores[score<F>(r, w, t, from)] + (from == t && !F::DEPENDENT ? s.skip : 0.0f);
            vectors([&](auto l) LINESCAN_STAGE { mine[l] += weight * z[w * BLOCK + from][l]; });
          }
        });
      });
      if constexpr (DEPENDENT && r == 0) {
        vectors([&](auto l) LINESCAN_STAGE {
          if (s.base) mine[l] -= load(s.base[at[t]] + column + l * W);
          z[t][l] = s.gamma[at[t]] * mine[l];
        });
      }
      if (s.out[r])
        vectors([&](auto l) LINESCAN_STAGE { store(s.out[r][at[t]] + column + l * W, s.scale * mine[l]); });
    });
  });
  write<DECAY, KEYS, F::WRITES * BLOCK, VECTORS, LINES<F>>(s.rows, s.columns, s.state + column,
                                                           s.coefficients + F::READS * BLOCK * PITCH, whole, z);
}

// Tokens [first, last), whole blocks of them; `back` from the last to the first.
template <class F, bool DECAY, bool KEYS>
static void walk(const Walk& s, int64_t first, int64_t last, bool back = false) {
  constexpr int VECTORS = W == 16 ? 2 : F::READS == 1 && F::WRITES == 1 ? 2 : 1;  // as many as registers hold
  alignas(64) float scores[SCORES<F> * F::WRITES];
  for (int64_t block = first; block < last; block += BLOCK) {
    int64_t at[BLOCK];
    for (int t = 0; t < BLOCK; ++t) at[t] = back ? first + last - 1 - block - t : block + t;
    weigh<F, DECAY, KEYS>(s, at, scores);
    int64_t column = 0;
    for (; column + VECTORS * W <= s.columns; column += VECTORS * W)
      sweep<F, DECAY, KEYS, VECTORS>(s, at, column, scores);
    if constexpr (VECTORS > 1)
      for (; column < s.columns; column += W) sweep<F, DECAY, KEYS, 1>(s, at, column, scores);
  }
}

// -- tokens as rows -----------------------------------------------------------------------------------------------------

LINESCAN_INLINE int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }
LINESCAN_INLINE int64_t whole_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Places what P takes in scratch memory, which P's constructor is asked for twice: to count, and to place.
template <class P>
static P place(const Matrix& s) {
  Arena count;
  P(count, s);
  Arena arena(count.used());
  return P(arena, s);
}

template <class T>
static T* take(Arena& arena, int64_t count) {
  return reinterpret_cast<T*>(arena.take(count * int64_t(sizeof(T) / 4)));
}

struct RowBuffer {
  int64_t stride;
  float* data;
  float** at;

  RowBuffer(Arena& arena, int64_t rows, int64_t width)
      : stride(width), data(arena.take(rows * width)), at(take<float*>(arena, rows)) {}
  float* const* in_place(int64_t rows) {
    in_order(data, stride, rows, at);
    return at;
  }
};

// out[t] = x_t . y_t, or with RUNNING x_t . (sum + y_0 + ... + y_t), which also adds up the sum; for whole vectors of t.
template <bool RUNNING>
__attribute__((noinline)) static void dots(int64_t count, int64_t n, float* const* x, float* const* y,
                                           float* __restrict sum, float* __restrict out) {
  for (int64_t first = 0; first < count; first += W) {
    alignas(64) float lanes[W * W];
    for (int64_t t = first; t < first + W; ++t) {
      V product = {};
      for (int64_t i = 0; t < count && i < n; i += W) {
        V other = load(y[t] + i);
        if (RUNNING) store(sum + i, other += load(sum + i));
        product += load(x[t] + i) * other;
      }
      store(lanes + (t - first) * W, product);
    }
    store(out + first, lane_sums<W>(lanes));
  }
}

// What a unit of work reads of its tokens, filled up to whole blocks with tokens that do nothing.
struct Tokens {
  int64_t n, m;
  RowBuffer q, k, written, v, a, b, gate;  // `written`: the keys times beta, where a rule writes them so
  float *decay, *gamma, *numbers, *blank, *bonus;
  int64_t *reads, *writes;

  Tokens(Arena& arena, const Matrix& s, int64_t room, int64_t columns)
      : n(whole_vectors(s.N)), m(whole_vectors(columns)), q(arena, room, n), k(arena, room, n), written(arena, room, n),
        v(arena, room, m), a(arena, room, n), b(arena, room, n), gate(arena, room, n), decay(arena.take(room * n)),
        gamma(arena.take(room + W)), numbers(arena.take(room + W)), blank(arena.take(n > m ? n : m)),
        bonus(arena.take(n)), reads(take<int64_t>(arena, room)), writes(take<int64_t>(arena, room)) {
    if (!arena.counts()) zero(blank, n > m ? n : m);
  }

  void fetch(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t column, int64_t width, int64_t t0, int64_t count);

  // The recurrence as it goes, without its outputs.
  template <class F, bool DECAY>
  Walk start(const Matrix& s, int64_t b, int64_t k, int64_t h) const {
    Walk w;
    w.rows = s.N, w.stride = n, w.columns = m;
    if (F::TIED) w.x[0] = this->k.at, w.base = v.at;
    else w.x[0] = a.at, w.y[0] = this->b.at;
    w.x[F::READS - 1] = q.at, w.y[F::WRITES - 1] = written.at, w.z[F::WRITES - 1] = v.at;
    w.decay = DECAY ? decay : nullptr, w.gamma = gamma, w.bonus = bonus;
    w.skip = s.skip ? *(s.skip.at(b, k) + h) : 0.0f;
    return w;
  }
};

void Tokens::fetch(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t column, int64_t width, int64_t t0,
                   int64_t count) {
  const int64_t padded = whole_blocks(count);
  s.route.steps(b, k, t0, count, reads, writes);
  const auto rows = [&](const View& x, int64_t group, int64_t channel, int64_t channels, RowBuffer& to) {
    if (!x) return;
    read_rows(x, b, k, group, channel, reads, count, channels, to.stride, to.data, to.at);
    for (int64_t t = count; t < padded; ++t) to.at[t] = blank;
  };
  const auto one_each = [&](const View& x, float* to) {
    gather(x, b, k, h, 0, reads, count, 1, 1, to);
    for (int64_t t = count; t < padded + W; ++t) to[t] = 0.0f;
  };
  rows(s.q, h / s.share, 0, s.N, q), rows(s.k, h / s.share, 0, s.N, this->k);
  rows(s.v, h, column, width, v), rows(s.a, h, 0, s.N, a), rows(s.b, h, 0, s.N, this->b);
  for (int64_t t = 0; t < padded; ++t) written.at[t] = this->k.at[t];
  if (s.gates == 1) {
    one_each(s.gate, numbers);
    if (s.idle)
      for (int64_t t = 0; t < count; ++t)
        if (reads[t] < 0) numbers[t] = *(s.idle.at(b, k) + h);
    for (int64_t t = 0; t < padded; t += W) store(numbers + t, exp(load(numbers + t)));
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t i = 0; i < n; i += W) store(decay + t * n + i, splat(numbers[t]));
  } else if (s.gates) {
    rows(s.gate, h, 0, s.N, gate);
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t i = 0; i < n; i += W) store(decay + t * n + i, exp(load(gate.at[t] + i)));
  }
  for (int64_t t = 0; t < padded; ++t) gamma[t] = 1.0f;
  if (!s.beta) return;
  one_each(s.beta, gamma);
  if (s.rule == Rule::delta) {
    for (int64_t t = 0; t < padded; ++t) gamma[t] = -gamma[t];
  } else {
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t i = 0; i < n; i += W) store(written.data + t * n + i, gamma[t] * load(this->k.at[t] + i));
    written.in_place(padded);
  }
}

// A state (rows, columns), its rows `pitch` apart, to one of whole vectors, or on its side; and back. Without: zero.
static void unpack(const float* x, int64_t rows, int64_t columns, int64_t pitch, bool side, float* out) {
  const int64_t wide = whole_vectors(side ? rows : columns);
  zero(out, (side ? columns : rows) * wide);
  for (int64_t i = 0; x && i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[side ? j * wide + i : i * wide + j] = x[i * pitch + j];
}
static void pack(const float* x, int64_t rows, int64_t columns, int64_t pitch, float* out) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * pitch, x + i * whole_vectors(columns), columns * 4);
}

// The sum of keys is the column after the last of a normalised recurrence's state.
static void column(const float* state, int64_t rows, int64_t pitch, float* out) {
  for (int64_t i = 0; i < whole_vectors(rows); ++i) out[i] = state && i < rows ? state[i * pitch] : 0.0f;
}

constexpr int64_t ROOM = 64;  // tokens whose rows are looked up at a time
constexpr float SMALLEST = 1e-10f;  // added to what outputs are divided by

static int64_t coefficients(int64_t rows) { return (rows + PITCH - 1) / PITCH * PITCH * LINES<LowRank>; }
static float* of_head(const Parameter& x, int64_t b, int64_t k, int64_t at) { return x ? x.at(b, k) + at : nullptr; }

// -- forward ------------------------------------------------------------------------------------------------------------

struct ForwardRoom {
  Tokens tokens;
  RowBuffer y;
  float *state, *lines, *sum, *divisor, *dropped;

  ForwardRoom(Arena& arena, const Matrix& s)
      : tokens(arena, s, ROOM, s.width), y(arena, ROOM, tokens.m), state(arena.take(s.N * tokens.m)),
        lines(arena.take(coefficients(s.N))), sum(arena.take(tokens.n)), divisor(arena.take(ROOM + W)),
        dropped(arena.take(tokens.m)) {}
};

template <class F, bool DECAY>
static void matrix_forward_as(const Matrix& s, int64_t begin, int64_t end) {
  ForwardRoom room = place<ForwardRoom>(s);
  Tokens& tokens = room.tokens;
  const int64_t parts = s.parts(), heads = s.H * parts, per_sample = s.merge ? heads : heads * s.K;
  const int64_t pitch = s.M + s.normalize;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / per_sample, h = unit % heads / parts, first = unit % parts * s.width;
    const int64_t width = s.M - first < s.width ? s.M - first : s.width;
    const int64_t k0 = s.merge ? 0 : unit % per_sample / heads, k1 = s.merge ? s.K : k0 + 1;
    for (int64_t k = k0; k < k1; ++k) {
      const float* initial = of_head(s.initial, b, k, h * s.N * pitch);
      float* last = s.state.at(b, k) + h * s.N * pitch;
      unpack(initial ? initial + first : nullptr, s.N, width, pitch, false, room.state);
      if (s.normalize) column(initial ? initial + s.M : nullptr, s.N, pitch, room.sum);
      if (s.bonus) column(s.bonus.at(b, k) + h * s.N, s.N, 1, tokens.bonus);
      const Target target = s.y.of_route(k);
      if (!target.add) clear_gaps(target.view, s.route, b, k, h * s.M + first, width);
      Walk forth = tokens.start<F, DECAY>(s, b, k, h);
      forth.columns = whole_vectors(width);
      forth.state = room.state, forth.coefficients = room.lines, forth.scale = s.scale;
      forth.out[F::READS - 1] = room.y.at;
      for (int64_t t0 = 0; t0 < s.S; t0 += ROOM) {
        const int64_t count = s.S - t0 < ROOM ? s.S - t0 : ROOM, padded = whole_blocks(count);
        tokens.fetch(s, b, k, h, first, width, t0, count);
        const bool left = write_rows(target, b, k, h * s.M + first, tokens.writes, count, width, forth.columns,
                                     room.y.data, room.y.at);
        for (int64_t t = count; t < padded; ++t) room.y.at[t] = room.dropped;
        walk<F, DECAY, false>(forth, 0, padded);
        if (s.normalize) {
          dots<true>(count, tokens.n, tokens.q.at, tokens.k.at, room.sum, room.divisor);
          for (int64_t t = 0; t < count; ++t) {
            const float factor = 1.0f / (s.scale * room.divisor[t] + SMALLEST);
            for (int64_t j = 0; j < forth.columns; j += W) store(room.y.at[t] + j, load(room.y.at[t] + j) * factor);
          }
        }
        if (left) scatter(target, b, k, h * s.M + first, tokens.writes, count, width, forth.columns, room.y.data);
      }
      pack(room.state, s.N, width, pitch, last + first);
      if (s.normalize && first == 0)
        for (int64_t i = 0; i < s.N; ++i) last[i * pitch + s.M] = room.sum[i];
    }
  }
}

// Calls f(rule, whether there are decays) with the rule's type.
template <class F>
static void with_rule(const Matrix& s, const F& f) {
  const std::true_type decay;
  const std::false_type none;
  if (s.rule == Rule::late) f(Late(), decay);
  else if (s.rule == Rule::low_rank) f(LowRank(), decay);
  else if (s.rule == Rule::delta) s.gates ? f(Delta(), decay) : f(Delta(), none);
  else s.gates ? f(Gated(), decay) : f(Gated(), none);
}

static void matrix_forward(const Matrix& s, int64_t begin, int64_t end) {
  with_rule(s, [&](auto rule, auto decay) { matrix_forward_as<decltype(rule), decay()>(s, begin, end); });
}

// -- backward -----------------------------------------------------------------------------------------------------------

// Four walks. The recurrence itself, as far as its writes depend on the state. Its adjoint, back from the last token,
// whose reads are the gradients of what was written. And both again with states on their side: reads there are the
// gradients of the rows, those of x from the states, those of y from the states' gradients. What a token reads of its own
// write has no part in these two walks, and is added afterwards: a decay's gradient must not hold it.

struct BackwardRoom {
  Tokens tokens;
  RowBuffer error, out, dz0, dz1, dx0, dx1, dy0, dy1, dgate;  // `error`: first read - base of a dependent write
  float *state, *lines, *ends, *flow, *own0, *own1, *of_bonus, *sum, *divisor, *numbers, *ones;

  static int64_t tokens_of(const Matrix& s) { return whole_blocks(s.S); }
  BackwardRoom(Arena& arena, const Matrix& s)
      : tokens(arena, s, tokens_of(s), s.M), error(arena, tokens_of(s), tokens.m), out(arena, tokens_of(s), tokens.m),
        dz0(arena, tokens_of(s), tokens.m), dz1(arena, tokens_of(s), tokens.m), dx0(arena, tokens_of(s), tokens.n),
        dx1(arena, tokens_of(s), tokens.n), dy0(arena, tokens_of(s), tokens.n), dy1(arena, tokens_of(s), tokens.n),
        dgate(arena, tokens_of(s), tokens.n), state(arena.take(tokens.n * tokens.m)),
        lines(arena.take(coefficients(s.N > s.M ? s.N : s.M))),
        ends(arena.take((s.S + ROOM - 1) / ROOM * s.M * tokens.n)), flow(arena.take(tokens.n)),
        own0(arena.take(tokens_of(s))), own1(arena.take(tokens_of(s))), of_bonus(arena.take(tokens.n)),
        sum(arena.take(tokens.n)), divisor(arena.take(tokens_of(s) + W)), numbers(arena.take(tokens_of(s) + W)),
        ones(arena.take(tokens.n)) {}
};

// Gradients of the tokens [first, last) as the walks left them, completed, and that of the log decays. `flow` is, for
// every row of the state, what decaying it just after the last of them would change; each read and write before a decay
// changes that by its own share.
template <class F, bool DECAY>
__attribute__((noinline)) static void conclude(const Walk& s, int64_t n, int64_t first, int64_t last,
                                               const RowBuffer& dx0, const RowBuffer& dx1, const RowBuffer& dy0,
                                               const RowBuffer& dy1, float* dgate, const float* flow, float* of_bonus) {
  constexpr int LAST = F::READS - 1;
  float *dx[2] = {dx0.data, dx1.data}, *dy[2] = {dy0.data, dy1.data};
  for (int64_t i = 0; i < n; i += W) {
    V change = DECAY ? load(flow + i) : V{}, sum = F::BONUS ? load(of_bonus + i) : V{};
    const V bonus = F::BONUS ? load(s.bonus + i) : splat(1.0f);
    for (int64_t t = last - 1; t >= first; --t) {
      V x[F::READS], y[F::WRITES], of_x[F::READS], of_y[F::WRITES];
      each<F::READS>([&](auto r) LINESCAN_STAGE { x[r] = load(s.x[r][t] + i), of_x[r] = load(dx[r] + t * n + i); });
      each<F::WRITES>([&](auto w) LINESCAN_STAGE { y[w] = load(s.y[w][t] + i), of_y[w] = load(dy[w] + t * n + i); });
      if constexpr (DECAY) {
        const auto reads = [&](bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after) change += x[r] * of_x[r];
          });
        };
        reads(true);
        each<F::WRITES>([&](auto w) LINESCAN_STAGE { change -= y[w] * of_y[w]; });
        store(dgate + t * n + i, change);
        reads(false);
      }
      each<F::WRITES>([&](auto w) LINESCAN_STAGE {
        if constexpr (F::OWN[LAST][w]) {
          const float weight = s.own[w][t];
          of_x[LAST] += weight * (F::BONUS ? bonus * y[w] : y[w]);
          of_y[w] += weight * (F::BONUS ? bonus * x[LAST] : x[LAST]);
          if (F::BONUS) sum += weight * (x[LAST] * y[w]);
        }
      });
      if (F::TIED) of_y[0] += of_x[0];
      store(dx[LAST] + t * n + i, of_x[LAST]);
      each<F::WRITES>([&](auto w) LINESCAN_STAGE { store(dy[w] + t * n + i, of_y[w]); });
    }
    if (F::BONUS) store(of_bonus + i, sum);
  }
}

template <class F, bool DECAY>
static void matrix_backward_as(const Matrix& s, int64_t begin, int64_t end) {
  constexpr int READ = F::READS - 1, WRITE = F::WRITES - 1;
  BackwardRoom room = place<BackwardRoom>(s);
  Tokens& tokens = room.tokens;
  const int64_t n = tokens.n, m = tokens.m, padded = whole_blocks(s.S), pitch = s.M + s.normalize, size = s.N * pitch;
  float *const *dz[2] = {room.dz0.in_place(padded), room.dz1.in_place(padded)},
               *const *dx[2] = {room.dx0.in_place(padded), room.dx1.in_place(padded)},
               *const *dy[2] = {room.dy0.in_place(padded), room.dy1.in_place(padded)};
  for (int64_t i = 0; i < n; ++i) room.ones[i] = 1.0f;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / s.H, h = unit % s.H;
    for (int64_t k = 0; k < s.K; ++k) {
      const float *initial = of_head(s.initial, b, k, h * size), *dstate = of_head(s.dstate, b, k, h * size);
      float* dinitial = of_head(s.dinitial, b, k, h * size);
      if (s.bonus) column(s.bonus.at(b, k) + h * s.N, s.N, 1, tokens.bonus), zero(room.of_bonus, n);
      tokens.fetch(s, b, k, h, 0, s.M, 0, s.S);
      gather(s.dy, b, k, h, 0, tokens.writes, s.S, s.M, m, room.out.data);
      zero(room.out.data + s.S * m, (padded - s.S) * m);
      if (s.normalize) {
        column(initial ? initial + s.M : nullptr, s.N, pitch, room.sum);
        dots<true>(s.S, n, tokens.q.at, tokens.k.at, room.sum, room.divisor);
      }
      for (int64_t t = 0; t < s.S; ++t) {
        const float factor = s.normalize ? s.scale / (room.divisor[t] = s.scale * room.divisor[t] + SMALLEST) : s.scale;
        for (int64_t j = 0; j < m; j += W) store(room.out.data + t * m + j, load(room.out.data + t * m + j) * factor);
      }
      float* const* out = room.out.in_place(padded);

      Walk forth = tokens.start<F, DECAY>(s, b, k, h);
      forth.state = room.state, forth.coefficients = room.lines;
      if (F::DEPENDENT) {
        unpack(initial, s.N, s.M, pitch, false, room.state);
        Walk solve = forth;
        solve.out[0] = forth.z[0] = room.error.in_place(padded);
        walk<Solve<F>, DECAY, false>(solve, 0, padded);
      }

      Walk back = forth;
      back.base = nullptr;
      for (int i = 0; i < 2; ++i) back.x[i] = forth.y[i], back.y[i] = forth.x[i], back.z[i] = nullptr, back.out[i] = dz[i];
      back.z[READ] = out;
      unpack(dstate, s.N, s.M, pitch, false, room.state);
      walk<Adjoint<F>, DECAY, false>(back, 0, padded, true);
      if (dinitial) pack(room.state, s.N, s.M, pitch, dinitial);

      // On their side: reads and writes are those of z, columns those of y.
      Walk side = forth;
      side.rows = s.M, side.stride = m, side.columns = n, side.own[0] = room.own0, side.own[1] = room.own1;
      for (int i = 0; i < 2; ++i) side.y[i] = forth.z[i], side.z[i] = forth.y[i], side.out[i] = dx[i];
      side.x[0] = dz[0], side.x[READ] = out;
      unpack(initial, s.N, s.M, pitch, true, room.state);
      for (int64_t t0 = 0; t0 < padded; t0 += ROOM) {
        walk<F, DECAY, true>(side, t0, t0 + ROOM < padded ? t0 + ROOM : padded);
        if (DECAY) std::memcpy(room.ends + t0 / ROOM * s.M * n, room.state, s.M * n * 4);
      }

      Walk other = side;
      other.own[0] = other.own[1] = nullptr;
      for (int i = 0; i < 2; ++i)
        other.x[i] = side.y[i], other.y[i] = side.x[i], other.z[i] = forth.x[i], other.out[i] = dy[i];
      forth.own[0] = room.own0, forth.own[1] = room.own1;
      unpack(dstate, s.N, s.M, pitch, true, room.state);
      for (int64_t t0 = (padded - 1) / ROOM * ROOM; t0 >= 0; t0 -= ROOM) {
        const int64_t t1 = t0 + ROOM < padded ? t0 + ROOM : padded;
        const float* ended = room.ends + t0 / ROOM * s.M * n;
        for (int64_t i = 0; DECAY && i < n; i += W) {
          V flow = {};
          for (int64_t j = 0; j < s.M; ++j) flow += load(ended + j * n + i) * load(room.state + j * n + i);
          store(room.flow + i, flow);
        }
        walk<Adjoint<F>, DECAY, true>(other, t0, t1, true);
        conclude<F, DECAY>(forth, n, t0, t1, room.dx0, room.dx1, room.dy0, room.dy1, room.dgate.data, room.flow,
                           room.of_bonus);
      }

      if (s.normalize) {  // the divisor's gradients go to q by the sum of keys so far, and to k by a sum from behind
        dots<false>(s.S, n, tokens.q.at, dx[0], nullptr, room.numbers);
        for (int64_t t = 0; t < s.S; ++t) room.numbers[t] *= -s.scale / room.divisor[t];
        column(initial ? initial + s.M : nullptr, s.N, pitch, room.sum);
        column(dstate ? dstate + s.M : nullptr, s.N, pitch, room.flow);
        for (int64_t i = 0; i < n; i += W) {
          V sum = load(room.sum + i), grad = load(room.flow + i);
          for (int64_t t = 0; t < s.S; ++t) {
            sum += load(tokens.k.at[t] + i);
            store(dx[0][t] + i, load(dx[0][t] + i) + room.numbers[t] * sum);
          }
          for (int64_t t = s.S - 1; t >= 0; --t) {
            grad += room.numbers[t] * load(tokens.q.at[t] + i);
            store(dy[0][t] + i, load(dy[0][t] + i) + grad);
          }
          store(room.flow + i, grad);
        }
        for (int64_t i = 0; dinitial && i < s.N; ++i) dinitial[i * pitch + s.M] = room.flow[i];
      }

      if (s.skip) {
        float sum = 0.0f;  // of the products of values and outputs' gradients
        for (int64_t t = 0; t < s.S; ++t) sum += room.own0[t];
        s.partial_skip[(b * s.K + k) * s.H + h] = sum;
      }
      if (s.bonus) std::memcpy(s.partial_bonus + ((b * s.K + k) * s.H + h) * s.N, room.of_bonus, s.N * 4);
      const auto give = [&](const Target& target, int64_t width, int64_t stride, const float* rows) {
        if (target) scatter(target.of_route(k), b, k, h * width, tokens.reads, s.S, width, stride, rows);
      };
      if (s.beta) {
        if (F::TIED) {
          dots<false>(s.S, m, room.error.at, dz[0], nullptr, room.numbers);
          for (int64_t t = 0; t < s.S; ++t) {
            room.numbers[t] = -room.numbers[t];
            for (int64_t j = 0; j < m; j += W) store(dz[0][t] + j, load(dz[0][t] + j) * -tokens.gamma[t]);
          }
        } else {
          dots<false>(s.S, n, tokens.k.at, dy[0], nullptr, room.numbers);
          for (int64_t t = 0; t < s.S; ++t)
            for (int64_t i = 0; i < n; i += W) store(dy[0][t] + i, load(dy[0][t] + i) * tokens.gamma[t]);
        }
        give(s.dbeta, 1, 1, room.numbers);
      }
      if (s.gates == 1) {
        for (int64_t t = 0; t < padded; ++t) tokens.gate.at[t] = room.ones;
        dots<false>(s.S, n, room.dgate.in_place(padded), tokens.gate.at, nullptr, room.numbers);
        give(s.dgate, 1, 1, room.numbers);
        float idle = 0.0f;
        for (int64_t t = 0; t < s.S; ++t) idle += tokens.reads[t] < 0 ? room.numbers[t] : 0.0f;
        if (s.idle) s.partial_idle[(b * s.K + k) * s.H + h] = idle;
      } else {
        give(s.dgate, s.N, n, room.dgate.data);
      }
      give(s.dq, s.N, n, dx[READ][0]), give(s.dk, s.N, n, dy[WRITE][0]), give(s.dv, s.M, m, dz[WRITE][0]);
      if (F::READS == 2 && F::WRITES == 2) give(s.da, s.N, n, dx[0][0]), give(s.db, s.N, n, dy[0][0]);
    }
  }
}

static void matrix_backward(const Matrix& s, int64_t begin, int64_t end) {
  with_rule(s, [&](auto rule, auto decay) { matrix_backward_as<decltype(rule), decay()>(s, begin, end); });
}
