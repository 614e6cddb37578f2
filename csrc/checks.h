// Argument checks shared by the CPU and the CUDA backend. They run once, at the op boundary, before
// any tensor is read; kernels trust them. Messages: op, argument, expected, got.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace lowrank_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
  text << ']';
  return text.str();
}

inline int32_t device_type_of(const Tensor& tensor) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  return device_type;
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "another dtype";
  }
}

using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

// Torch passes None for a required tensor as one that is not defined.
inline void check_given(const char* op, NamedTensors tensors) {
  for (const auto& [name, tensor] : tensors)
    check(tensor->defined(), op, ": ", name, " must be a tensor, got None");
}

inline bool is_half_size(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like, const char* like_name) {
  const bool same = device_type_of(tensor) == device_type_of(like) &&
                    tensor.get_device_index() == like.get_device_index();
  if (!same)
    fail(op, ": ", name, " must be on the device of ", like_name, " (", device_of(like), "), got ",
         device_of(tensor));
}

// `expected` are the parts of the shape in words, e.g. "[r, in_features=", 4096, "]". No text is made
// of a shape that matches: it would take longer than the whole rest of a small call's checks.
template <typename... Parts>
inline void check_shape(const char* op, const char* name, const Tensor& tensor, bool matches,
                        const Parts&... expected) {
  if (!matches) fail(op, ": ", name, " must be ", expected..., ", got ", shape_of(tensor));
}

inline void check_input_dtype(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Double || dtype == ScalarType::Float || is_half_size(dtype), op, ": ",
        name, " must be float64, float32, bfloat16 or float16, got ", dtype_name(dtype));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
        dtype_name(tensor.scalar_type()));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor,
                             const Tensor& like, const char* like_name) {
  check(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
        like_name, " (", dtype_name(like.scalar_type()), "), got ",
        dtype_name(tensor.scalar_type()));
}

inline void check_adapter_dtype(const char* op, const char* name, const Tensor& tensor,
                                const Tensor& like, const char* like_name) {
  const ScalarType dtype = tensor.scalar_type();
  const bool half_with_float = is_half_size(like.scalar_type()) && dtype == ScalarType::Float;
  check(dtype == like.scalar_type() || half_with_float, op, ": ", name, " must have the dtype of ",
        like_name, " (", dtype_name(like.scalar_type()),
        "), or float32 beside bfloat16 and float16, got ", dtype_name(dtype));
}

inline void check_dropout(const char* op, double dropout_p, const std::optional<Tensor>& seed,
                          const Tensor& like, const char* like_name) {
  check(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be between 0 and 1, got ",
        dropout_p);
  check(seed.has_value() || dropout_p == 0.0, op,
        ": seed must be an int64 tensor of one element when dropout_p > 0"
        ", got None");
  if (!seed) return;
  // Without dropout too: a backend must never see a tensor of another device.
  check_same_device(op, "seed", *seed, like, like_name);
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
        ": seed must be an int64 tensor of one element, got ", dtype_name(seed->scalar_type()), ' ',
        shape_of(*seed));
}

// Whether `left` starts with the dimensions of `right` without its last one.
inline bool starts_with_leading_dims(const Tensor& left, const Tensor& right) {
  for (int64_t dim = 0; dim + 1 < right.dim(); ++dim)
    if (left.size(dim) != right.size(dim)) return false;
  return true;
}

inline bool leading_dims_match(const Tensor& left, const Tensor& right) {
  return left.dim() == right.dim() && starts_with_leading_dims(left, right);
}

// One value for each row of `like`.
inline bool is_per_row(const Tensor& tensor, const Tensor& like) {
  return tensor.dim() + 1 == like.dim() && starts_with_leading_dims(tensor, like);
}

inline void check_dout(const char* op, const Tensor& dout, int64_t out_features) {
  check_shape(op, "dout", dout, dout.dim() >= 1 && dout.size(dout.dim() - 1) == out_features,
              "[..., out_features=", out_features, "]");
}

// A tensor that forward kept for backward.
inline void check_saved(const char* op, const char* name, const std::optional<Tensor>& saved,
                        bool needed, const Tensor& dout, const char* last_name, int64_t last) {
  check(!needed || saved.has_value(), op, ": ", name,
        " must be given for the gradients asked for, got None");
  if (!saved) return;
  check_shape(op, name, *saved,
              leading_dims_match(*saved, dout) && saved->size(saved->dim() - 1) == last,
              "dout's leading dimensions and ", last_name, "=", last);
  check_same_dtype(op, name, *saved, dout, "dout");
  check_same_device(op, name, *saved, dout, "dout");
}

// x and base_out of an op that adds a branch to the output of any base module.
inline void check_x_and_base_out(const char* op, const Tensor& x, const Tensor& base_out) {
  check_input_dtype(op, "x", x);
  check_shape(op, "x", x, x.dim() >= 1, "[..., in_features]");
  check_shape(op, "base_out", base_out, leading_dims_match(base_out, x),
              "x's leading dimensions and out_features");
  check_same_dtype(op, "base_out", base_out, x, "x");
  check_same_device(op, "base_out", base_out, x, "x");
}

}  // namespace lowrank_ext
