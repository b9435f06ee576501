// Farthest point sampling, exactly as the loop over all distances gives it, but only near the newest sample.
//
// The points are put into boxes of nearby ones. A sample changes nothing in a box whose nearest corner is farther from it
// than every point of the box is from its nearest sample. Rounding cannot spoil this: the distance to a box is computed in
// the same order as that to a point, and each of the operations is monotone.

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "stable.h"

// Fused multiply-adds would give other roundings than torch.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace linescan {
namespace {

using stable::Arguments;
using stable::Tensor;
using stable::Value;

constexpr int64_t LANES = 8;       // points side by side: a box is padded to a multiple
constexpr int64_t LARGEST = 64;    // points in a box
constexpr int32_t NONE = std::numeric_limits<int32_t>::max();

template <class T>
T squared_distance(T x, T y, T z) {
  T sum = x * x;
  sum += y * y;
  sum += z * z;
  return sum;
}

template <class T>
class Cloud {
 public:
  // Of points (n, 3), those that are live. No distance counts for more than sqrt(limit).
  Cloud(const T* points, const char* live, int64_t n, T limit) : points_(points) {
    for (int64_t i = 0; i < n; ++i)
      if (live[i]) members_.push_back(int32_t(i));
    split(0, members_.size(), limit);
    near_.resize(box_row_.size());
  }

  // Writes `count` rows: `first`, then the farthest in turn.
  void sample(int64_t first, int64_t count, int64_t* chosen) {
    int64_t last = first;
    chosen[0] = first;
    for (int64_t i = 1; i < count; ++i) {
      const int32_t next = add(points_ + 3 * last);
      chosen[i] = last = next == NONE ? first : next;
    }
  }

 private:
  // Halves members [begin, end) along their longest side until they fit a box.
  void split(int64_t begin, int64_t end, T limit) {
    if (begin == end) return;
    T low[3], high[3];
    for (int axis = 0; axis < 3; ++axis) low[axis] = high[axis] = at(members_[begin], axis);
    for (int64_t i = begin; i < end; ++i)
      for (int axis = 0; axis < 3; ++axis) {
        low[axis] = std::min(low[axis], at(members_[i], axis));
        high[axis] = std::max(high[axis], at(members_[i], axis));
      }
    if (end - begin > LARGEST) {
      int axis = 0;
      for (int other = 1; other < 3; ++other)
        if (high[other] - low[other] > high[axis] - low[axis]) axis = other;
      const int64_t middle = begin + (end - begin) / 2;
      std::nth_element(members_.begin() + begin, members_.begin() + middle, members_.begin() + end,
                       [&](int32_t i, int32_t j) { return at(i, axis) < at(j, axis); });
      split(begin, middle, limit);
      split(middle, end, limit);
      return;
    }
    box_begin_.push_back(row_.size());
    for (int axis = 0; axis < 3; ++axis) low_[axis].push_back(low[axis]), high_[axis].push_back(high[axis]);
    box_far_.push_back(limit);
    box_row_.push_back(*std::min_element(members_.begin() + begin, members_.begin() + end));
    for (int64_t i = begin; i < end; ++i) {
      for (int axis = 0; axis < 3; ++axis) axes_[axis].push_back(at(members_[i], axis));
      far_.push_back(limit), row_.push_back(members_[i]);
    }
    while (row_.size() % LANES) {
      for (auto& axis : axes_) axis.push_back(0);
      far_.push_back(-1), row_.push_back(NONE);
    }
    box_end_.push_back(row_.size());
  }

  T at(int64_t i, int axis) const { return points_[3 * i + axis]; }

  // Takes a sample into account; returns the row that is farthest from all samples now.
  int32_t add(const T* p) {
    const int64_t boxes = near_.size();
    const T *x0 = low_[0].data(), *y0 = low_[1].data(), *z0 = low_[2].data();
    const T *x1 = high_[0].data(), *y1 = high_[1].data(), *z1 = high_[2].data();
    T* near = near_.data();
    for (int64_t b = 0; b < boxes; ++b) {
      const T x = gap(x0[b] - p[0], p[0] - x1[b]), y = gap(y0[b] - p[1], p[1] - y1[b]);
      near[b] = squared_distance(x, y, gap(z0[b] - p[2], p[2] - z1[b]));
    }
    T farthest = -1;
    int32_t row = NONE;
    for (int64_t b = 0; b < boxes; ++b) {
      if (near[b] < box_far_[b]) update(b, p);
      if (box_far_[b] > farthest || (box_far_[b] == farthest && box_row_[b] < row))
        farthest = box_far_[b], row = box_row_[b];
    }
    return row;
  }

  static T gap(T below, T above) {
    const T outside = below > above ? below : above;
    return outside > 0 ? outside : 0;
  }

  void update(int64_t box, const T* p) {
    const int64_t begin = box_begin_[box], end = box_end_[box];
    const T *x = axes_[0].data(), *y = axes_[1].data(), *z = axes_[2].data();
    T* far = far_.data();
    T most[LANES];
    std::fill(most, most + LANES, T(-1));
    for (int64_t i = begin; i < end; i += LANES)
      for (int64_t j = 0; j < LANES; ++j) {
        const T d = squared_distance(x[i + j] - p[0], y[i + j] - p[1], z[i + j] - p[2]);
        const T kept = far[i + j] < d ? far[i + j] : d;
        far[i + j] = kept;
        most[j] = kept > most[j] ? kept : most[j];
      }
    const T best = *std::max_element(most, most + LANES);
    int32_t row = NONE;
    for (int64_t i = begin; i < end; ++i)
      if (far[i] == best && row_[i] < row) row = row_[i];
    box_far_[box] = best, box_row_[box] = row;
  }

  const T* points_;
  std::vector<int32_t> members_;
  // Points, box after box.
  std::vector<T> axes_[3], far_;  // far: squared distance to the nearest sample
  std::vector<int32_t> row_;
  // Boxes.
  std::vector<int64_t> box_begin_, box_end_;
  std::vector<T> low_[3], high_[3], near_, box_far_;
  std::vector<int32_t> box_row_;  // its farthest point, the lowest row of several
};

template <class T>
void sample(const Tensor& points, const Tensor& live, const Tensor& first, bool limited, const Tensor& chosen) {
  const int64_t n = points.size(1), count = chosen.size(1);
  const T limit = limited ? T(1e10) : std::numeric_limits<T>::infinity();
  stable::parallel(points.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* cloud = static_cast<const T*>(points.data()) + b * n * 3;
      Cloud<T>(cloud, static_cast<const char*>(live.data()) + b * n, n, limit)
          .sample(static_cast<const int64_t*>(first.data())[b], count,
                  static_cast<int64_t*>(chosen.data()) + b * count);
    }
  });
}

// (Tensor points, Tensor live, Tensor first, bool limited, Tensor(a!) chosen) -> (): see linescan/layers/points.py.
void farthest_points(Value* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor points = in.tensor(), live = in.tensor(), first = in.tensor();
  const bool limited = in.flag();
  const Tensor chosen = in.tensor();
  if (points.dtype() == stable::torch().aoti_torch_dtype_float32()) sample<float>(points, live, first, limited, chosen);
  else sample<double>(points, live, first, limited, chosen);
}

const stable::Definitions definitions([] {
  stable::define("farthest_points(Tensor points, Tensor live, Tensor first, bool limited, Tensor(a!) chosen) -> ()",
                 "farthest_points", "CPU", farthest_points);
});

}  // namespace
}  // namespace linescan
