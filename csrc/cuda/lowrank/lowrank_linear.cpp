// lowrank_linear on the GPU: the base products are the vendor's; branch.h says which of the two
// parts of an output is written first.
#include "ops/lowrank_linear.h"

#include "common/tensors.h"
#include "lowrank/branch.h"

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

void lowrank_linear_cuda(const BranchArgs& args, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Tensor& y, const Tensor& h) {
  const DeviceGuard guard(x.get_device_index());
  if (seed_base_output(x.size(0), args.out_features(), element_size(x.scalar_type()))) {
    branch_forward(args, x, bias, y, h);
    multiply_add(y, y, x, transposed(weight));
  } else {
    base_forward(y, x, weight, bias);
    branch_forward(args, x, y, y, h);
  }
}

void lowrank_linear_backward_cuda(const BranchArgs& args, const BranchNeeds& needs,
                                  const Tensor& dout, const std::optional<Tensor>& x,
                                  const Tensor& weight, const std::optional<Tensor>& h,
                                  const BranchGradients& gradients) {
  const DeviceGuard guard(dout.get_device_index());
  branch_backward(args, needs, dout, x, h, weight, gradients);
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("lowrank_linear", TORCH_BOX(unpacked<lowrank_linear<lowrank_linear_cuda>>));
  m.impl("lowrank_linear_backward",
         TORCH_BOX(unpacked<lowrank_linear_backward<lowrank_linear_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
