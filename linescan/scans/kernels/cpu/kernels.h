// What the kernels compute on, and the table of them that every instruction set fills. Plain C++17, nothing of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#define LINESCAN_X86 1
#include <immintrin.h>
#endif

namespace linescan {

enum class Dtype : int { float32, bfloat16, float16 };

// A token tensor (B, K, L, [G,] channels). Strides count elements and are 0 on a broadcast axis; channels are adjacent.
struct View {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t batch = 0, route = 0, token = 0, group = 0;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t b, int64_t k, int64_t g, int64_t channel) const {
    return data + (b * batch + k * route + g * group + channel) * (dtype == Dtype::float32 ? 4 : 2);
  }
};

// A float32 parameter (K or 1, D, ...) or state (B, K, D, ...): contiguous but for a broadcast route axis.
struct Parameter {
  float* data = nullptr;
  int64_t batch = 0, route = 0;

  explicit operator bool() const { return data != nullptr; }
  float* at(int64_t b, int64_t k) const { return data + b * batch + k * route; }
};

// The route table, or none: time order is then grid order.
struct Route {
  const void* data = nullptr;
  bool wide = false;  // int64 entries, else int32
  int64_t batch = 0, route = 0;
  // Tokens that no step writes: those of the table's row i are gaps[gaps_begin[i]] to gaps[gaps_begin[i + 1]].
  const int64_t *gaps = nullptr, *gaps_begin = nullptr;
  int64_t rows = 0;  // from a sample's first row to the next one's

  // Tokens that steps [begin, begin + count) read (-1: padding, all zero) and write (-1: output dropped).
  void steps(int64_t b, int64_t k, int64_t begin, int64_t count, int64_t* reads, int64_t* writes) const {
    for (int64_t i = 0; i < count; ++i) {
      int64_t entry = begin + i;
      if (data) {
        int64_t at = b * batch + k * route + begin + i;
        entry = wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
      }
      writes[i] = entry < 0 ? -1 : entry;
      reads[i] = entry < -1 ? -entry - 2 : entry;
    }
  }
};

// A gradient or an output. Rows are added to, in float32, where several steps of a route can meet in one (`add`; they are
// zero to begin with), or where all routes share them (`shared`), but for the first route.
struct Target {
  View view;
  bool add = false, shared = false;
  explicit operator bool() const { return bool(view); }
  Target of_route(int64_t k) const { return {view, add || (shared && k > 0), shared}; }
};

// Work is cut into units of one sample and one block of channels; a block never straddles two groups. In the forward a
// unit is one route too, unless routes are summed. The block width decides the order of the sums over channels in the
// backward, so there it depends on shapes alone: results must not change with the number of threads.
struct Blocks {
  int64_t D = 0, G = 1, width = 64;
  int64_t per_group() const { return (D / G + width - 1) / width; }
  int64_t count() const { return G * per_group(); }
  void locate(int64_t block, int64_t& group, int64_t& begin, int64_t& size) const {
    const int64_t channels = D / G, inner = (block % per_group()) * width;
    group = block / per_group();
    begin = group * channels + inner;
    size = channels - inner < width ? channels - inner : width;
  }
};

struct Scan {
  int64_t B, K, L, S, D, G, N;
  bool softplus, merge;
  View u, delta, b, c, z;
  Parameter A, skip, bias, initial;
  Parameter weight;  // (K or 1, D, rank), forward only: delta then has `rank` channels, of which it makes step sizes
  int64_t rank = 0;
  Route route;
  Blocks blocks;
  // forward
  static constexpr int64_t SLAB = 64;  // tokens whose gates are opened in a unit of work
  int64_t slabs() const { return (L + SLAB - 1) / SLAB; }
  View gate;  // silu(z) (B, 1, L, D), float32, rows of whole vectors: made once for all routes, if at all
  Target y;
  Parameter state;
  // forward that a backward follows, and backward
  int64_t segment = 0;  // tokens whose states the backward keeps at a time
  Parameter starts;     // (B, K, segments - 1, D, N): states that segments but the first start from
  // backward
  View dy;
  Parameter dstate, dinitial;
  Target du, ddelta, dz;
  float* partial_bc = nullptr;      // (B, K, blocks, 2, S, N): sums over the channels of a block, in time order
  float* partial_A = nullptr;       // (B, K, D, N)
  float* partial_channel = nullptr; // (B, K, 2, D): skip, bias
};

struct Conv {
  int64_t B, K, L, S, D, W;
  bool silu, merge;
  View x;
  Parameter weight, bias, initial;
  Route route;
  Blocks blocks;
  int64_t slab;  // steps of a unit: all, where those of others may write the same tokens
  int64_t slabs() const { return (S + slab - 1) / slab; }
  int64_t end_of(int64_t i) const { return (i + 1) * slab < S ? (i + 1) * slab : S; }
  // forward
  Target y;
  Parameter state;
  // backward
  View dy;
  Parameter dstate, dinitial;
  Target dx;
  float* partial = nullptr; // (B, K, slabs, W + 1, D): weight and bias
};

// Recurrences of matrix states (B, K, H, N, M): N rows (keys), M columns (values). See matrix_scan.h for the rules.
enum class Rule : int { gated, late, delta, low_rank };

struct Matrix {
  Rule rule;
  int64_t B, K, L, S, H, N, M;
  int64_t share = 1;  // neighbouring heads that have q and k in common
  int64_t gates = 0;  // log decays of a head and token: none, 1, or N
  bool normalize, merge;
  float scale;
  View q, k, v, a, b, gate, beta;  // groups are heads; `beta`, of the rules gated and delta, scales what is written
  Parameter bonus, skip, idle, initial;  // (K, H, N), (K, H), (K, H): the log decay of a padding token; a state
  Route route;
  // forward
  int64_t width = 0;  // columns of a unit of work
  int64_t parts() const { return (M + width - 1) / width; }
  Target y;
  Parameter state;
  // forward that a backward follows, and backward
  static constexpr int64_t BLOCK = 4;  // tokens that a state takes at once
  static constexpr int64_t ROOM = 128; // tokens whose rows are looked up at a time, whole blocks; in the backward at least
  int64_t piece = 0;                   // tokens that the backward takes at a time, whole blocks
  Parameter starts;  // (B, K, H, pieces - 1, N, M [+ 1]): states that pieces but the first start from
  View written;      // (B, K, H, S, M), whole pieces by whole vectors: first reads - base, of dependent writes
  // backward
  View dy;
  Parameter dstate, dinitial;
  Target dq, dk, dv, da, db, dgate, dbeta;
  float *partial_bonus = nullptr, *partial_skip = nullptr, *partial_idle = nullptr;  // (B, K, H, N), (B, K, H) twice
};

// Recurrences of vector states (B, K, D) or (B, K, D, 3). See vector_scan.h for the rules.
enum class VectorRule : int { gated, wkv, wkv_both };

struct Vectors {
  VectorRule rule;
  int64_t B, K, L, S, D;
  int64_t numbers = 1;  // of a channel's state
  bool merge;
  View x, g;  // or k, v
  Parameter w, u, initial;
  Route route;
  Blocks blocks;
  // forward
  Target y;
  Parameter state;
  // backward
  View dy;
  Parameter dstate, dinitial;
  Target dx, dg;
  float* partial = nullptr;  // (B, K, 2, D): w and u
};

// Attention to the windows around the positions of a map (B, height * breadth, heads, D or M). See neighborhood.h.
struct Neighborhood {
  int64_t B, height, breadth, heads, D, M;
  int64_t window[2], dilation[2];
  float scale;
  View q, k, v;    // groups are heads
  Parameter bias;  // (heads, 2 * window[0] - 1, 2 * window[1] - 1); routes are heads
  Target y;        // channels of all heads side by side
  int64_t span = 0;                // keys in the lanes, whole vectors
  int64_t strips = 1, bands = 1;   // of columns and rows that a unit of work takes
};

// Outputs y (B, K, L, D) of routes, on the way to one. See merge.h.
struct Merge {
  int64_t B, K, L, D;
  View y, out;  // of weights: (B, L, D)
  const float *weight, *bias = nullptr;
  float eps = 0.0f, *gates = nullptr;
  int64_t hidden = 0;  // numbers between two products: (hidden, D), then (D, hidden)
  const float *reduce = nullptr, *reduce_bias = nullptr, *expand = nullptr, *expand_bias = nullptr;
};

// Tokens x (B, L, C), those of a grid first, blended with their neighbours in K ways: out (K, B, L, C). See blend.h.
struct Blend {
  int64_t B, L, C, K, height, breadth, heads, pixels;
  int64_t ends[6] = {};  // of the groups of a head's channels
  bool own;              // mixes (K, C) are shares of the token, not of its neighbour
  bool added;            // to the mixes what `out` holds
  const float *x, *mix;
  View out;
};

// Rows x (rows, C), normalised in groups of so many channels: less their mean where there is a `bias`, by their root mean
// square alone where there is none; and gated where there is a `gate`. See blend.h.
struct Norm {
  int64_t rows, C, channels;
  float eps;
  const float *weight, *bias;
  View x, gate, out;
};

// Rows x (rows, C), `pitch` apart, whose pairs of neighbouring channels are turned by tables (L, channels) that all samples
// and heads share. See blend.h.
struct Rotation {
  int64_t rows, L, C, channels, pitch;
  const float *x, *cos, *sin;
  float* out;
};

// Inputs of recurrences, made of projections (B, K or 1, L, D) and, of whole heads, (B, K or 1, L, H). See gates.h.
enum class Gate : int { log_sigmoid, sigmoid, exponential, forget, share, blend, linear_unit, unit, erase };

struct Gates {
  static constexpr int64_t SLAB = 32;  // tokens of a unit of work
  Gate gate;
  float factor;
  int64_t B, K, L, D, head;  // `head`: channels of one
  View in[3], out[2];        // backward: the gradients of the outputs
  const float* parameter = nullptr;  // (D)
  int64_t slabs() const { return (L + SLAB - 1) / SLAB; }
  int64_t units() const { return B * slabs(); }
  // backward
  Target of_in[3];
  float* partial = nullptr;  // (units, D): of the parameter
};

enum class Unary : int { exp, softplus, sigmoid, decay };

struct Kernels {
  const char* name;
  void (*open_gates)(const Scan&, int64_t begin, int64_t end);
  void (*scan_forward)(const Scan&, int64_t begin, int64_t end);
  void (*scan_backward)(const Scan&, int64_t begin, int64_t end);
  void (*conv_forward)(const Conv&, int64_t begin, int64_t end);
  void (*conv_backward)(const Conv&, int64_t begin, int64_t end);
  void (*matrix_forward)(const Matrix&, int64_t begin, int64_t end);
  void (*matrix_backward)(const Matrix&, int64_t begin, int64_t end);
  void (*vector_forward)(const Vectors&, int64_t begin, int64_t end);
  void (*vector_backward)(const Vectors&, int64_t begin, int64_t end);
  void (*neighborhood_forward)(const Neighborhood&, int64_t begin, int64_t end);
  void (*channel_gates)(const Merge&, int64_t begin, int64_t end);
  void (*weighted_sum)(const Merge&, int64_t begin, int64_t end);
  void (*shift_blend)(const Blend&, int64_t begin, int64_t end);
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  void (*rotate)(const Rotation&, int64_t begin, int64_t end);
  void (*gates)(const Gates&, bool back, int64_t begin, int64_t end);
  void (*to_float32)(const void* x, Dtype, int64_t n, float* y);
  void (*unary)(Unary, const float* x, float* y, int64_t n);
  float (*multiply_add)(int64_t rounds);
  float (*move_rows)(float* base, int64_t pitch, const int64_t* token, int64_t rows, int64_t width, bool fill);
};

#if defined(LINESCAN_X86)
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }
extern const Kernels* current;  // the instruction set in use

// While it lives, what is too small to be a normal number comes out as 0 on this thread: x86 computes such numbers in
// microcode, and every state that decays passes through them. Those that are read stay what they are: the conversion
// of float16 makes some.
class FlushToZero {
#ifdef LINESCAN_X86
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  const unsigned before_;
#endif
};

// Scratch memory, handed out in aligned pieces. Every thread keeps its own for the next call: fresh pages are slow.
struct ArenaMemory {
  float* data = nullptr;
  int64_t floats = 0;
  ~ArenaMemory() { std::free(data); }
};

class Arena {
 public:
  Arena() : counts_(true) {}  // only counts what is taken
  explicit Arena(int64_t floats) {
    if (floats <= memory.floats) return;
    std::free(memory.data);
    memory.data = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 4095) / 4096 * 4096));
    memory.floats = memory.data ? floats : 0;
    if (!memory.data) throw std::bad_alloc();
  }

  // Five lines of cache more, so that pieces of a power of two do not share the places where a cache can keep them.
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16 + 80; }
  float* take(int64_t floats) {
    float* piece = counts_ ? nullptr : memory.data + used_;
    used_ += rounded(floats);
    return piece;
  }
  bool counts() const { return counts_; }
  int64_t used() const { return used_; }

 private:
  static inline thread_local ArenaMemory memory;
  int64_t used_ = 0;
  bool counts_ = false;
};

}  // namespace linescan
