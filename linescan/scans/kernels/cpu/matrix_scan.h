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
  static constexpr bool AFTER[2] = {true}, OWN[2][2] = {{true}};
};
struct Late : Gated {  // o = (S + diag(u) k v^T)^T q, then S = diag(a) S + k v^T
  static constexpr bool AFTER[2] = {false}, BONUS = true;
};
struct Delta {  // P = diag(a) S, S = P + beta k (v - P^T k)^T, o = S^T q
  static constexpr int READS = 2, WRITES = 1;
  static constexpr bool DEPENDENT = true, TIED = true, BONUS = false;
  static constexpr bool AFTER[2] = {true, true}, OWN[2][2] = {{false}, {true}};
};
struct LowRank {  // S = diag(a) S + b (S^T c)^T + k v^T, o = S^T q
  static constexpr int READS = 2, WRITES = 2;
  static constexpr bool DEPENDENT = true, TIED = false, BONUS = false;
  static constexpr bool AFTER[2] = {false, true}, OWN[2][2] = {{}, {true, true}};
};

// Whether a state only ever takes more in.
template <class F, bool DECAY>
constexpr bool ADDS_UP = !DECAY && !F::DEPENDENT;

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

// Rows of tokens where they stand: that of step t is token[t] times `pitch` behind the first, or `missing`.
struct Rows {
  float* first = nullptr;
  int64_t pitch = 0;
  const int64_t* token = nullptr;
  float* missing = nullptr;

  explicit operator bool() const { return first != nullptr; }
  float* operator[](int64_t t) const { return token[t] < 0 ? missing : first + token[t] * pitch; }
};

// A walk of a state through time.
struct Walk {
  int64_t rows = 0, stride = 0, columns = 0;  // of the state; rows as whole vectors; columns as whole vectors
  float *state = nullptr, *coefficients = nullptr;
  Rows x[2], y[2], z[2], out[2];  // of reads and writes
  Rows base, gate;  // log decays, of rows or `single` ones
  bool single = false;
  float *decay = nullptr, *carry = nullptr;  // made as the walk goes where there is a `gate`
  const float *gamma = nullptr, *bonus = nullptr;
  float scale = 1.0f, skip = 0.0f;  // of the last read; added to the score of an own write

  // Decays stand block by block: those of its tokens, then that of all of them.
  float* decay_of(int64_t t, int64_t n) const { return decay + (t / BLOCK * (BLOCK + 1) + t % BLOCK) * n; }
  float* decay_of_block(int64_t t, int64_t n) const { return decay + (t / BLOCK * (BLOCK + 1) + BLOCK) * n; }
};

// Tokens of a block, and those a while later, whose rows are called from memory.
struct Block {
  int64_t at[BLOCK], later[BLOCK];

  __attribute__((always_inline)) float* row(const Rows& rows, int t, int64_t begin, int64_t end) const {
    const float* other = rows[later[t]];
    for (int64_t i = begin; i < end; i += 16) __builtin_prefetch(other + i);
    return rows[at[t]];
  }
};

// Decays of a block. That of the whole block meets a state again and again, so that its rounding errors must not pile up:
// where it is near 1, e^x - 1 is known to more digits, and what rounding takes from a block is given to the next.
static void make_decays(const Walk& s, const Block& block) {
  const int64_t n = s.stride;
  float* whole = s.decay_of_block(block.at[0], n);
  for (int64_t i = 0; i < (s.single ? W : n); i += W) {
    V product = splat(1.0f), sum = load(s.carry + i);
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      const float* row = block.row(s.gate, t, i, i + 1);
      const V gate = s.single ? splat(*row) : load(row + i), decay = exp(gate);
      store(s.decay_of(block.at[t], n) + i, decay);
      product *= decay, sum += gate;
    });
    const V less = sum + sum * sum * (0.5f + sum * (1.0f / 6 + sum * (1.0f / 24 + sum * (1.0f / 120))));
    const V rounded = less + 1.0f;
    const auto near = absolute(sum) < 1.0f / 16;
    store(s.carry + i, near ? less - (rounded - 1.0f) : V{});
    store(whole + i, near ? rounded : product);
  }
  for (int64_t i = W; s.single && i < n; i += W)
    for (float* row = s.decay_of(block.at[0], n); row <= whole; row += n) store(row + i, load(row));
}

// Coefficients of a block's reads and writes, with the decays from and to the block's ends, and its scores.
template <class F, bool DECAY>
__attribute__((noinline)) static void weigh(const Walk& s, const Block& block, float* __restrict scores) {
  const int64_t(&at)[BLOCK] = block.at;
  const float *of_x[F::READS][BLOCK], *of_y[BLOCK];
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE { of_x[r][t] = block.row(s.x[r], t, 0, s.stride); });
  });
  each<F::WRITES>([&](auto w) LINESCAN_STAGE {
    V sums[SCORES<F>];
    each<SCORES<F>>([&](auto i) LINESCAN_STAGE { sums[i] = V{}; });
    each<BLOCK>([&](auto t) LINESCAN_STAGE { of_y[t] = block.row(s.y[w], t, 0, s.stride); });
    for (int64_t i = 0; i < s.stride; i += W) {
      float* lines = s.coefficients + i / PITCH * PITCH * LINES<F> + i % PITCH;
      V decay[BLOCK], x[F::READS][BLOCK];
      each<BLOCK>([&](auto t) LINESCAN_STAGE {
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          x[r][t] = load(of_x[r][t] + i);
        });
        if (DECAY) decay[t] = load(s.decay_of(at[t], s.stride) + i);
      });
      if (w == 0) {
        V whole = splat(1.0f);
        const auto keep = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after)
              store(lines + (r * BLOCK + t) * PITCH, DECAY && (after || t > 0) ? x[r][t] * whole : x[r][t]);
          });
        };
        each<BLOCK>([&](auto t) LINESCAN_STAGE {
          keep(t, false);
          if (DECAY) whole = t == 0 ? decay[t] : whole * decay[t];
          keep(t, true);
        });
        if (DECAY) store(lines + (LINES<F> - 1) * PITCH, load(s.decay_of_block(at[0], s.stride) + i));
      }
      each<BLOCK>([&](auto from) LINESCAN_STAGE {
        V y = load(of_y[from] + i);
        const auto meet = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] == after) sums[score<F>(r, w, t, from) - SCORES<F> * w] += x[r][t] * y;
          });
        };
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          if constexpr (F::OWN[r][w])
            sums[score<F>(r, w, from, from) - SCORES<F> * w] +=
                x[r][from] * (F::BONUS ? y * load(s.bonus + i) : y);
        });
        each<BLOCK - 1 - from>([&](auto later) LINESCAN_STAGE {
          constexpr std::integral_constant<int, from + 1 + later> t;
          meet(t, false);
          if (DECAY) y *= decay[t];
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

// state = decay state + sum over c of coefficient c times z[c]; the decay is the line after them.
template <bool DECAY, int COUNT, int VECTORS, int ALL>
LINESCAN_INLINE void write(int64_t rows, int64_t pitch, float* state, const float* lines,
                           const V (&z)[COUNT][VECTORS]) {
  for (int64_t first = 0; first < rows; first += PITCH, lines += PITCH * ALL) {
    const int64_t some = rows - first < PITCH ? rows - first : PITCH;
    for (int64_t i = 0; i < some; ++i, state += pitch) {
      V row[VECTORS];
      each<VECTORS>([&](auto l) LINESCAN_STAGE {
        row[l] = load(state + l * W);
        if (DECAY) row[l] *= splat(lines[COUNT * PITCH + i]);
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
template <class F, bool DECAY, int VECTORS>
__attribute__((noinline)) static void sweep(const Walk& s, const Block& block, int64_t column,
                                            const float* __restrict scores) {
  const int64_t(&at)[BLOCK] = block.at;
  constexpr int64_t WIDTH = VECTORS * W;
  V out[F::READS * BLOCK][VECTORS], z[F::WRITES * BLOCK][VECTORS];
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  read<F::READS * BLOCK, VECTORS, LINES<F>>(s.rows, s.columns, s.state + column, s.coefficients, out);
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      if (F::DEPENDENT && w == 0) return;
      const float* row = block.row(s.z[w], t, column, column + WIDTH) + column;
      vectors([&](auto l) LINESCAN_STAGE {
        z[w * BLOCK + t][l] = load(row + l * W);
      });
    });
  });
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE {
      V(&mine)[VECTORS] = out[r * BLOCK + t];
      each<F::WRITES>([&](auto w) LINESCAN_STAGE {
        each<t + 1>([&](auto from) LINESCAN_STAGE {
          if constexpr (from < t || F::OWN[r][w]) {
            const float weight = scores[score<F>(r, w, t, from)] + (from == t && !F::DEPENDENT ? s.skip : 0.0f);
            vectors([&](auto l) LINESCAN_STAGE { mine[l] += weight * z[w * BLOCK + from][l]; });
          }
        });
      });
      if constexpr (F::DEPENDENT && r == 0) {
        if (s.base) {
          const float* row = block.row(s.base, t, column, column + WIDTH) + column;
          vectors([&](auto l) LINESCAN_STAGE { mine[l] -= load(row + l * W); });
        }
        vectors([&](auto l) LINESCAN_STAGE { z[t][l] = s.gamma[at[t]] * mine[l]; });
      }
      if (s.out[r]) {
        float* row = block.row(s.out[r], t, column, column + WIDTH) + column;
        vectors([&](auto l) LINESCAN_STAGE { store(row + l * W, r == F::READS - 1 ? s.scale * mine[l] : mine[l]); });
      }
    });
  });
  write<DECAY, F::WRITES * BLOCK, VECTORS, LINES<F>>(s.rows, s.columns, s.state + column,
                                                     s.coefficients + F::READS * BLOCK * PITCH, z);
}

// The same without decays and dependent writes: rows of the state go from token to token in a register, and there is
// nothing to weigh. A token reads its own write.
template <int VECTORS>
__attribute__((noinline)) static void add_up(const Walk& s, const Block& block, int64_t column) {
  V out[BLOCK][VECTORS], z[BLOCK][VECTORS];
  const float *x[BLOCK], *y[BLOCK];
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    x[t] = block.row(s.x[0], t, 0, s.stride), y[t] = block.row(s.y[0], t, 0, s.stride);
    const float* row = block.row(s.z[0], t, column, column + VECTORS * W) + column;
    vectors([&](auto l) LINESCAN_STAGE { z[t][l] = load(row + l * W), out[t][l] = V{}; });
  });
  float* state = s.state + column;
  for (int64_t i = 0; i < s.rows; ++i, state += s.columns) {
    V row[VECTORS];
    vectors([&](auto l) LINESCAN_STAGE { row[l] = load(state + l * W); });
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      vectors([&](auto l) LINESCAN_STAGE { row[l] += y[t][i] * z[t][l]; });
      vectors([&](auto l) LINESCAN_STAGE { out[t][l] += x[t][i] * row[l]; });
    });
    vectors([&](auto l) LINESCAN_STAGE { store(state + l * W, row[l]); });
  }
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    float* row = block.row(s.out[0], t, column, column + VECTORS * W) + column;
    vectors([&](auto l) LINESCAN_STAGE { store(row + l * W, s.scale * out[t][l]); });
  });
}

// The first `count` tokens, whole blocks of them.
template <class F, bool DECAY>
static void walk(const Walk& s, int64_t count) {
  constexpr int VECTORS = W == 16 ? 2 : F::READS == 1 && F::WRITES == 1 ? 2 : 1;  // as many as registers hold
  alignas(64) float scores[SCORES<F> * F::WRITES];
  for (int64_t start = 0; start < count; start += BLOCK) {
    Block block;
    for (int t = 0; t < BLOCK; ++t) {
      const int64_t at = start + t;
      block.at[t] = at, block.later[t] = at + AHEAD < count ? at + AHEAD : count - 1;
    }
    if (DECAY) make_decays(s, block);
    if constexpr (ADDS_UP<F, DECAY>) {
      int64_t column = 0;
      for (; column + VECTORS * W <= s.columns; column += VECTORS * W) add_up<VECTORS>(s, block, column);
      for (; column < s.columns; column += W) add_up<1>(s, block, column);
    } else {
      weigh<F, DECAY>(s, block, scores);
      int64_t column = 0;
      for (; column + VECTORS * W <= s.columns; column += VECTORS * W)
        sweep<F, DECAY, VECTORS>(s, block, column, scores);
      if constexpr (VECTORS > 1)
        for (; column < s.columns; column += W) sweep<F, DECAY, 1>(s, block, column, scores);
    }
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

// out[t] = x_t . (sum + y_0 + ... + y_t), which also adds up the sum; for whole vectors of t.
__attribute__((noinline)) static void running_dots(int64_t count, int64_t n, const Rows& x, const Rows& y,
                                                   float* __restrict sum, float* __restrict out) {
  for (int64_t first = 0; first < count; first += W) {
    const int64_t some = count - first < W ? count - first : W;
    alignas(64) float lanes[W * W];
    for (int64_t t = some; t < W; ++t) store(lanes + t * W, V{});
    for (int64_t i = 0; i < n; i += W) {
      V other = load(sum + i);
      for (int64_t t = 0; t < some; ++t) {
        other += load(y[first + t] + i);
        const V product = load(x[first + t] + i) * other;
        store(lanes + t * W, i ? load(lanes + t * W) + product : product);
      }
      store(sum + i, other);
    }
    store(out + first, lane_sums<W>(lanes));
  }
}

constexpr int64_t ROOM = 128;  // tokens whose rows are looked up at a time, whole blocks

// What a unit of work reads of its tokens, filled up to whole blocks with tokens that do nothing.
struct Tokens {
  int64_t n, m;
  float *of_q, *of_k, *of_written, *of_v, *of_a, *of_b, *of_gate;  // rows that cannot be read where they stand
  float *gamma, *numbers, *blank, *dropped, *bonus, *carry;
  int64_t *reads, *writes, *order;  // `order` counts up: rows one after the other
  Rows q, k, written, v, a, b;      // `written`: the keys times beta, where a rule writes them so

  Tokens(Arena& arena, const Matrix& s, int64_t columns)
      : n(whole_vectors(s.N)), m(whole_vectors(columns)), of_q(rows(arena, n)),
        of_k(rows(arena, n)), of_written(rows(arena, n)), of_v(rows(arena, m)), of_a(rows(arena, n)),
        of_b(rows(arena, n)), of_gate(rows(arena, n)), gamma(arena.take(ROOM + W)),
        numbers(arena.take(ROOM + W)), blank(arena.take(n > m ? n : m)), dropped(arena.take(n > m ? n : m)),
        bonus(arena.take(n)), carry(arena.take(n)), reads(take<int64_t>(arena, ROOM)),
        writes(take<int64_t>(arena, ROOM)), order(take<int64_t>(arena, ROOM)) {
    if (arena.counts()) return;
    zero(blank, n > m ? n : m);
    for (int64_t t = 0; t < ROOM; ++t) order[t] = t, gamma[t] = 1.0f;
  }

  float* rows(Arena& arena, int64_t width) const { return arena.take(ROOM * width); }
  Rows in_place(float* data, int64_t width) const { return {data, width, order, dropped}; }

  // Rows of an input, where they stand if they are whole vectors of float32, else in a buffer.
  Rows read(const View& x, int64_t b, int64_t k, int64_t g, int64_t channel, const int64_t* token, int64_t count,
            int64_t width, float* buffer) const {
    if (!x) return {};
    if (is_direct<W>(x, width)) return {reinterpret_cast<float*>(x.at(b, k, g, channel)), x.token, token, blank};
    gather(x, b, k, g, channel, token, count, width, whole_vectors(width), buffer);
    return in_place(buffer, whole_vectors(width));
  }

  void fetch(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t column, int64_t width, int64_t t0, int64_t count);

  // The recurrence as it goes, without its outputs. `decay`: room for the decays.
  template <class F, bool DECAY>
  Walk start(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t count, float* decay);
  static int64_t decays(int64_t rows) { return rows / BLOCK * (BLOCK + 1); }
};

void Tokens::fetch(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t column, int64_t width, int64_t t0,
                   int64_t count) {
  const int64_t padded = whole_blocks(count);
  s.route.steps(b, k, t0, count, reads, writes);
  for (int64_t t = count; t < padded; ++t) reads[t] = writes[t] = -1;
  const auto keys = [&](const View& x, int64_t group, float* buffer) {
    return read(x, b, k, group, 0, reads, padded, s.N, buffer);
  };
  q = keys(s.q, h / s.share, of_q), written = this->k = keys(s.k, h / s.share, of_k);
  a = keys(s.a, h, of_a), this->b = keys(s.b, h, of_b);
  v = read(s.v, b, k, h, column, reads, padded, width, of_v);
  if (!s.beta) return;
  gather(s.beta, b, k, h, 0, reads, padded, 1, 1, gamma);
  if (s.rule == Rule::delta) {
    for (int64_t t = 0; t < padded; ++t) gamma[t] = -gamma[t];
  } else {
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t i = 0; i < n; i += W) store(of_written + t * n + i, gamma[t] * load(this->k[t] + i));
    written = in_place(of_written, n);
  }
}

template <class F, bool DECAY>
Walk Tokens::start(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t count, float* decay) {
  Walk w;
  w.rows = s.N, w.stride = n, w.columns = m;
  if (F::TIED) w.x[0] = this->k, w.base = v;
  else w.x[0] = a, w.y[0] = this->b;
  w.x[F::READS - 1] = q, w.y[F::WRITES - 1] = written, w.z[F::WRITES - 1] = v;
  w.decay = decay, w.gamma = gamma, w.bonus = bonus, w.skip = s.skip ? *(s.skip.at(b, k) + h) : 0.0f;
  if (!DECAY) return w;
  const int64_t padded = whole_blocks(count);
  w.carry = carry, w.single = s.gates == 1;
  if (!w.single) {
    w.gate = read(s.gate, b, k, h, 0, reads, padded, s.N, of_gate);
  } else {
    gather(s.gate, b, k, h, 0, reads, padded, 1, 1, numbers);
    for (int64_t t = 0; s.idle && t < count; ++t)
      if (reads[t] < 0) numbers[t] = *(s.idle.at(b, k) + h);
    w.gate = {numbers, 1, order, blank};
  }
  return w;
}

// A state (rows, columns), its rows `pitch` apart, to one of whole vectors, and back. Without: zero.
static void unpack(const float* x, int64_t rows, int64_t columns, int64_t pitch, float* out) {
  const int64_t wide = whole_vectors(columns);
  zero(out, rows * wide);
  for (int64_t i = 0; x && i < rows; ++i) std::memcpy(out + i * wide, x + i * pitch, columns * 4);
}
static void pack(const float* x, int64_t rows, int64_t columns, int64_t pitch, float* out) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * pitch, x + i * whole_vectors(columns), columns * 4);
}

// The sum of keys is the column after the last of a normalised recurrence's state.
static void column(const float* state, int64_t rows, int64_t pitch, float* out) {
  for (int64_t i = 0; i < whole_vectors(rows); ++i) out[i] = state && i < rows ? state[i * pitch] : 0.0f;
}

constexpr float SMALLEST = 1e-10f;  // added to what outputs are divided by

static int64_t coefficients(int64_t rows) { return (rows + PITCH - 1) / PITCH * PITCH * LINES<LowRank>; }
static float* of_head(const Parameter& x, int64_t b, int64_t k, int64_t at) { return x ? x.at(b, k) + at : nullptr; }

// -- a unit of work -----------------------------------------------------------------------------------------------------

struct ForwardRoom {
  Tokens tokens;
  float *decay, *of_y, *state, *lines, *sum, *divisor;

  ForwardRoom(Arena& arena, const Matrix& s)
      : tokens(arena, s, s.width), decay(arena.take(Tokens::decays(ROOM) * tokens.n)),
        of_y(tokens.rows(arena, tokens.m)), state(arena.take(s.N * tokens.m)),
        lines(arena.take(coefficients(s.N))), sum(arena.take(tokens.n)), divisor(arena.take(ROOM + W)) {}
};

template <class F, bool DECAY>
static void matrix_forward_as(const Matrix& s, int64_t begin, int64_t end) {
  ForwardRoom room = place<ForwardRoom>(s);
  Tokens& tokens = room.tokens;
  const int64_t parts = s.parts(), heads = s.H * parts, per_sample = s.merge ? heads : heads * s.K;
  const int64_t pitch = s.M + s.normalize;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / per_sample, h = unit % heads / parts, first = unit % parts * s.width;
    const int64_t width = s.M - first < s.width ? s.M - first : s.width, channel = h * s.M + first;
    const int64_t k0 = s.merge ? 0 : unit % per_sample / heads, k1 = s.merge ? s.K : k0 + 1;
    for (int64_t k = k0; k < k1; ++k) {
      const float* initial = of_head(s.initial, b, k, h * s.N * pitch);
      float* last = s.state.at(b, k) + h * s.N * pitch;
      unpack(initial ? initial + first : nullptr, s.N, width, pitch, room.state);
      if (s.normalize) column(initial ? initial + s.M : nullptr, s.N, pitch, room.sum);
      if (s.bonus) column(s.bonus.at(b, k) + h * s.N, s.N, 1, tokens.bonus);
      zero(tokens.carry, tokens.n);
      const Target target = s.y.of_route(k);
      const bool direct = !target.add && is_direct<W>(target.view, width);
      if (!target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = 0; t0 < s.S; t0 += ROOM) {
        const int64_t count = s.S - t0 < ROOM ? s.S - t0 : ROOM;
        tokens.fetch(s, b, k, h, first, width, t0, count);
        Walk forth = tokens.start<F, DECAY>(s, b, k, h, count, room.decay);
        forth.state = room.state, forth.coefficients = room.lines, forth.columns = whole_vectors(width);
        forth.scale = s.scale;
        const Rows y = direct ? Rows{reinterpret_cast<float*>(target.view.at(b, k, 0, channel)), target.view.token,
                                     tokens.writes, tokens.dropped}
                              : tokens.in_place(room.of_y, forth.columns);
        forth.out[F::READS - 1] = y;
        walk<F, DECAY>(forth, whole_blocks(count));
        if (s.normalize) {
          running_dots(count, tokens.n, tokens.q, tokens.k, room.sum, room.divisor);
          for (int64_t t = 0; t < count; t += W)
            store(room.divisor + t, 1.0f / (s.scale * load(room.divisor + t) + SMALLEST));
          for (int64_t t = 0; t < count; ++t)
            for (int64_t j = 0; j < forth.columns; j += W) store(y[t] + j, load(y[t] + j) * room.divisor[t]);
        }
        if (!direct) scatter(target, b, k, channel, tokens.writes, count, width, forth.columns, room.of_y);
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
