// The branch on top of any base module's output, which is read once, as y is written.
#include <tuple>

#include "lowrank/branch.h"
#include "common/tensors.h"

namespace lowrank_ext::cuda {

std::tuple<Tensor, Tensor> lowrank_add_cuda(const Tensor& base_out, const Tensor& x,
                                            const Tensor& lora_a, const Tensor& lora_b,
                                            const std::optional<Tensor>& core,
                                            const std::optional<Tensor>& rank_scale,
                                            const std::optional<Tensor>& out_scale, double scaling,
                                            double dropout_p, const std::optional<Tensor>& seed,
                                            bool allow_tf32) {
  const BranchArgs args{lora_a,  lora_b,    core, rank_scale, out_scale,
                        scaling, dropout_p, seed, allow_tf32};
  check_lowrank_add(base_out, x, args);
  const DeviceGuard guard(x.get_device_index());

  const Tensor rows = as_matrix(x);
  Tensor y = empty(with_last_dim(x, args.out_features()), x.scalar_type(), x);
  Tensor h = empty(with_last_dim(x, args.rank()), x.scalar_type(), x);
  branch_forward(args, rows, as_matrix(base_out), as_matrix(y), as_matrix(h));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_add_backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& x, const std::optional<Tensor>& h,
    const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& core,
    const std::optional<Tensor>& rank_scale, const std::optional<Tensor>& out_scale, double scaling,
    double dropout_p, const std::optional<Tensor>& seed, bool allow_tf32, bool need_dx,
    bool need_dlora_a, bool need_dlora_b, bool need_dcore, bool need_drank_scale,
    bool need_dout_scale) {
  const BranchArgs args{lora_a,  lora_b,    core, rank_scale, out_scale,
                        scaling, dropout_p, seed, allow_tf32};
  const BranchNeeds needs{need_dx,    need_dlora_a,     need_dlora_b,
                          need_dcore, need_drank_scale, need_dout_scale};
  check_lowrank_add_backward(dout, x, h, args, needs);
  const DeviceGuard guard(dout.get_device_index());

  BranchGradients gradients =
      branch_backward(args, needs, as_matrix(dout), x ? std::optional(as_matrix(*x)) : x,
                      h ? std::optional(as_matrix(*h)) : h, std::nullopt);
  if (need_dx) gradients.dx = with_shape(gradients.dx, with_last_dim(dout, args.in_features()));
  return gradients.as_tuple();
}

}  // namespace lowrank_ext::cuda

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("lowrank_add", TORCH_BOX(&lowrank_ext::cuda::lowrank_add_cuda));
  m.impl("lowrank_add_backward", TORCH_BOX(&lowrank_ext::cuda::lowrank_add_backward_cuda));
}
