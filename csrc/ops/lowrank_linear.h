// y = x weightᵀ + bias + scaling · out_scale ⊙ (mid(drop(x) lora_aᵀ) lora_bᵀ), on any backend:
// checks and outputs.
#pragma once

#include "ops/branch.h"
#include "ops/unpack.h"

namespace lowrank_ext {

inline void check_weight(const char* op, const Tensor& weight, const Tensor& like,
                         const char* like_name) {
  check_shape(op, "weight", weight, weight.dim() == 2, "[out_features, in_features]");
  check_same_dtype(op, "weight", weight, like, like_name);
  check_same_device(op, "weight", weight, like, like_name);
}

inline void check_lowrank_linear(const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias, const BranchArgs& args) {
  constexpr const char* kOp = "lowrank_linear";
  check_given(kOp, {{"x", &x}, {"weight", &weight}});
  check_adapter_given(kOp, args);
  check_input_dtype(kOp, "x", x);
  check_weight(kOp, weight, x, "x");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_shape(kOp, "x", x, x.dim() >= 1 && x.size(x.dim() - 1) == in_features,
              "[..., in_features=", in_features, "]");
  if (bias) {
    check_shape(kOp, "bias", *bias, bias->dim() == 1 && bias->size(0) == out_features,
                "[out_features=", out_features, "]");
    check_same_dtype(kOp, "bias", *bias, x, "x");
    check_same_device(kOp, "bias", *bias, x, "x");
  }
  check_branch(kOp, args, x, "x", in_features, out_features);
}

inline void check_lowrank_linear_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                          const Tensor& weight, const std::optional<Tensor>& h,
                                          const BranchArgs& args, const BranchNeeds& needs) {
  constexpr const char* kOp = "lowrank_linear_backward";
  check_given(kOp, {{"dout", &dout}, {"weight", &weight}});
  check_adapter_given(kOp, args);
  check_input_dtype(kOp, "dout", dout);
  check_weight(kOp, weight, dout, "dout");
  check_branch_backward(kOp, args, needs, dout, x, h, weight.size(1), weight.size(0));
}

// forward(args, x [M, K], weight, bias, y [M, N], h [M, r]) writes y and h; M > 0.
template <auto forward>
std::tuple<Tensor, Tensor> lowrank_linear(const Tensor& x, const Tensor& weight,
                                          const std::optional<Tensor>& bias,
                                          const BranchArgs& args) {
  check_lowrank_linear(x, weight, bias, args);
  const auto [y, h] = branch_outputs(x, args.out_features(), args.rank());
  const Tensor rows = as_matrix(x);
  if (rows.size(0) > 0) forward(args, rows, weight, bias, as_matrix(y), as_matrix(h));
  return {y, h};
}

// backward(args, needs, dout [M, N], x [M, K], weight, h [M, r], gradients) writes what is needed;
// M > 0, and x and h where the needed gradients take them.
template <auto backward>
BranchGradientTuple lowrank_linear_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                            const Tensor& weight, const std::optional<Tensor>& h,
                                            const BranchArgs& args, const BranchNeeds& needs) {
  check_lowrank_linear_backward(dout, x, weight, h, args, needs);
  return branch_gradients(
      args, needs, dout, [&](const Tensor& dout_rows, const BranchGradients& gradients) {
        backward(args, needs, dout_rows, as_matrix(x), weight, as_matrix(h), gradients);
      });
}

}  // namespace lowrank_ext
