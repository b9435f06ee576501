// Recurrences of matrix states for one instruction set. Included inside its namespace; hence no include guard.
//
// A state has rows (keys) and columns (values, the lanes of vectors). A token decays it, writes outer products y z^T
// into it, and reads x^T S out of it. Tokens are taken in blocks of BLOCK: of the state that enters a block all reads
// are made at once, what the block's tokens have to do with each other are products of rows (`scores`), and then the
// state takes all writes at once. So it is loaded once (twice where writes wait for reads) and stored once in BLOCK tokens,
// and an element costs READS + WRITES + 1 / BLOCK multiply-adds a token, where its equation has one for the decay and one
// more for the first write. Decays only ever multiply, so none is larger than 1.

constexpr int BLOCK = Matrix::BLOCK;
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
// write takes columns gamma (first read - base). BONUS: rows are weighed in what a token reads of its own write. PRE:
// writes that the token's decay meets too. STEP: from a token to the next one.
struct Gated {  // S = diag(a) S + k v^T, o = S^T q
  static constexpr int READS = 1, WRITES = 1, STEP = 1;
  static constexpr bool DEPENDENT = false, TIED = false, BONUS = false;
  static constexpr bool AFTER[2] = {true}, PRE[2] = {}, OWN[2][2] = {{true}};
};
struct Late : Gated {  // o = (S + diag(u) k v^T)^T q, then S = diag(a) S + k v^T
  static constexpr bool AFTER[2] = {false}, BONUS = true;
};
struct Delta {  // P = diag(a) S, S = P + beta k (v - P^T k)^T, o = S^T q
  static constexpr int READS = 2, WRITES = 1, STEP = 1;
  static constexpr bool DEPENDENT = true, TIED = true, BONUS = false;
  static constexpr bool AFTER[2] = {true, true}, PRE[2] = {}, OWN[2][2] = {{false}, {true}};
};
struct LowRank {  // S = diag(a) S + b (S^T c)^T + k v^T, o = S^T q
  static constexpr int READS = 2, WRITES = 2, STEP = 1;
  static constexpr bool DEPENDENT = true, TIED = false, BONUS = false;
  static constexpr bool AFTER[2] = {false, true}, PRE[2] = {}, OWN[2][2] = {{}, {true, true}};
};

// The same without outputs: of the reads only those that writes depend on.
template <class F>
struct Silent : F {
  static constexpr int READS = F::DEPENDENT;
};

// The adjoint, a recurrence of the same kind from the last token to the first: what was written with is read with, and
// the other way round. Its reads come before the decay, its writes before (PRE) or after it.
template <class F>
struct Adjoint {
  static constexpr int READS = F::WRITES, WRITES = F::READS, STEP = -1;
  static constexpr bool DEPENDENT = F::DEPENDENT, BONUS = F::BONUS;
  static constexpr bool AFTER[2] = {}, PRE[2] = {F::AFTER[0], F::AFTER[1]},
                        OWN[2][2] = {{F::OWN[0][0], F::OWN[1][0]}, {F::OWN[0][1], F::OWN[1][1]}};
};

// Whether a state only ever takes more in.
template <class F, bool DECAY>
constexpr bool ADDS_UP = !DECAY && std::is_same_v<F, Gated>;

// Scores of a block, write by write: for every read those of a later read with an earlier write, then the token's own.
constexpr int PAIRS = BLOCK * (BLOCK - 1) / 2;
template <class F>
constexpr int scores_before(int read, int write) {
  int count = 0;
  for (int r = 0; r < read; ++r) count += PAIRS + (F::OWN[r][write] ? BLOCK : 0);
  return count;
}
template <class F>
constexpr int SCORES = (std::max(scores_before<F>(F::READS, F::WRITES - 1), 1) + W - 1) / W * W;  // of a write
template <class F>
constexpr int score(int read, int write, int t, int s) {
  return SCORES<F> * write + scores_before<F>(read, write) + (t == s ? PAIRS + t : t * (t - 1) / 2 + s);
}
template <class F>
constexpr int LINES = (F::READS + F::WRITES) * BLOCK + 1;  // of coefficients
template <class F>
constexpr int SLOTS = F::READS > 0 ? F::READS : 1;  // an array must not be empty

// -- a block of tokens --------------------------------------------------------------------------------------------------

typedef float* const* Rows;  // of tokens, where they stand

// A walk of a state through time.
struct Walk {
  int64_t rows = 0, stride = 0, columns = 0;  // of the state; rows as whole vectors; columns as whole vectors
  float *state = nullptr, *coefficients = nullptr;
  Rows x[2] = {}, y[2] = {}, z[2] = {}, out[2] = {};  // of reads and writes
  Rows base = nullptr, gate = nullptr;  // log decays, of rows or, with what they come to, `single` ones
  const float *single = nullptr, *single_decay = nullptr;
  float *decay = nullptr, *carry = nullptr;  // made as the walk goes where there are log decays
  const float *gamma = nullptr, *bonus = nullptr, *factor = nullptr;  // the last: of the last read
  float skip = 0.0f;    // so many times the rows of the last write are added to the last read
  bool adds = false;    // the last read to what its rows hold
  bool scaled = false;  // what is written by gamma, where no write is dependent

  // Decays of the tokens of a block that begins with token t, then that of all of them.
  float* decays(int64_t t) const { return decay + t / BLOCK * (BLOCK + 1) * stride; }
};

// A block in the order of a walk through `count` tokens: the first one, and one a while later, from which on rows are
// called from memory.
template <class F>
struct Block {
  int64_t first, later;

  Block(int64_t start, int64_t count) {
    const int64_t ahead = start + AHEAD < count ? start + AHEAD : start;
    first = F::STEP > 0 ? start : count - 1 - start, later = F::STEP > 0 ? ahead : count - 1 - ahead;
  }

  LINESCAN_STAGE int64_t at(int t) const { return first + F::STEP * t; }
  LINESCAN_STAGE int64_t begin() const { return F::STEP > 0 ? first : first - (BLOCK - 1); }  // in time
  LINESCAN_STAGE float* row(Rows rows, int t, int64_t begin, int64_t end) const {
    const float* other = rows[later + F::STEP * t];
    for (int64_t i = begin; i < end; i += 16) __builtin_prefetch(other + i);
    return rows[at(t)];
  }
};

// Decays of a block. That of the whole block meets a state again and again, so that its rounding errors must not pile up:
// where it is near 1, e^x - 1 is known to more digits, and what rounding takes from a block is given to the next.
template <class F>
__attribute__((noinline)) static void make_decays(const Walk& s, const Block<F>& block) {
  const int64_t n = s.stride;
  float* const decays = s.decays(block.first);
  const float* rows[BLOCK] = {};
  each<BLOCK>([&](auto t) LINESCAN_STAGE { rows[t] = s.gate ? block.row(s.gate, t, 0, n) : nullptr; });
  for (int64_t i = 0; i < n; i += W) {
    V product = splat(1.0f), sum = load(s.carry + i);
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      const V gate = s.gate ? load(rows[t] + i) : splat(s.single[block.at(t)]);
      const V decay = s.gate ? exp(gate) : splat(s.single_decay[block.at(t)]);
      store(decays + t * n + i, decay);
      product *= decay, sum += gate;
    });
    const V less = sum + sum * sum * (0.5f + sum * (1.0f / 6 + sum * (1.0f / 24 + sum * (1.0f / 120))));
    const V rounded = less + 1.0f;
    const auto near = absolute(sum) < 1.0f / 16;
    store(s.carry + i, near ? less - (rounded - 1.0f) : V{});
    store(decays + BLOCK * n + i, near ? rounded : product);
  }
}

// Coefficients of a block's reads and writes, with the decays from and to the block's ends, and its scores.
template <class F, bool DECAY>
__attribute__((noinline)) static void weigh(const Walk& s, const Block<F>& block, float* __restrict scores) {
  const int64_t n = s.stride;
  const float* const decays = s.decays(block.begin());
  const float *of_x[SLOTS<F>][BLOCK], *of_y[BLOCK];
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE { of_x[r][t] = block.row(s.x[r], t, 0, n); });
  });
  each<F::WRITES>([&](auto w) LINESCAN_STAGE {
    V sums[SCORES<F>];
    each<SCORES<F>>([&](auto i) LINESCAN_STAGE { sums[i] = V{}; });
    each<BLOCK>([&](auto t) LINESCAN_STAGE { of_y[t] = block.row(s.y[w], t, 0, n); });
    for (int64_t i = 0; i < n; i += W) {
      float* lines = s.coefficients + i / PITCH * PITCH * LINES<F> + i % PITCH;
      V decay[BLOCK], x[SLOTS<F>][BLOCK];
      each<BLOCK>([&](auto t) LINESCAN_STAGE {
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          x[r][t] = load(of_x[r][t] + i);
        });
        if (DECAY) decay[t] = load(decays + (F::STEP > 0 ? t : BLOCK - 1 - t) * n + i);
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
        if (DECAY) store(lines + (LINES<F> - 1) * PITCH, load(decays + BLOCK * n + i));
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
        if (DECAY && F::PRE[w]) y *= decay[from];
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

// Goes through VECTORS of a state's columns, row by row. Where there are READS, out[c] = sum over the rows of the READ_LINE
// + c-th of ALL coefficients times the state; where there are WRITES, then to = decay state + sum over c of the WRITE_LINE
// + c-th coefficient times z[c]. The decay is the last coefficient, or `whole` with COLUMNS. MEET: `flow` is the sum over
// the rows of the state times another one.
template <int READS, int READ_LINE, int WRITES, int WRITE_LINE, int ALL, bool DECAY, bool COLUMNS, bool MEET, int VECTORS>
LINESCAN_INLINE void pass(int64_t rows, int64_t pitch, const float* state, float* to, const float* lines, V (*out)[VECTORS],
                          const V (*z)[VECTORS], const V* whole = nullptr, const float* other = nullptr,
                          V* flow = nullptr) {
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  each<READS>([&](auto c) LINESCAN_STAGE { vectors([&](auto l) LINESCAN_STAGE { out[c][l] = V{}; }); });
  if (MEET) vectors([&](auto l) LINESCAN_STAGE { flow[l] = V{}; });
  for (int64_t first = 0; first < rows; first += PITCH, lines += PITCH * ALL) {
    const int64_t some = rows - first < PITCH ? rows - first : PITCH;
    for (int64_t i = 0; i < some; ++i, state += pitch, to += pitch) {
      V row[VECTORS];
      vectors([&](auto l) LINESCAN_STAGE { row[l] = load(state + l * W); });
      if constexpr (MEET) {
        vectors([&](auto l) LINESCAN_STAGE { flow[l] += row[l] * load(other + l * W); });
        other += pitch;
      }
      each<READS>([&](auto c) LINESCAN_STAGE {
        const V x = splat(lines[(READ_LINE + c) * PITCH + i]);
        vectors([&](auto l) LINESCAN_STAGE { out[c][l] += x * row[l]; });
      });
      if constexpr (WRITES > 0) {
        if (DECAY)
          vectors([&](auto l) LINESCAN_STAGE { row[l] *= COLUMNS ? whole[l] : splat(lines[(ALL - 1) * PITCH + i]); });
        each<WRITES>([&](auto c) LINESCAN_STAGE {
          const V y = splat(lines[(WRITE_LINE + c) * PITCH + i]);
          vectors([&](auto l) LINESCAN_STAGE { row[l] += y * z[c][l]; });
        });
        vectors([&](auto l) LINESCAN_STAGE { store(to + l * W, row[l]); });
      }
    }
  }
}

// Brings what a token reads last to its row.
template <class F, int VECTORS>
LINESCAN_INLINE void finish(const Walk& s, int64_t t, int64_t column, const V (&read)[VECTORS], float* row) {
  each<VECTORS>([&](auto l) LINESCAN_STAGE {
    V out = read[l];
    if (s.skip != 0.0f) out += s.skip * load(s.z[F::WRITES - 1][t] + column + l * W);
    out *= s.factor[t];
    store(row + l * W, s.adds ? out + load(row + l * W) : out);
  });
}

// Takes a block through VECTORS of the state's columns: reads, what its tokens have to do with each other, writes.
template <class F, bool DECAY, int VECTORS>
__attribute__((noinline)) static void sweep(const Walk& s, const Block<F>& block, int64_t column,
                                            const float* __restrict scores) {
  constexpr int64_t WIDTH = VECTORS * W;
  V out[SLOTS<F> * BLOCK][VECTORS], z[F::WRITES * BLOCK][VECTORS];
  float* const state = s.state + column;
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  const auto go = [&](auto reads, auto writes) LINESCAN_STAGE {
    constexpr int READS = reads ? F::READS * BLOCK : 0, WRITES = writes ? F::WRITES * BLOCK : 0;
    pass<READS, 0, WRITES, F::READS * BLOCK, LINES<F>, DECAY, false, false>(s.rows, s.columns, state, state,
                                                                            s.coefficients, out, z);
  };
  const std::true_type yes;
  const std::false_type no;
  if (F::DEPENDENT) go(yes, no);
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      if (F::DEPENDENT && w == 0) return;
      const float* row = block.row(s.z[w], t, column, column + WIDTH) + column;
      vectors([&](auto l) LINESCAN_STAGE {
        z[w * BLOCK + t][l] = load(row + l * W);
        if (!F::DEPENDENT && s.scaled) z[w * BLOCK + t][l] *= s.gamma[block.at(t)];
      });
    });
  });
  if (!F::DEPENDENT) go(yes, yes);
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE {
      V(&mine)[VECTORS] = out[r * BLOCK + t];
      each<F::WRITES>([&](auto w) LINESCAN_STAGE {
        each<t + 1>([&](auto from) LINESCAN_STAGE {
          if constexpr (from < t || F::OWN[r][w]) {
            const float weight = scores[score<F>(r, w, t, from)];
            vectors([&](auto l) LINESCAN_STAGE { mine[l] += weight * z[w * BLOCK + from][l]; });
          }
        });
      });
      if constexpr (F::DEPENDENT && r == 0) {
        if (s.base) {
          const float* row = block.row(s.base, t, column, column + WIDTH) + column;
          vectors([&](auto l) LINESCAN_STAGE { mine[l] -= load(row + l * W); });
        }
        vectors([&](auto l) LINESCAN_STAGE { z[t][l] = s.gamma[block.at(t)] * mine[l]; });
      }
      if (s.out[r]) {
        float* row = block.row(s.out[r], t, column, column + WIDTH) + column;
        if constexpr (r == F::READS - 1 && !(F::DEPENDENT && r == 0)) finish<F>(s, block.at(t), column, mine, row);
        else vectors([&](auto l) LINESCAN_STAGE { store(row + l * W, mine[l]); });
      }
    });
  });
  if (F::DEPENDENT) go(no, yes);
}

// The same without decays and dependent writes: rows of the state go from token to token in a register, and there is
// nothing to weigh. A token reads its own write.
template <int VECTORS>
__attribute__((noinline)) static void add_up(const Walk& s, const Block<Gated>& block, int64_t column) {
  V out[BLOCK][VECTORS], z[BLOCK][VECTORS];
  const float *x[BLOCK], *y[BLOCK];
  const int64_t rows = s.rows, pitch = s.columns;
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    x[t] = block.row(s.x[0], t, 0, s.stride), y[t] = block.row(s.y[0], t, 0, s.stride);
    const float* row = block.row(s.z[0], t, column, column + VECTORS * W) + column;
    vectors([&](auto l) LINESCAN_STAGE { z[t][l] = s.gamma[block.at(t)] * load(row + l * W), out[t][l] = V{}; });
  });
  float* state = s.state + column;
  for (int64_t i = 0; i < rows; ++i, state += pitch) {
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
    finish<Gated>(s, block.at(t), column, out[t], row);
  });
}

// As many vectors of a state's columns as registers hold with what a block reads and writes. One alone takes coefficients
// from memory as it multiplies.
template <class F>
constexpr int SIDE_BY_SIDE = BLOCK * (F::READS + F::WRITES) * 2 + 4 <= (W == 16 ? 32 : 16) ? 2 : 1;

// Calls f(integral_constant<int, vectors>, first column) for all columns.
template <int VECTORS, class F>
LINESCAN_INLINE void across(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + VECTORS * W <= columns; column += VECTORS * W) f(std::integral_constant<int, VECTORS>(), column);
  if constexpr (VECTORS > 1)
    for (; column < columns; column += W) f(std::integral_constant<int, 1>(), column);
}

// The first `count` tokens, whole blocks of them.
template <class F, bool DECAY>
static void walk(const Walk& s, int64_t count) {
  alignas(64) float scores[SCORES<F> * F::WRITES];
  for (int64_t start = 0; start < count; start += BLOCK) {
    const Block<F> block(start, count);
    if (DECAY && s.carry) make_decays(s, block);
    if constexpr (ADDS_UP<F, DECAY>) {
      across<2>(s.columns, [&](auto vectors, int64_t column) { add_up<vectors()>(s, block, column); });
    } else {
      weigh<F, DECAY>(s, block, scores);
      across<SIDE_BY_SIDE<F>>(
          s.columns, [&](auto vectors, int64_t column) { sweep<F, DECAY, vectors()>(s, block, column, scores); });
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

// out[t] = x_t . y_t (without y the sum of x_t), or RUNNING x_t . (sum + y_0 + ... + y_t), which also adds up the sum; for
// whole vectors of t.
template <bool RUNNING>
__attribute__((noinline)) static void dots(int64_t count, int64_t n, Rows x, Rows y, float* __restrict sum,
                                           float* __restrict out) {
  for (int64_t first = 0; first < count; first += W) {
    const int64_t some = count - first < W ? count - first : W;
    alignas(64) float lanes[W * W];
    for (int64_t t = some; t < W; ++t) store(lanes + t * W, V{});
    for (int64_t i = 0; i < n; i += W) {
      V other = RUNNING ? load(sum + i) : V{};
      for (int64_t t = 0; t < some; ++t) {
        if (RUNNING) other += load(y[first + t] + i);
        else other = y ? load(y[first + t] + i) : splat(1.0f);
        const V product = load(x[first + t] + i) * other;
        store(lanes + t * W, i ? load(lanes + t * W) + product : product);
      }
      if (RUNNING) store(sum + i, other);
    }
    store(out + first, lane_sums<W>(lanes));
  }
}

constexpr int64_t ROOM = Matrix::ROOM;

// Rows of tokens, where they stand or in a buffer.
struct Buffer {
  float *data = nullptr, **at = nullptr;

  operator Rows() const { return at; }
  float* operator[](int64_t t) const { return at[t]; }
};

// What a unit of work reads of its tokens, filled up to whole blocks with tokens that do nothing.
struct Tokens {
  int64_t n, m, room;
  int64_t *reads, *writes;
  Buffer q, k, v, a, b, gate;
  float *gamma, *single, *single_decay, *factor, *bonus, *carry;

  Tokens(Arena& arena, const Matrix& s, int64_t columns, int64_t room, float factor_of_all)
      : n(whole_vectors(s.N)), m(whole_vectors(columns)), room(room), reads(take<int64_t>(arena, room)),
        writes(take<int64_t>(arena, room)), q(rows(arena, n)), k(rows(arena, n)),
        v(rows(arena, m)), a(rows(arena, n)), b(rows(arena, n)), gate(rows(arena, n)), gamma(arena.take(room + W)),
        single(arena.take(room + W)), single_decay(arena.take(room + W)), factor(arena.take(room + W)),
        bonus(arena.take(n)), carry(arena.take(n)) {
    for (int64_t t = 0; !arena.counts() && t < room; ++t) gamma[t] = 1.0f, factor[t] = factor_of_all;
  }

  Buffer rows(Arena& arena, int64_t width) const {
    const Buffer buffer = {arena.take(room * width), take<float*>(arena, room)};
    if (!arena.counts()) in_order(buffer.data, width, room, buffer.at);
    return buffer;
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
  const auto keys = [&](const View& x, int64_t group, const Buffer& to) {
    if (x) read_rows(x, b, k, group, 0, reads, padded, s.N, n, to.data, to.at);
  };
  keys(s.q, h / s.share, q), keys(s.k, h / s.share, this->k), keys(s.a, h, a), keys(s.b, h, this->b);
  read_rows(s.v, b, k, h, column, reads, padded, width, whole_vectors(width), v.data, v.at);
  if (!s.beta) return;
  gather(s.beta, b, k, h, 0, reads, padded, 1, 1, gamma);
  for (int64_t t = 0; s.rule == Rule::delta && t < padded; ++t) gamma[t] = -gamma[t];
}

template <class F, bool DECAY>
Walk Tokens::start(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t count, float* decay) {
  Walk w;
  w.rows = s.N, w.stride = n, w.columns = m;
  if (F::TIED) w.x[0] = this->k, w.base = v;
  else w.x[0] = a, w.y[0] = this->b;
  w.x[F::READS - 1] = q, w.y[F::WRITES - 1] = this->k, w.z[F::WRITES - 1] = v;
  w.decay = decay, w.gamma = gamma, w.factor = factor, w.bonus = bonus, w.scaled = bool(s.beta);
  w.skip = s.skip ? *(s.skip.at(b, k) + h) : 0.0f;
  if (!DECAY) return w;
  const int64_t padded = whole_blocks(count);
  w.carry = carry;
  if (s.gates > 1) {
    read_rows(s.gate, b, k, h, 0, reads, padded, s.N, n, gate.data, gate.at), w.gate = gate;
  } else {
    gather(s.gate, b, k, h, 0, reads, padded, 1, 1, single);
    for (int64_t t = 0; s.idle && t < count; ++t)
      if (reads[t] < 0) single[t] = *(s.idle.at(b, k) + h);
    for (int64_t t = 0; t < padded; t += W) store(single_decay + t, exp(load(single + t)));
    w.single = single, w.single_decay = single_decay;
  }
  return w;
}

// A state (rows, columns), its rows `pitch` apart, to one of whole vectors, or on its side; and back. Without: zero.
static void unpack(const float* x, int64_t rows, int64_t columns, int64_t pitch, bool side, float* out) {
  const int64_t wide = whole_vectors(side ? rows : columns);
  zero(out, (side ? columns : rows) * wide);
  if (x && side && rows % W == 0 && columns % W == 0) {
    for (int64_t i = 0; i < rows; i += W)
      for (int64_t j = 0; j < columns; j += W) transpose(x + i * pitch + j, pitch, 1.0f, out + j * wide + i, wide);
  } else {
    for (int64_t i = 0; x && i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) out[side ? j * wide + i : i * wide + j] = x[i * pitch + j];
  }
}
static void pack(const float* x, int64_t rows, int64_t columns, int64_t pitch, float* out) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * pitch, x + i * whole_vectors(columns), columns * 4);
}

// The sum of keys is the column after the last of a normalised recurrence's state.
static void column(const float* state, int64_t rows, int64_t pitch, float* out) {
  for (int64_t i = 0; i < whole_vectors(rows); ++i) out[i] = state && i < rows ? state[i * pitch] : 0.0f;
}

constexpr float SMALLEST = 1e-10f;  // added to what outputs are divided by

static int64_t coefficients_of(int64_t rows) { return (rows + PITCH - 1) / PITCH * PITCH * LINES<LowRank>; }
static float* of_head(const Parameter& x, int64_t b, int64_t k, int64_t at) { return x ? x.at(b, k) + at : nullptr; }

// Rows of what dependent writes write, from token t on.
static float* written(const Matrix& s, int64_t b, int64_t k, int64_t h, int64_t column, int64_t t) {
  return reinterpret_cast<float*>(s.written.at(b, k, h, column)) + t * s.written.token;
}

// -- forward ------------------------------------------------------------------------------------------------------------

struct ForwardRoom {
  Tokens tokens;
  float* decay;
  Buffer y, written;
  float *state, *lines, *sum;

  ForwardRoom(Arena& arena, const Matrix& s)
      : tokens(arena, s, s.width, ROOM, s.scale), decay(arena.take(Tokens::decays(ROOM) * tokens.n)),
        y(tokens.rows(arena, tokens.m)), state(arena.take(s.N * tokens.m)), lines(arena.take(coefficients_of(s.N))),
        sum(arena.take(tokens.n)) {
    written.at = take<float*>(arena, ROOM);
  }
};

template <class F, bool DECAY>
static void matrix_forward_as(const Matrix& s, int64_t begin, int64_t end) {
  ForwardRoom room = place<ForwardRoom>(s);
  Tokens& tokens = room.tokens;
  const int64_t parts = s.parts(), heads = s.H * parts, per_sample = s.merge ? heads : heads * s.K;
  const int64_t pitch = s.M + s.normalize, area = s.N * pitch;
  // Without outputs it only leaves what a backward reads.
  const int64_t length = s.starts ? s.piece : s.S, pieces = (s.S + length - 1) / length;
  const int64_t end_of_time = s.y || F::DEPENDENT ? s.S : (pieces - 1) * length;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / per_sample, h = unit % heads / parts, first = unit % parts * s.width;
    const int64_t width = s.M - first < s.width ? s.M - first : s.width, channel = h * s.M + first;
    const int64_t k0 = s.merge ? 0 : unit % per_sample / heads, k1 = s.merge ? s.K : k0 + 1;
    for (int64_t k = k0; k < k1; ++k) {
      const float* initial = of_head(s.initial, b, k, h * area);
      const auto leave = [&](float* state) {
        pack(room.state, s.N, width, pitch, state + first);
        for (int64_t i = 0; s.normalize && first == 0 && i < s.N; ++i) state[i * pitch + s.M] = room.sum[i];
      };
      unpack(initial ? initial + first : nullptr, s.N, width, pitch, false, room.state);
      if (s.normalize) column(initial ? initial + s.M : nullptr, s.N, pitch, room.sum);
      if (s.bonus) column(s.bonus.at(b, k) + h * s.N, s.N, 1, tokens.bonus);
      zero(tokens.carry, tokens.n);
      const Target target = s.y.of_route(k);
      const bool direct = s.y && is_direct<W>(target.view, width);
      if (s.y && !target.add) clear_gaps(target.view, s.route, b, k, channel, width);
      for (int64_t t0 = 0, count; t0 < end_of_time; t0 += count) {
        const int64_t piece = t0 / length, stop = (piece + 1) * length < s.S ? (piece + 1) * length : s.S;
        count = stop - t0 < ROOM ? stop - t0 : ROOM;
        tokens.fetch(s, b, k, h, first, width, t0, count);
        Walk forth = tokens.start<F, DECAY>(s, b, k, h, count, room.decay);
        forth.state = room.state, forth.coefficients = room.lines, forth.columns = whole_vectors(width);
        const int64_t padded = whole_blocks(count);
        if (!direct) in_order(room.y.data, forth.columns, padded, room.y.at);
        else point(reinterpret_cast<float*>(target.view.at(b, k, 0, channel)), target.view.token, tokens.writes, padded,
                   room.y.data, room.y.at);
        forth.out[F::READS - 1] = room.y, forth.adds = direct && target.add;
        if (F::DEPENDENT && s.written) {
          in_order(written(s, b, k, h, first, t0), s.written.token, padded, room.written.at);
          forth.out[0] = room.written;
        }
        if (s.normalize) {
          dots<true>(count, tokens.n, tokens.q, tokens.k, room.sum, tokens.factor);
          for (int64_t t = 0; t < count; t += W)
            store(tokens.factor + t, s.scale / (s.scale * load(tokens.factor + t) + SMALLEST));
        }
        if (s.y) walk<F, DECAY>(forth, padded);
        else walk<Silent<F>, DECAY>(forth, padded);
        if (s.y && !direct) scatter(target, b, k, channel, tokens.writes, count, width, forth.columns, room.y.data);
        if (t0 + count == stop && stop < s.S) leave(s.starts.at(b, k) + (h * (pieces - 1) + piece) * area);
      }
      if (s.state) leave(s.state.at(b, k) + h * area);
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

// Three walks through a piece of time. The forward left the states at the pieces' begins and, of rules with dependent
// writes, what these wrote. The adjoint goes back from the last token: its reads are the gradients of what was written.
// The other two take states on their side, with values as rows and keys as columns: there the reads of the recurrence are
// the gradients of x, and those of its adjoint are the gradients of y.
//
// A log decay's gradient is the sum of all that passes through it, from a write before it (or the state that enters its
// block) to a read after it (or the gradient of the state that leaves the block): products of decays, none of which is
// ever divided by, and no differences. So it has as many digits as the other gradients, be the decay 0 or 1.

template <class F>
constexpr int SIDE = (F::READS + F::WRITES) * BLOCK;  // lines of values: gradients of reads, then columns of writes

// Lines of a block, and their scores: the gradients of a token's reads times the columns that tokens up to it write.
template <class F>
__attribute__((noinline)) static void line_up(const Walk& s, const Rows (&dz)[2], int64_t first, int64_t m,
                                              float* __restrict all, float* __restrict scores) {
  const float* rows[SIDE<F>];
  float factor[SIDE<F>];
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE {
      rows[r * BLOCK + t] = dz[r][first + t], factor[r * BLOCK + t] = F::DEPENDENT && r == 0 ? s.gamma[first + t] : 1.0f;
    });
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      constexpr int line = (F::READS + w) * BLOCK + t;
      const bool scaled = F::DEPENDENT ? w == 0 : s.scaled;
      rows[line] = s.z[w][first + t], factor[line] = scaled ? s.gamma[first + t] : 1.0f;
    });
  });
  each<F::WRITES>([&](auto w) LINESCAN_STAGE {
    V sums[SCORES<F>];
    each<SCORES<F>>([&](auto i) LINESCAN_STAGE { sums[i] = V{}; });
    for (int64_t j = 0; j < m; j += W) {
      float* lines = all + j / PITCH * PITCH * SIDE<F> + j % PITCH;
      if constexpr (w == 0)
        each<SIDE<F>>([&](auto c) LINESCAN_STAGE { store(lines + c * PITCH, factor[c] * load(rows[c] + j)); });
      each<BLOCK>([&](auto from) LINESCAN_STAGE {
        const V z = load(lines + ((F::READS + w) * BLOCK + from) * PITCH);
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          each<BLOCK - from>([&](auto later) LINESCAN_STAGE {
            constexpr int t = from + later;
            if constexpr (t > from || F::OWN[r][w])
              sums[score<F>(r, w, t, from) - SCORES<F> * w] += load(lines + (r * BLOCK + t) * PITCH) * z;
          });
        });
      });
    }
    for (int i = 0; i < SCORES<F>; i += W)
      store(scores + SCORES<F> * w + i, lane_sums<W>(reinterpret_cast<const float*>(sums + i)));
  });
}

// A block of a state on its side.
struct Turn {
  int64_t first, rows, columns;  // token; values; keys as whole vectors
  const float *lines, *from, *met;  // the state before the block, for the adjoint also the recurrence's
  float *to, *flow, *const *read;  // the state after it; the two states times each other, decayed; what is read
};

// Takes VECTORS of the keys through a block: the recurrence, or BACK its adjoint.
template <class F, bool DECAY, bool BACK, int VECTORS>
__attribute__((noinline)) static void turn(const Walk& s, const Turn& turn, int64_t column) {
  constexpr int READS = BACK ? F::WRITES : F::READS, WRITES = BACK ? F::READS : F::WRITES;
  constexpr int OF_READS = BACK ? F::READS * BLOCK : 0, OF_WRITES = BACK ? 0 : F::READS * BLOCK;
  const auto vectors = [](const auto& f) LINESCAN_STAGE { each<VECTORS>(f); };
  V out[READS * BLOCK][VECTORS], z[WRITES * BLOCK][VECTORS], flow[VECTORS], whole[VECTORS];
  // Decays from the block's begin to before and after each token's, and from there to the block's end.
  V before[BLOCK + 1][VECTORS], after[BLOCK + 1][VECTORS];
  vectors([&](auto l) LINESCAN_STAGE { before[0][l] = after[BLOCK][l] = splat(1.0f); });
  if constexpr (DECAY) {
    const float* const decays = s.decays(turn.first) + column;
    const auto decay = [&](int t, auto l) LINESCAN_STAGE { return load(decays + t * turn.columns + l * W); };
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      constexpr int back = BLOCK - 1 - t;
      vectors([&](auto l) LINESCAN_STAGE {
        before[t + 1][l] = t == 0 ? decay(t, l) : before[t][l] * decay(t, l);
        after[back][l] = t == 0 ? decay(back, l) : after[back + 1][l] * decay(back, l);
      });
    });
    vectors([&](auto l) LINESCAN_STAGE {
      whole[l] = decay(BLOCK, l);
    });
  }
  const auto decayed = [&](V x, bool write, auto i, auto t, auto l) LINESCAN_STAGE {
    return !DECAY ? x : x * (write ? after[t + 1][l] : before[t + F::AFTER[i]][l]);
  };
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<WRITES>([&](auto w) LINESCAN_STAGE {
      const float* row = (BACK ? s.x[w] : s.y[w])[turn.first + t] + column;
      vectors([&](auto l) LINESCAN_STAGE { z[w * BLOCK + t][l] = decayed(load(row + l * W), !BACK, w, t, l); });
    });
  });
  pass<READS * BLOCK, OF_READS, WRITES * BLOCK, OF_WRITES, SIDE<F>, DECAY, true, DECAY && BACK>(
      turn.rows, turn.columns, turn.from + column, turn.to + column, turn.lines, out, z, whole, turn.met + column, flow);
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<READS>([&](auto r) LINESCAN_STAGE {
      float* row = turn.read[r] + (turn.first + t) * turn.columns + column;
      vectors([&](auto l) LINESCAN_STAGE { store(row + l * W, decayed(out[r * BLOCK + t][l], BACK, r, t, l)); });
    });
  });
  if constexpr (DECAY && BACK)
    vectors([&](auto l) LINESCAN_STAGE { store(turn.flow + column + l * W, whole[l] * flow[l]); });
}

// Gradients of a block's x, y and log decays, where so far those stand that pass from and to other blocks.
template <class F, bool DECAY>
__attribute__((noinline)) static void conclude(const Walk& s, const Turn& turn, const float* scores, float* const* dx,
                                               float* const* dy, float* dgate, float* of_bonus) {
  const int64_t n = turn.columns, first = turn.first;
  const float *const decays = s.decays(first), *of_tokens[F::READS + F::WRITES][BLOCK];
  each<BLOCK>([&](auto t) LINESCAN_STAGE {
    each<F::READS>([&](auto r) LINESCAN_STAGE { of_tokens[r][t] = s.x[r][first + t]; });
    each<F::WRITES>([&](auto w) LINESCAN_STAGE { of_tokens[F::READS + w][t] = s.y[w][first + t]; });
  });
  for (int64_t i = 0; i < n; i += W) {
    V x[F::READS][BLOCK], y[F::WRITES][BLOCK], of_x[F::READS][BLOCK], of_y[F::WRITES][BLOCK], gate[BLOCK];
    const V bonus = F::BONUS ? load(s.bonus + i) : splat(1.0f);
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      const int64_t at = (first + t) * n + i;
      each<F::READS>([&](auto r) LINESCAN_STAGE { x[r][t] = load(of_tokens[r][t] + i), of_x[r][t] = load(dx[r] + at); });
      each<F::WRITES>([&](auto w) LINESCAN_STAGE {
        y[w][t] = load(of_tokens[F::READS + w][t] + i), of_y[w][t] = load(dy[w] + at);
      });
      if (DECAY) gate[t] = load(turn.flow + i);
    });
    if constexpr (DECAY) {  // through the block's begin or its end
      V read = {}, written = {};
      each<BLOCK>([&](auto t) LINESCAN_STAGE {
        constexpr int back = BLOCK - 1 - t;
        each<2>([&](auto late) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if constexpr (F::AFTER[r] != bool(late)) read += x[r][back] * of_x[r][back];
          });
          if (late == 0) gate[back] += read;
        });
        gate[t] += written;
        each<F::WRITES>([&](auto w) LINESCAN_STAGE { written += y[w][t] * of_y[w][t]; });
      });
    }
    each<F::WRITES>([&](auto w) LINESCAN_STAGE {
      each<BLOCK>([&](auto from) LINESCAN_STAGE {
        each<F::READS>([&](auto r) LINESCAN_STAGE {
          if constexpr (F::OWN[r][w]) {
            const V weight = bonus * scores[score<F>(r, w, from, from)];
            of_x[r][from] += weight * y[w][from], of_y[w][from] += weight * x[r][from];
          }
        });
        V decay = splat(1.0f), written = y[w][from], of_written = {};
        const auto meet = [&](auto t, bool after) LINESCAN_STAGE {
          each<F::READS>([&](auto r) LINESCAN_STAGE {
            if (F::AFTER[r] != after) return;
            const float weight = scores[score<F>(r, w, t, from)];
            of_x[r][t] += weight * written;
            of_written += weight * (DECAY ? decay * x[r][t] : x[r][t]);
            if constexpr (DECAY) {
              const V passes = weight * (x[r][t] * written);
              each<BLOCK - 1 - from>([&](auto later) LINESCAN_STAGE {
                constexpr int between = from + 1 + later;
                if (between < t + after) gate[between] += passes;
              });
            }
          });
        };
        each<BLOCK - 1 - from>([&](auto later) LINESCAN_STAGE {
          constexpr std::integral_constant<int, from + 1 + later> t;
          meet(t, false);
          if constexpr (DECAY) {
            const V next = load(decays + t * n + i);
            decay *= next, written *= next;
          }
          meet(t, true);
        });
        of_y[w][from] += of_written;
      });
    });
    if constexpr (F::BONUS) {
      V sum = load(of_bonus + i);
      each<BLOCK>([&](auto t) LINESCAN_STAGE { sum += scores[score<F>(0, 0, t, t)] * (x[0][t] * y[0][t]); });
      store(of_bonus + i, sum);
    }
    each<BLOCK>([&](auto t) LINESCAN_STAGE {
      const int64_t at = (first + t) * n + i;
      each<F::READS>([&](auto r) LINESCAN_STAGE { store(dx[r] + at, of_x[r][t]); });
      each<F::WRITES>([&](auto w) LINESCAN_STAGE { store(dy[w] + at, of_y[w][t]); });
      if (DECAY) store(dgate + at, gate[t]);
    });
  }
}

struct BackwardRoom {
  Tokens tokens;
  int64_t pieces, blocks;
  Buffer of_dy, out, written, dz[2], dx[2], dy[2], dgate;
  float *decay, *numbers, *divisor, *lines, *scores, *trail;
  float *back, *back_side, *coefficients, *flow, *start, *sum, *of_sum, *of_bonus;

  BackwardRoom(Arena& arena, const Matrix& s)
      : tokens(arena, s, s.M, s.piece, 1.0f), pieces((s.S + s.piece - 1) / s.piece), blocks(s.piece / BLOCK) {
    const int64_t n = tokens.n, m = tokens.m, side = s.M * n;
    decay = arena.take(s.gates ? Tokens::decays(s.piece) * n : 0);
    of_dy = tokens.rows(arena, m), out = tokens.rows(arena, m), dgate = tokens.rows(arena, n);
    written.at = take<float*>(arena, tokens.room);
    for (int i = 0; i < 2; ++i)
      dz[i] = tokens.rows(arena, m), dx[i] = tokens.rows(arena, n), dy[i] = tokens.rows(arena, n);
    numbers = arena.take(tokens.room + W), divisor = arena.take(tokens.room + W);
    lines = arena.take(blocks * line_room(s)), scores = arena.take(blocks * SCORE_ROOM);
    trail = arena.take(s.gates ? (blocks + 1) * side : side);
    back = arena.take(s.N * m), back_side = arena.take(side), coefficients = arena.take(coefficients_of(s.N));
    flow = arena.take(n), start = arena.take(n), sum = arena.take(n), of_sum = arena.take(n), of_bonus = arena.take(n);
  }

  static constexpr int64_t SCORE_ROOM = 2 * SCORES<LowRank>;
  static int64_t line_room(const Matrix& s) { return (s.M + PITCH - 1) / PITCH * PITCH * SIDE<LowRank>; }
};

// One sample, head and route.
template <class F, bool DECAY>
struct Backward {
  static constexpr int READ = F::READS - 1, WRITE = F::WRITES - 1;

  const Matrix& s;
  BackwardRoom& room;
  const int64_t b, k, h;
  Tokens& tokens = room.tokens;
  const int64_t n = tokens.n, m = tokens.m, pitch = s.M + s.normalize, area = s.N * pitch;
  const float* dstate = of_head(s.dstate, b, k, h * area);
  float* dinitial = of_head(s.dinitial, b, k, h * area);

  // A piece of time.
  int64_t t0 = 0, count = 0, padded = 0;
  Walk forth{};

  void run() {
    if (s.bonus) column(s.bonus.at(b, k) + h * s.N, s.N, 1, tokens.bonus), zero(room.of_bonus, n);
    if (s.normalize) column(dstate ? dstate + s.M : nullptr, s.N, pitch, room.of_sum);
    float &skip = s.partial_skip[(b * s.K + k) * s.H + h], &idle = s.partial_idle[(b * s.K + k) * s.H + h];
    skip = idle = 0.0f;

    unpack(dstate, s.N, s.M, pitch, false, room.back), unpack(dstate, s.N, s.M, pitch, true, room.back_side);
    for (int64_t piece = room.pieces - 1; piece >= 0; --piece) go_back(piece, skip, idle);

    if (dinitial) pack(room.back, s.N, s.M, pitch, dinitial);
    for (int64_t i = 0; dinitial && s.normalize && i < s.N; ++i) dinitial[i * pitch + s.M] = room.of_sum[i];
    if (s.bonus) std::memcpy(s.partial_bonus + ((b * s.K + k) * s.H + h) * s.N, room.of_bonus, s.N * 4);
  }

  void give(const Target& target, int64_t width, int64_t stride, const float* rows) const {
    if (target) scatter(target.of_route(k), b, k, h * width, tokens.reads, count, width, stride, rows);
  }

  void go_back(int64_t piece, float& skip, float& idle) {
    t0 = piece * s.piece, count = s.S - t0 < s.piece ? s.S - t0 : s.piece, padded = whole_blocks(count);
    tokens.fetch(s, b, k, h, 0, s.M, t0, count);
    forth = tokens.start<F, DECAY>(s, b, k, h, count, room.decay);
    forth.coefficients = room.coefficients;
    if (F::DEPENDENT) {
      in_order(written(s, b, k, h, 0, t0), s.written.token, padded, room.written.at);
      forth.z[0] = room.written;
    }
    zero(tokens.carry, n);
    for (int64_t t = 0; DECAY && t < padded; t += BLOCK) make_decays(forth, Block<F>(t, padded));

    const float* start = piece ? of_head(s.starts, b, k, (h * (room.pieces - 1) + piece - 1) * area)
                               : of_head(s.initial, b, k, h * area);
    const Buffer &dy = room.of_dy, &out = room.out;
    read_rows(s.dy, b, k, h, 0, tokens.writes, padded, s.M, m, dy.data, dy.at);
    if (s.normalize) {
      column(start ? start + s.M : nullptr, s.N, pitch, room.start);
      std::memcpy(room.sum, room.start, n * 4);
      dots<true>(count, n, tokens.q, tokens.k, room.sum, room.divisor);
      for (int64_t t = 0; t < count; ++t) room.divisor[t] = s.scale * room.divisor[t] + SMALLEST;
    }
    for (int64_t t = 0; t < padded; ++t) {
      const float factor = s.normalize && t < count ? s.scale / room.divisor[t] : s.scale;
      fetch_ahead(dy.at, t, padded, 0), fetch_ahead(dy.at, t, padded, m - W);
      for (int64_t j = 0; j < m; j += W) store(out[t] + j, factor * load(dy[t] + j));
    }

    Walk adjoint = forth;
    adjoint.state = room.back, adjoint.base = nullptr, adjoint.carry = nullptr, adjoint.scaled = false, adjoint.skip = 0.0f;
    std::swap(adjoint.x[0], adjoint.y[0]), std::swap(adjoint.x[1], adjoint.y[1]);
    adjoint.z[READ] = out;
    for (int i = 0; i < 2; ++i) adjoint.out[i] = room.dz[i];
    walk<Adjoint<F>, DECAY>(adjoint, padded);

    const Rows dz[2] = {READ ? room.dz[0] : out, out};
    float* const of_x[2] = {room.dx[0].data, room.dx[1].data};
    float* const of_y[2] = {room.dy[0].data, room.dy[1].data};
    const int64_t side = s.M * n, lines = BackwardRoom::line_room(s);
    for (int64_t t = 0; t < padded; t += BLOCK)
      line_up<F>(forth, dz, t, m, room.lines + t / BLOCK * lines, room.scores + t / BLOCK * BackwardRoom::SCORE_ROOM);
    unpack(start, s.N, s.M, pitch, true, room.trail);
    for (int64_t t = 0; t < padded; t += BLOCK) {
      float *from = room.trail + (DECAY ? t / BLOCK * side : 0), *to = from + (DECAY ? side : 0);
      const Turn block = {t, s.M, n, room.lines + t / BLOCK * lines, from, nullptr, to, nullptr, of_x};
      across<SIDE_BY_SIDE<F>>(
          n, [&](auto vectors, int64_t column) { turn<F, DECAY, false, vectors()>(forth, block, column); });
    }
    for (int64_t t = padded - BLOCK; t >= 0; t -= BLOCK) {
      const Turn block = {t, s.M, n, room.lines + t / BLOCK * lines, room.back_side,
                          room.trail + (DECAY ? t / BLOCK * side : 0), room.back_side, room.flow, of_y};
      across<SIDE_BY_SIDE<F>>(
          n, [&](auto vectors, int64_t column) { turn<F, DECAY, true, vectors()>(forth, block, column); });
      const float* scores = room.scores + t / BLOCK * BackwardRoom::SCORE_ROOM;
      conclude<F, DECAY>(forth, block, scores, of_x, of_y, room.dgate.data, room.of_bonus);
    }
    finish(skip, idle);
  }

  // What is left to do row by row: divisors, beta, gates of whole heads; and the way back along the route.
  void finish(float& skip, float& idle) {
    const Buffer &dx = room.dx[READ], &dy = room.dy[WRITE], &dz = room.dz[WRITE];
    if (F::TIED)
      for (int64_t i = 0; i < padded * n; i += W) store(dy.data + i, load(dy.data + i) + load(room.dx[0].data + i));
    if (s.normalize) {  // to q by the sum of keys so far, to k by a sum from behind
      dots<false>(count, n, tokens.q, dx, nullptr, room.numbers);
      for (int64_t t = 0; t < count; ++t) room.numbers[t] *= -s.scale / room.divisor[t];
      for (int64_t i = 0; i < n; i += W) {
        V sum = load(room.start + i), of_sum = load(room.of_sum + i);
        for (int64_t t = 0; t < count; ++t) {
          sum += load(tokens.k[t] + i);
          store(dx[t] + i, load(dx[t] + i) + room.numbers[t] * sum);
        }
        for (int64_t t = count - 1; t >= 0; --t) {
          of_sum += room.numbers[t] * load(tokens.q[t] + i);
          store(dy[t] + i, load(dy[t] + i) + of_sum);
        }
        store(room.of_sum + i, of_sum);
      }
    }
    if (s.beta) {  // dz is the gradient of beta times what is written; a dependent write has the factor -beta
      const float sign = F::TIED ? -1.0f : 1.0f;
      dots<false>(count, m, forth.z[WRITE], dz, nullptr, room.numbers);
      for (int64_t t = 0; t < count; ++t) {
        room.numbers[t] *= sign;
        for (int64_t j = 0; j < m; j += W) store(dz[t] + j, load(dz[t] + j) * (sign * tokens.gamma[t]));
      }
      give(s.dbeta, 1, 1, room.numbers);
    }
    if (s.skip) {
      dots<false>(count, m, tokens.v, room.out, nullptr, room.numbers);
      for (int64_t t = 0; t < count; ++t) {
        skip += room.numbers[t];
        for (int64_t j = 0; j < m; j += W) store(dz[t] + j, load(dz[t] + j) + forth.skip * load(room.out[t] + j));
      }
    }
    if (s.gates == 1) {
      dots<false>(count, n, room.dgate, nullptr, nullptr, room.numbers);
      for (int64_t t = 0; t < count; ++t) idle += tokens.reads[t] < 0 ? room.numbers[t] : 0.0f;
      give(s.dgate, 1, 1, room.numbers);
    } else {
      give(s.dgate, s.N, n, room.dgate.data);
    }
    give(s.dv, s.M, m, dz.data), give(s.dq, s.N, n, dx.data), give(s.dk, s.N, n, dy.data);
    if (READ && !F::TIED) give(s.da, s.N, n, room.dx[0].data);
    if (WRITE) give(s.db, s.N, n, room.dy[0].data);
  }
};

static void matrix_backward(const Matrix& s, int64_t begin, int64_t end) {
  BackwardRoom room = place<BackwardRoom>(s);
  with_rule(s, [&](auto rule, auto decay) {
    for (int64_t unit = begin; unit < end; ++unit)
      for (int64_t k = 0; k < s.K; ++k) Backward<decltype(rule), decay()>{s, room, unit / s.H, k, unit % s.H}.run();
  });
}
