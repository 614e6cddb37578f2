// lowrank_add on the GPU: base_out is read once, as y is written.
#include "ops/lowrank_add.h"

#include "common/tensors.h"
#include "lowrank/branch.h"

namespace lowrank_ext::cuda {
namespace {

void lowrank_add_cuda(const BranchArgs& args, const Tensor& base_out, const Tensor& x,
                      const Tensor& y, const Tensor& h) {
  const DeviceGuard guard(x.get_device_index());
  branch_forward(args, x, base_out, y, h);
}

void lowrank_add_backward_cuda(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                               const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                               const BranchGradients& gradients) {
  const DeviceGuard guard(dout.get_device_index());
  branch_backward(args, needs, dout, x, h, /*weight=*/std::nullopt, gradients);
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("lowrank_add", TORCH_BOX(unpacked<lowrank_add<lowrank_add_cuda>>));
  m.impl("lowrank_add_backward",
         TORCH_BOX(unpacked<lowrank_add_backward<lowrank_add_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
