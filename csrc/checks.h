// Argument checks shared by the CPU and the CUDA backend. They run once, at the op boundary, before
// any tensor is read; kernels trust them. Messages: op, argument, expected, got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lowrank_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Everything about the low-rank branch that its forward and its backward both need.
struct BranchArgs {
  Tensor lora_a;                     // [r, K]
  Tensor lora_b;                     // [N, r]
  std::optional<Tensor> core;        // [r, r]
  std::optional<Tensor> rank_scale;  // [r]
  std::optional<Tensor> out_scale;   // [N]
  double scaling;
  double dropout_p;
  std::optional<Tensor> seed;  // int64, one element
  bool allow_tf32;             // in products of fp32 on a GPU, as torch is set

  int64_t rank() const { return lora_a.size(0); }
  int64_t in_features() const { return lora_a.size(1); }
  int64_t out_features() const { return lora_b.size(0); }
};

// Which gradients a backward call is asked for.
struct BranchNeeds {
  bool dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale;

  bool mid_gradient() const { return dx || dlora_a || dcore || drank_scale; }
  bool h() const { return dlora_b || dout_scale || dcore || drank_scale; }
};

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
    default:
      return "another dtype";
  }
}

inline bool is_half_size(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like, const char* like_name) {
  check(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
        op, ": ", name, " must be on the device of ", like_name, " (", device_of(like), "), got ",
        device_of(tensor));
}

// `expected` is the shape in words, e.g. "[r, in_features=4096]".
inline void check_shape(const char* op, const char* name, const Tensor& tensor, bool matches,
                        const std::string& expected) {
  check(matches, op, ": ", name, " must be ", expected, ", got ", shape_of(tensor));
}

inline void check_input_dtype(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Double || dtype == ScalarType::Float || is_half_size(dtype), op, ": ",
        name, " must be float64, float32, bfloat16 or float16, got ", dtype_name(dtype));
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
  // Also where it is not used: a backend must never see a tensor of another device.
  if (seed) check_same_device(op, "seed", *seed, like, like_name);
  if (dropout_p == 0.0) return;
  check(seed.has_value(), op,
        ": seed must be an int64 tensor of one element when dropout_p > 0"
        ", got None");
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
        ": seed must be an int64 tensor of one element, got ", dtype_name(seed->scalar_type()), ' ',
        shape_of(*seed));
}

// Checks the branch against `like` (x in the forward, dout in the backward: device and dtype).
inline void check_branch(const char* op, const BranchArgs& args, const Tensor& like,
                         const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor& a = args.lora_a;
  const Tensor& b = args.lora_b;
  check_shape(op, "lora_a", a, a.dim() == 2 && a.size(0) >= 1 && a.size(1) == in_features,
              "[r, in_features=" + std::to_string(in_features) + "]");
  const std::string r = "r=" + std::to_string(a.size(0));
  const std::string n = "out_features=" + std::to_string(out_features);
  check_shape(op, "lora_b", b, b.dim() == 2 && b.size(0) == out_features && b.size(1) == a.size(0),
              "[" + n + ", " + r + "]");
  const auto check_one = [&](const char* name, const std::optional<Tensor>& tensor, bool square,
                             int64_t size, const std::string& words) {
    if (!tensor) return;
    const bool matches =
        square ? tensor->dim() == 2 && tensor->size(0) == size && tensor->size(1) == size
               : tensor->dim() == 1 && tensor->size(0) == size;
    check_shape(op, name, *tensor, matches, words);
    check_adapter_dtype(op, name, *tensor, like, like_name);
    check_same_device(op, name, *tensor, like, like_name);
  };
  check_one("core", args.core, true, a.size(0), "[" + r + ", " + r + "]");
  check_one("rank_scale", args.rank_scale, false, a.size(0), "[" + r + "]");
  check_one("out_scale", args.out_scale, false, out_features, "[" + n + "]");
  for (const auto& [name, tensor] : {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}}) {
    check_adapter_dtype(op, name, *tensor, like, like_name);
    check_same_device(op, name, *tensor, like, like_name);
  }
  check_dropout(op, args.dropout_p, args.seed, like, like_name);
}

inline bool leading_dims_match(const Tensor& left, const Tensor& right) {
  if (left.dim() != right.dim()) return false;
  for (int64_t dim = 0; dim + 1 < left.dim(); ++dim)
    if (left.size(dim) != right.size(dim)) return false;
  return true;
}

// A tensor that forward kept for backward.
inline void check_saved(const char* op, const char* name, const std::optional<Tensor>& saved,
                        bool needed, const Tensor& dout, const char* last_name, int64_t last) {
  check(!needed || saved.has_value(), op, ": ", name,
        " must be given for the gradients asked for, got None");
  if (!saved) return;
  check_shape(
      op, name, *saved, leading_dims_match(*saved, dout) && saved->size(saved->dim() - 1) == last,
      std::string("dout's leading dimensions and ") + last_name + "=" + std::to_string(last));
  check_same_dtype(op, name, *saved, dout, "dout");
  check_same_device(op, name, *saved, dout, "dout");
}

// What both backward ops check, beyond their base's own arguments.
inline void check_backward(const char* op, const BranchArgs& args, const BranchNeeds& needs,
                           const Tensor& dout, const std::optional<Tensor>& x,
                           const std::optional<Tensor>& h, int64_t in_features,
                           int64_t out_features) {
  check_shape(op, "dout", dout, dout.dim() >= 1 && dout.size(dout.dim() - 1) == out_features,
              "[..., out_features=" + std::to_string(out_features) + "]");
  check_branch(op, args, dout, "dout", in_features, out_features);
  check_saved(op, "x", x, needs.dlora_a, dout, "in_features", in_features);
  check_saved(op, "h", h, needs.h(), dout, "r", args.rank());
  check(!needs.dcore || args.core, op, ": core must be given when need_dcore, got None");
  check(!needs.drank_scale || args.rank_scale, op,
        ": rank_scale must be given when need_drank_scale, got None");
  check(!needs.dout_scale || args.out_scale, op,
        ": out_scale must be given when need_dout_scale, got None");
}

// ---- the ops

inline void check_weight(const char* op, const Tensor& weight, const Tensor& like,
                         const char* like_name) {
  check_shape(op, "weight", weight, weight.dim() == 2, "[out_features, in_features]");
  check_same_dtype(op, "weight", weight, like, like_name);
  check_same_device(op, "weight", weight, like, like_name);
}

inline void check_lowrank_linear(const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias, const BranchArgs& args) {
  constexpr const char* kOp = "lowrank_linear";
  check_input_dtype(kOp, "x", x);
  check_weight(kOp, weight, x, "x");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_shape(kOp, "x", x, x.dim() >= 1 && x.size(x.dim() - 1) == in_features,
              "[..., in_features=" + std::to_string(in_features) + "]");
  if (bias) {
    check_shape(kOp, "bias", *bias, bias->dim() == 1 && bias->size(0) == out_features,
                "[out_features=" + std::to_string(out_features) + "]");
    check_same_dtype(kOp, "bias", *bias, x, "x");
    check_same_device(kOp, "bias", *bias, x, "x");
  }
  check_branch(kOp, args, x, "x", in_features, out_features);
}

inline void check_lowrank_linear_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                          const Tensor& weight, const std::optional<Tensor>& h,
                                          const BranchArgs& args, const BranchNeeds& needs) {
  constexpr const char* kOp = "lowrank_linear_backward";
  check_input_dtype(kOp, "dout", dout);
  check_weight(kOp, weight, dout, "dout");
  check_backward(kOp, args, needs, dout, x, h, weight.size(1), weight.size(0));
}

inline void check_lowrank_add(const Tensor& base_out, const Tensor& x, const BranchArgs& args) {
  constexpr const char* kOp = "lowrank_add";
  check_input_dtype(kOp, "x", x);
  check_shape(kOp, "x", x, x.dim() >= 1, "[..., in_features]");
  check_shape(kOp, "base_out", base_out, leading_dims_match(base_out, x),
              "x's leading dimensions and out_features");
  check_same_dtype(kOp, "base_out", base_out, x, "x");
  check_same_device(kOp, "base_out", base_out, x, "x");
  check_branch(kOp, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

inline void check_lowrank_add_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                       const std::optional<Tensor>& h, const BranchArgs& args,
                                       const BranchNeeds& needs) {
  constexpr const char* kOp = "lowrank_add_backward";
  check_input_dtype(kOp, "dout", dout);
  check_shape(kOp, "lora_a", args.lora_a, args.lora_a.dim() == 2, "[r, in_features]");
  check_shape(kOp, "lora_b", args.lora_b, args.lora_b.dim() == 2, "[out_features, r]");
  check_backward(kOp, args, needs, dout, x, h, args.in_features(), args.out_features());
}

}  // namespace lowrank_ext
