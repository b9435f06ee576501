// The few functions of libtorch's stable C interface (torch >= 2.10) that the kernels need, declared here so that
// building needs neither torch nor its headers, and found at load time so that the library links nothing of torch:
// one file for every Python and every torch. Signatures as in torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h, which promise not to change them.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace linescan::stable {

using Value = uint64_t;  // an argument or result on the stack: a bool, an integer, a tensor handle, or a pointer
using Handle = struct OpaqueTensor*;
using Library = struct OpaqueLibrary*;
using Boxed = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);
using Loop = void (*)(int64_t begin, int64_t end, void* context);

constexpr uint64_t VERSION = (uint64_t(2) << 56) | (uint64_t(10) << 48);

template <class F>
F* find(const char* name, bool& complete) {
#if defined(__APPLE__)
  void* loaded = dlopen("@rpath/libtorch_cpu.dylib", RTLD_NOW | RTLD_NOLOAD);
#else
  void* loaded = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
#endif
  void* found = dlsym(loaded ? loaded : RTLD_DEFAULT, name);
  complete &= found != nullptr;
  return reinterpret_cast<F*>(found);
}

struct Interface {
  bool complete = true;  // false with a torch that is too old
#define LINESCAN_FUNCTION(name, ...) int32_t (*name)(__VA_ARGS__) = find<int32_t(__VA_ARGS__)>(#name, complete)
  LINESCAN_FUNCTION(aoti_torch_library_init_fragment, const char*, const char*, uint32_t, Library*);
  LINESCAN_FUNCTION(aoti_torch_library_init_impl, const char*, const char*, const char*, uint32_t, Library*);
  LINESCAN_FUNCTION(aoti_torch_library_def, Library, const char*);
  LINESCAN_FUNCTION(torch_library_impl, Library, const char*, Boxed, uint64_t);
  LINESCAN_FUNCTION(aoti_torch_delete_tensor_object, Handle);
  LINESCAN_FUNCTION(aoti_torch_get_dtype, Handle, int32_t*);
  LINESCAN_FUNCTION(aoti_torch_get_dim, Handle, int64_t*);
  LINESCAN_FUNCTION(aoti_torch_get_sizes, Handle, int64_t**);
  LINESCAN_FUNCTION(aoti_torch_get_strides, Handle, int64_t**);
  LINESCAN_FUNCTION(torch_get_const_data_ptr, Handle, const void**);
  LINESCAN_FUNCTION(aoti_torch_dtype_float32);
  LINESCAN_FUNCTION(aoti_torch_dtype_bfloat16);
  LINESCAN_FUNCTION(aoti_torch_dtype_float16);
  LINESCAN_FUNCTION(aoti_torch_dtype_int32);
  LINESCAN_FUNCTION(aoti_torch_dtype_int64);
  LINESCAN_FUNCTION(torch_get_num_threads, uint32_t*);
  LINESCAN_FUNCTION(torch_parallel_for, int64_t, int64_t, int64_t, Loop, void*);
#undef LINESCAN_FUNCTION
};

inline Interface& found() {
  static Interface functions;
  return functions;
}
inline const Interface& torch() { return found(); }

// Whether torch is there, looked for once more if it was not: ONNX Runtime may have loaded the library before it.
inline bool is_there() {
  if (!found().complete) found() = Interface();
  return found().complete;
}

inline void check(int32_t status) {
  if (status != 0) throw std::runtime_error("linescan: a call into libtorch failed");
}

// A tensor argument; empty for a None.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Handle handle) : handle_(handle) {
    if (!handle_) return;
    check(torch().aoti_torch_get_sizes(handle_, &sizes_));
    check(torch().aoti_torch_get_strides(handle_, &strides_));
    check(torch().aoti_torch_get_dim(handle_, &dim_));
    check(torch().aoti_torch_get_dtype(handle_, &dtype_));
    const void* data;
    check(torch().torch_get_const_data_ptr(handle_, &data));
    data_ = const_cast<void*>(data);
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(wide_, other.wide_);
    std::swap(handle_, other.handle_), std::swap(sizes_, other.sizes_), std::swap(strides_, other.strides_);
    std::swap(dim_, other.dim_), std::swap(dtype_, other.dtype_), std::swap(data_, other.data_);
    return *this;
  }
  ~Tensor() {
    if (handle_) torch().aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim_ - 1; i >= 0; step *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != step) return false;
    return true;
  }
  int64_t dim() const { return dim_; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
    return count;
  }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  int32_t dtype() const { return dtype_; }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

  // From now on its numbers, which stand next to each other, are a copy in float32.
  void widen(Dtype dtype) {
    wide_.reset(new float[numel()]);
    current->to_float32(data_, dtype, numel(), wide_.get());
    data_ = wide_.get(), dtype_ = torch().aoti_torch_dtype_float32();
  }

 private:
  Handle handle_ = nullptr;
  int64_t *sizes_ = nullptr, *strides_ = nullptr, dim_ = 0;
  int32_t dtype_ = 0;
  void* data_ = nullptr;
  std::unique_ptr<float[]> wide_;
};

inline Dtype dtype_of(const Tensor& x) {
  if (x.dtype() == torch().aoti_torch_dtype_float32()) return Dtype::float32;
  if (x.dtype() == torch().aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  if (x.dtype() == torch().aoti_torch_dtype_float16()) return Dtype::float16;
  throw std::runtime_error("linescan: the CPU kernels take float32, bfloat16 and float16 tokens");
}
inline bool is_wide(const Tensor& x) { return x.dtype() == torch().aoti_torch_dtype_int64(); }

// f(begin, end) over [0, count) on torch's own threads, at least `grain` of them each.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  const Loop loop = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  check(torch().torch_parallel_for(0, count, grain, loop, const_cast<F*>(&f)));
}

// Takes the arguments off the stack in the order of the schema.
class Arguments {
 public:
  using Tensor = stable::Tensor;
  Arguments(Value* stack) : next_(stack) {}
  bool fit = true;  // whether the kernels can read all of them as they stand

  Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*next_++)); }
  Tensor optional() {
    Value* inner = reinterpret_cast<Value*>(*next_++);
    if (!inner) return Tensor();
    Handle handle = reinterpret_cast<Handle>(*inner);
    delete inner;  // libtorch made it with `new`
    return Tensor(handle);
  }
  // Tokens, whose channels stand next to each other.
  Tensor tokens() { return adjacent(tensor()); }
  Tensor optional_tokens() { return adjacent(optional()); }
  // A parameter or state, in float32.
  Tensor parameter() { return wide(tensor()); }
  Tensor optional_parameter() { return wide(optional()); }
  // A table of routes, int32 or int64.
  Tensor table() {
    Tensor x = optional();
    const bool wide = x && is_wide(x);
    return plain(std::move(x), wide ? torch().aoti_torch_dtype_int64() : torch().aoti_torch_dtype_int32());
  }
  bool flag() { return *reinterpret_cast<const bool*>(next_++); }
  int64_t integer() { return int64_t(*next_++); }
  double number() {
    double x;
    std::memcpy(&x, next_++, sizeof x);
    return x;
  }

  int64_t threads() const {
    uint32_t count = 1;
    check(torch().torch_get_num_threads(&count));
    return count;
  }
  template <class F>
  void parallel(int64_t count, int64_t grain, const F& f) const {
    stable::parallel(count, grain, f);
  }

 private:
  Tensor adjacent(Tensor x) {
    fit &= !x || x.stride(-1) == 1 || x.size(-1) == 1;
    return x;
  }
  Tensor wide(Tensor x) {
    const auto is = [&](int32_t dtype) { return x && x.dtype() == dtype && x.contiguous(); };
    if (is(torch().aoti_torch_dtype_bfloat16())) x.widen(Dtype::bfloat16);
    if (is(torch().aoti_torch_dtype_float16())) x.widen(Dtype::float16);
    return plain(std::move(x), torch().aoti_torch_dtype_float32());
  }
  Tensor plain(Tensor x, int32_t dtype) {
    fit &= !x || (x.dtype() == dtype && x.contiguous());
    return x;
  }

  Value* next_;
};

// Adds an operator linescan_cpu::NAME with an implementation for `key`. The library handles live as long as the process.
inline void define(const char* schema, const char* name, const char* key, Boxed function) {
  Library fragment, kernels;
  check(torch().aoti_torch_library_init_fragment("linescan_cpu", __FILE__, __LINE__, &fragment));
  check(torch().aoti_torch_library_def(fragment, schema));
  check(torch().aoti_torch_library_init_impl("linescan_cpu", key, __FILE__, __LINE__, &kernels));
  check(torch().torch_library_impl(kernels, name, function, VERSION));
}

// What the source files define: at once, or when torch is there. With a torch that is too old the caller sees that there are
// no operators.
inline std::vector<void (*)()>& pending() {
  static std::vector<void (*)()> list;
  return list;
}
inline void define_pending() {
  if (!is_there()) return;
  for (void (*define_all)() : pending()) define_all();
  pending().clear();
}
struct Definitions {
  explicit Definitions(void (*define_all)()) {
    pending().push_back(define_all);
    define_pending();
  }
};

}  // namespace linescan::stable
