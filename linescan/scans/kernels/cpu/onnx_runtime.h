// The few functions of ONNX Runtime's C interface (1.17 or newer) that operators need, declared here so that building
// needs no header of it. `OrtApi` is a table of functions that only ever grows at its end: here each has its place in it,
// as onnxruntime_c_api.h, and the static assertions of onnxruntime_c_api.cc, have them.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace linescan::onnx {

constexpr uint32_t VERSION = 17;  // of the interface, the first with `parallel_for`

using Status = struct OpaqueStatus*;  // null: all is well
using Options = struct OpaqueOptions*;
using Domain = struct OpaqueDomain*;
using Context = struct OpaqueContext*;
using Info = const struct OpaqueInfo*;
using Value = struct OpaqueValue*;
using Shape = struct OpaqueShape*;
struct Operator;

struct Base {
  const void* const* (*table)(uint32_t version);  // null: this version is not known
};

// Functions of the table.
class Api {
 public:
  explicit Api(const void* const* table = nullptr) : table_(table) {}
  explicit operator bool() const { return table_ != nullptr; }

#define LINESCAN_FUNCTION(place, name, answer, ...)                                                                   \
  template <class... Arguments>                                                                                       \
  answer name(Arguments... arguments) const {                                                                         \
    return reinterpret_cast<answer (*)(__VA_ARGS__)>(const_cast<void*>(table_[place]))(arguments...);                 \
  }
  LINESCAN_FUNCTION(0, create_status, Status, int, const char*)
  LINESCAN_FUNCTION(2, message, const char*, Status)
  LINESCAN_FUNCTION(26, create_domain, Status, const char*, Domain*)
  LINESCAN_FUNCTION(27, add_operator, Status, Domain, const Operator*)
  LINESCAN_FUNCTION(28, add_domain, Status, Options, Domain)
  LINESCAN_FUNCTION(51, data, Status, Value, void**)
  LINESCAN_FUNCTION(61, dimensions, Status, Shape, size_t*)
  LINESCAN_FUNCTION(62, sizes, Status, Shape, int64_t*, size_t)
  LINESCAN_FUNCTION(65, shape, Status, Value, Shape*)
  LINESCAN_FUNCTION(85, real, Status, Info, const char*, float*)
  LINESCAN_FUNCTION(86, integer, Status, Info, const char*, int64_t*)
  LINESCAN_FUNCTION(88, inputs, Status, Context, size_t*)
  LINESCAN_FUNCTION(89, outputs, Status, Context, size_t*)
  LINESCAN_FUNCTION(90, input, Status, Context, size_t, Value*)
  LINESCAN_FUNCTION(91, output, Status, Context, size_t, const int64_t*, size_t, Value*)
  LINESCAN_FUNCTION(93, release_status, void, Status)
  LINESCAN_FUNCTION(99, release_shape, void, Shape)
  LINESCAN_FUNCTION(274, parallel_for, Status, Context, void (*)(void*, size_t), size_t, size_t, void*)
#undef LINESCAN_FUNCTION

  void check(Status status) const {
    if (!status) return;
    const std::string what = message(status);
    release_status(status);
    throw std::runtime_error(what);
  }

 private:
  const void* const* table_;
};

inline Api api;

// The kinds of a custom operator's tensors.
enum Element : int { FLOAT = 1, INT64 = 7 };
enum Presence : int { REQUIRED, OPTIONAL };

// `OrtCustomOp`: what ONNX Runtime asks of an operator. Functions that are null it does without.
struct Operator {
  uint32_t version = VERSION;
  void* (*create_old)(const Operator*, const void*, Info) = nullptr;
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  Element (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  Element (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void (*compute_old)(void*, Context) = nullptr;
  void (*destroy)(void*);
  Presence (*input_presence)(const Operator*, size_t);
  Presence (*output_presence)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  void* variadic[4] = {};
  Status (*create)(const Operator*, const void*, Info, void** kernel);
  Status (*compute)(void* kernel, Context);
  void* infer_shapes = nullptr;
  void* versions[2] = {};
};

// A contiguous tensor; empty where an optional one is left out.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Value value) {
    if (!value) return;
    Shape shape;
    size_t dim;
    api.check(api.shape(value, &shape));
    const std::unique_ptr<OpaqueShape, void (*)(Shape)> owned(shape, [](Shape x) { api.release_shape(x); });
    api.check(api.dimensions(shape, &dim));
    sizes_.resize(dim), strides_.resize(dim);
    api.check(api.sizes(shape, sizes_.data(), dim));
    api.check(api.data(value, &data_));
    int64_t step = 1;
    for (size_t i = dim; i-- > 0; step *= sizes_[i]) strides_[i] = step;
    there_ = true;
  }

  explicit operator bool() const { return there_; }
  int64_t dim() const { return sizes_.size(); }
  int64_t size(int64_t i) const { return sizes_.at(i < 0 ? i + dim() : i); }
  int64_t stride(int64_t i) const { return strides_.at(i < 0 ? i + dim() : i); }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  std::vector<int64_t> sizes_, strides_;
  void* data_ = nullptr;
  bool there_ = false;
};

inline Dtype dtype_of(const Tensor&) { return Dtype::float32; }
inline bool is_wide(const Tensor&) { return true; }

// The arguments of a call in the order of the schema: tensors from the call, all else from the node.
class Arguments {
 public:
  using Tensor = onnx::Tensor;
  bool fit = true;

  Arguments(Context context, const std::vector<double>& others) : context_(context), other_(others.data()) {
    api.check(api.inputs(context, &inputs_));
  }
  Tensor tokens() { return next(); }
  Tensor optional_tokens() { return next(); }
  Tensor parameter() { return next(); }
  Tensor optional_parameter() { return next(); }
  Tensor optional() { return next(); }
  Tensor table() { return next(); }
  bool flag() { return *other_++ != 0; }
  int64_t integer() { return int64_t(*other_++); }
  double number() { return *other_++; }

  // Room for an output; empty where the node does not have it.
  Tensor output(size_t at, const std::vector<int64_t>& shape) const {
    size_t count;
    Value value = nullptr;
    api.check(api.outputs(context_, &count));
    if (at < count) api.check(api.output(context_, at, shape.data(), shape.size(), &value));
    return Tensor(value);
  }

  // The session's own number is not told: at most so many.
  int64_t threads() const {
    static const int64_t count = std::thread::hardware_concurrency();
    return count > 0 ? count : 1;
  }

  // f(begin, end) over [0, count) on the session's threads, at least `grain` of them each.
  template <class F>
  void parallel(int64_t count, int64_t grain, const F& f) const {
    if (count <= grain) {
      if (count > 0) f(int64_t(0), count);
      return;
    }
    struct Work {
      const F& f;
      int64_t count, parts;
    } work{f, count, std::min(threads(), (count + grain - 1) / grain)};
    const auto part = [](void* context, size_t i) {
      const Work& w = *static_cast<const Work*>(context);
      w.f(w.count * int64_t(i) / w.parts, w.count * int64_t(i + 1) / w.parts);
    };
    api.check(api.parallel_for(context_, static_cast<void (*)(void*, size_t)>(part), work.parts, 0, &work));
  }

 private:
  Tensor next() {
    Value value = nullptr;
    if (at_ < inputs_) api.check(api.input(context_, at_++, &value));
    return Tensor(value);
  }

  Context context_;
  const double* other_;
  size_t at_ = 0, inputs_ = 0;
};

}  // namespace linescan::onnx
