// y = base_out + scaling · out_scale ⊙ (mid(drop(x) lora_aᵀ) lora_bᵀ), on any backend: checks and
// outputs.
#pragma once

#include "ops/branch.h"
#include "ops/unpack.h"

namespace lowrank_ext {

inline void check_lowrank_add(const Tensor& base_out, const Tensor& x, const BranchArgs& args) {
  constexpr const char* kOp = "lowrank_add";
  check_given(kOp, {{"base_out", &base_out}, {"x", &x}});
  check_adapter_given(kOp, args);
  check_x_and_base_out(kOp, x, base_out);
  check_branch(kOp, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

inline void check_lowrank_add_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                       const std::optional<Tensor>& h, const BranchArgs& args,
                                       const BranchNeeds& needs) {
  constexpr const char* kOp = "lowrank_add_backward";
  check_given(kOp, {{"dout", &dout}});
  check_adapter_given(kOp, args);
  check_input_dtype(kOp, "dout", dout);
  check_shape(kOp, "lora_a", args.lora_a, args.lora_a.dim() == 2, "[r, in_features]");
  check_shape(kOp, "lora_b", args.lora_b, args.lora_b.dim() == 2, "[out_features, r]");
  check_branch_backward(kOp, args, needs, dout, x, h, args.in_features(), args.out_features());
}

// forward(args, base_out [M, N], x [M, K], y [M, N], h [M, r]) writes y and h; M > 0.
template <auto forward>
std::tuple<Tensor, Tensor> lowrank_add(const Tensor& base_out, const Tensor& x,
                                       const BranchArgs& args) {
  check_lowrank_add(base_out, x, args);
  const auto [y, h] = branch_outputs(x, args.out_features(), args.rank());
  const Tensor rows = as_matrix(x);
  if (rows.size(0) > 0) forward(args, as_matrix(base_out), rows, as_matrix(y), as_matrix(h));
  return {y, h};
}

// backward(args, needs, dout [M, N], x [M, K], h [M, r], gradients) writes what is needed; M > 0,
// and x and h where the needed gradients take them.
template <auto backward>
BranchGradientTuple lowrank_add_backward(const Tensor& dout, const std::optional<Tensor>& x,
                                         const std::optional<Tensor>& h, const BranchArgs& args,
                                         const BranchNeeds& needs) {
  check_lowrank_add_backward(dout, x, h, args, needs);
  return branch_gradients(args, needs, dout,
                          [&](const Tensor& dout_rows, const BranchGradients& gradients) {
                            backward(args, needs, dout_rows, as_matrix(x), as_matrix(h), gradients);
                          });
}

}  // namespace lowrank_ext
