// The base products are the vendor's; branch.h says which of the two parts of an output is written
// first.
#include <tuple>

#include "lowrank/branch.h"
#include "common/tensors.h"

namespace lowrank_ext::cuda {
namespace {

// y = x weightᵀ + bias through the very call of torch.nn.functional.linear, and so with its bits.
void base_forward(const Tensor& y, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  if (bias) {
    multiply_add(y, *bias, x, transposed(weight));
  } else {
    multiply(y, x, transposed(weight));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> lowrank_linear_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a,
    const Tensor& lora_b, const std::optional<Tensor>& core,
    const std::optional<Tensor>& rank_scale, const std::optional<Tensor>& out_scale, double scaling,
    double dropout_p, const std::optional<Tensor>& seed, bool allow_tf32) {
  const BranchArgs args{lora_a,  lora_b,    core, rank_scale, out_scale,
                        scaling, dropout_p, seed, allow_tf32};
  check_lowrank_linear(x, weight, bias, args);
  const DeviceGuard guard(x.get_device_index());

  const Tensor rows = as_matrix(x);
  Tensor y = empty(with_last_dim(x, args.out_features()), x.scalar_type(), x);
  Tensor h = empty(with_last_dim(x, args.rank()), x.scalar_type(), x);
  if (rows.size(0) == 0) return {y, h};
  const Tensor y_rows = as_matrix(y), h_rows = as_matrix(h);
  if (seed_base_output(rows.size(0), args.out_features(), element_size(x.scalar_type()))) {
    branch_forward(args, rows, bias, y_rows, h_rows);
    multiply_add(y_rows, y_rows, rows, transposed(weight));
  } else {
    base_forward(y_rows, rows, weight, bias);
    branch_forward(args, rows, y_rows, y_rows, h_rows);
  }
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_linear_backward_cuda(
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
  const DeviceGuard guard(dout.get_device_index());

  BranchGradients gradients =
      branch_backward(args, needs, as_matrix(dout), x ? std::optional(as_matrix(*x)) : x,
                      h ? std::optional(as_matrix(*h)) : h, weight);
  if (need_dx) gradients.dx = with_shape(gradients.dx, with_last_dim(dout, args.in_features()));
  return gradients.as_tuple();
}

}  // namespace lowrank_ext::cuda

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("lowrank_linear", TORCH_BOX(&lowrank_ext::cuda::lowrank_linear_cuda));
  m.impl("lowrank_linear_backward", TORCH_BOX(&lowrank_ext::cuda::lowrank_linear_backward_cuda));
}
