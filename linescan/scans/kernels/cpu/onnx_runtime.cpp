// The kernels as operators of ONNX Runtime: domain "linescan", version 1, names and arguments as those of linescan_cpu::*.
// Tensors are float32, route tables int64; a bool, an integer or a float of the schema is an attribute of the node.

#include "onnx_runtime.h"

#include <sstream>

#include "calls.h"

namespace linescan::onnx {
namespace {

struct Input {
  bool optional;
  Element type;
};

struct Attribute {
  std::string name;
  bool is_float;
};

struct Kernel {
  const struct Kind* kind;
  std::vector<double> others;
};

// An operator, made from the schema that torch has of it.
struct Kind : Operator {
  std::string name_;
  std::vector<Input> inputs;
  std::vector<Attribute> attributes;
  void (*run)(Arguments&);
  Presence state;

  Kind(const char* called, const char* schema, void (*run)(Arguments&), Presence state)
      : name_(called), run(run), state(state) {
    std::istringstream words(schema);
    std::string type, argument;
    while (words >> type >> argument) {
      if (argument.back() == ',') argument.pop_back();
      if (type.compare(0, 6, "Tensor") == 0) inputs.push_back({type.back() == '?', argument == "route" ? INT64 : FLOAT});
      else attributes.push_back({argument, type == "float"});
    }
    name = [](const Operator* self) { return of(self).name_.c_str(); };
    provider = [](const Operator*) { return static_cast<const char*>(nullptr); };
    input_type = [](const Operator* self, size_t i) { return of(self).inputs[i].type; };
    input_count = [](const Operator* self) { return of(self).inputs.size(); };
    output_type = [](const Operator*, size_t) { return FLOAT; };
    output_count = [](const Operator*) { return size_t(2); };
    input_presence = [](const Operator* self, size_t i) { return of(self).inputs[i].optional ? OPTIONAL : REQUIRED; };
    output_presence = [](const Operator* self, size_t i) { return i ? of(self).state : REQUIRED; };
    input_memory = [](const Operator*, size_t) { return 0; };
    create = [](const Operator* self, const void*, Info info, void** kernel) { return of(self).make(info, kernel); };
    compute = [](void* kernel, Context context) { return compute_with(*static_cast<const Kernel*>(kernel), context); };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  static const Kind& of(const Operator* self) { return *static_cast<const Kind*>(self); }

  Status make(Info info, void** kernel) const {
    Kernel made{this, {}};
    for (const Attribute& attribute : attributes) {
      float real = 0;
      int64_t integer = 0;
      const char* key = attribute.name.c_str();
      if (Status status = attribute.is_float ? api.real(info, key, &real) : api.integer(info, key, &integer)) return status;
      made.others.push_back(attribute.is_float ? double(real) : double(integer));
    }
    *kernel = new Kernel(std::move(made));
    return nullptr;
  }

  static Status compute_with(const Kernel& kernel, Context context) {
    try {
      Arguments in(context, kernel.others);
      kernel.kind->run(in);
      return nullptr;
    } catch (const std::exception& error) {
      return api.create_status(1, error.what());
    }
  }
};

template <template <class> class Inputs>
void run(Arguments& in) {
  Inputs<Arguments> inputs(in);
  inputs.forward(in, in.output(0, inputs.output_shape()), in.output(1, inputs.state_shape()));
}

const Kind kinds[] = {
    {"selective_scan", LINESCAN_SCAN_INPUTS, run<ScanInputs>, REQUIRED},
    {"causal_conv1d", LINESCAN_CONV_INPUTS, run<ConvInputs>, REQUIRED},
    {"matrix_scan", LINESCAN_MATRIX_INPUTS, run<MatrixInputs>, REQUIRED},
    {"vector_scan", LINESCAN_VECTOR_INPUTS, run<VectorInputs>, OPTIONAL},
};

// The domain lives as long as the process: sessions refer to it.
Status add_to(Options options) {
  static Domain domain = nullptr;
  if (!domain) {
    Domain made;
    if (Status status = api.create_domain("linescan", &made)) return status;
    for (const Kind& kind : kinds)
      if (Status status = api.add_operator(made, static_cast<const Operator*>(&kind))) return status;
    domain = made;
  }
  return api.add_domain(options, domain);
}

}  // namespace

// What `SessionOptions.register_custom_ops_library` calls.
extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(Options options, const Base* base) {
  api = Api(base->table(VERSION));
  if (api) return add_to(options);
  return Api(base->table(1)).create_status(1, "linescan: the kernels need ONNX Runtime 1.17 or newer");
}

}  // namespace linescan::onnx
