// What the bindings of all families share: arguments of the kernel interfaces from Python's, with
// tensors as dicts (kernel_calls.py makes them), and workspaces.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <new>
#include <string>

#include "common/dispatch.h"
#include "lowrank/thin_product.cuh"

namespace py = pybind11;
using namespace lowrank_ext::cuda;

inline ComputeType compute_type_named(const std::string& name) {
  if (name == "bf16") return ComputeType::kBf16;
  if (name == "fp16") return ComputeType::kFp16;
  if (name == "tf32") return ComputeType::kTf32;
  if (name == "fp32") return ComputeType::kFp32;
  if (name == "fp64") return ComputeType::kFp64;
  throw py::value_error("compute_type must be bf16, fp16, tf32, fp32 or fp64, got " + name);
}

inline ElementType element_type_of(const std::string& name) {
  if (name == "bfloat16") return ElementType::kBf16;
  if (name == "float16") return ElementType::kFp16;
  if (name == "float32") return ElementType::kFp32;
  if (name == "float64") return ElementType::kFp64;
  throw py::value_error("dtype must be a float type, got " + name);
}

// A tensor, or None where the argument is absent.
inline MatrixRef ref_of(const py::object& matrix) {
  if (matrix.is_none()) return {};
  return {reinterpret_cast<void*>(matrix["data_ptr"].cast<uintptr_t>()),
          element_type_of(matrix["dtype"].cast<std::string>()), matrix["num_rows"].cast<int64_t>(),
          matrix["num_cols"].cast<int64_t>(), matrix["row_stride"].cast<int64_t>()};
}

// `seed` is the address of one int64, or 0.
inline DropoutArgs dropout_of(uint32_t threshold, uintptr_t seed) {
  const double scale = threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold);
  return {threshold, scale, reinterpret_cast<const int64_t*>(seed)};
}

// Exactly as large as a size function says, filled with NaN.
class Workspace {
 public:
  explicit Workspace(int64_t num_bytes)
      : data_(::operator new(static_cast<size_t>(num_bytes), kAlignment)) {
    std::memset(data_, 0xFF, static_cast<size_t>(num_bytes));
  }
  ~Workspace() { ::operator delete(data_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{128};
  void* data_;
};

inline ComputeTraits compute_traits_of(ComputeType compute_type) {
  return dispatch(compute_type, [](auto compute) { return compute_traits<decltype(compute)>(); });
}

inline StackRef stack_of(const py::object& stack) {
  return {ref_of(stack), stack["num_groups"].cast<int64_t>(),
          stack["group_stride"].cast<int64_t>()};
}
