// The base products are the vendor's; the branch is added to their outputs in place (branch.cpp).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "branch.h"
#include "matrix.h"

namespace lowrank_ext::cpu {
namespace {

// y = x weightᵀ + bias, rounded as torch.nn.functional.linear rounds it.
void base_forward(const Tensor& y, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  if (!bias) return multiply(y, x, transposed(weight));
  const Tensor bias_row = strided_view(*bias, 0, 1, bias->size(0), 0, bias->stride(0));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias_row.get(), x.get(),
                                                  transposed(weight).get(), 1.0, 1.0));
}

}  // namespace

std::tuple<Tensor, Tensor> lowrank_linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a,
    const Tensor& lora_b, const std::optional<Tensor>& core,
    const std::optional<Tensor>& rank_scale, const std::optional<Tensor>& out_scale, double scaling,
    double dropout_p, const std::optional<Tensor>& seed, bool allow_tf32) {
  const BranchArgs args{lora_a,  lora_b,    core, rank_scale, out_scale,
                        scaling, dropout_p, seed, allow_tf32};
  check_lowrank_linear(x, weight, bias, args);

  const Tensor rows = as_matrix(x);
  Tensor y = empty(with_last_dim(x, args.out_features()), x.scalar_type());
  Tensor h = empty(with_last_dim(x, args.rank()), x.scalar_type());
  if (rows.size(0) == 0) return {y, h};
  const Tensor y_rows = as_matrix(y);
  base_forward(y_rows, rows, weight, bias);
  branch_forward(args, rows, y_rows, as_matrix(h));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_linear_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& x, const Tensor& weight,
    const std::optional<Tensor>& h, const Tensor& lora_a, const Tensor& lora_b,
    const std::optional<Tensor>& core, const std::optional<Tensor>& rank_scale,
    const std::optional<Tensor>& out_scale, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool allow_tf32, bool need_dx, bool need_dlora_a,
    bool need_dlora_b, bool need_dcore, bool need_drank_scale, bool need_dout_scale) {
  const BranchArgs args{lora_a,  lora_b,    core, rank_scale, out_scale,
                        scaling, dropout_p, seed, allow_tf32};
  const BranchNeeds needs{need_dx,    need_dlora_a,     need_dlora_b,
                          need_dcore, need_drank_scale, need_dout_scale};
  check_lowrank_linear_backward(dout, x, weight, h, args, needs);

  const Tensor dout_rows = as_matrix(dout);
  std::optional<Tensor> base_dx;
  if (need_dx) {
    base_dx = empty({dout_rows.size(0), args.in_features()}, dout.scalar_type());
    multiply(*base_dx, dout_rows, weight);
  }
  BranchGradients gradients =
      branch_backward(args, needs, dout_rows, x ? std::optional(as_matrix(*x)) : x,
                      h ? std::optional(as_matrix(*h)) : h, base_dx);
  if (need_dx) gradients.dx = with_shape(gradients.dx, with_last_dim(dout, args.in_features()));
  return gradients.as_tuple();
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("lowrank_linear", TORCH_BOX(&lowrank_ext::cpu::lowrank_linear_cpu));
  m.impl("lowrank_linear_backward", TORCH_BOX(&lowrank_ext::cpu::lowrank_linear_backward_cpu));
}
