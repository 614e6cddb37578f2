// lowrank_linear on the CPU: the base products are the vendor's, and the branch is added to their
// outputs in place (branch.cpp).
#include "ops/lowrank_linear.h"

#include "branch.h"
#include "matrix.h"

namespace lowrank_ext::cpu {
namespace {

// y = x weightᵀ + bias, rounded as torch.nn.functional.linear rounds it.
void base_forward(const Tensor& y, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  if (!bias) return multiply(y, x, transposed(weight));
  const Tensor bias_row = strided_view(*bias, 0, 1, bias->size(0), 0, bias->stride(0));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias_row.get(), without_gaps(x).get(),
                                                  without_gaps(transposed(weight)).get(), 1.0,
                                                  1.0));
}

void lowrank_linear_cpu(const BranchArgs& args, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& y, const Tensor& h) {
  const ScratchScope scope;
  base_forward(y, x, weight, bias);
  branch_forward(args, x, y, h);
}

void lowrank_linear_backward_cpu(const BranchArgs& args, const BranchNeeds& needs,
                                 const Tensor& dout, const std::optional<Tensor>& x,
                                 const Tensor& weight, const std::optional<Tensor>& h,
                                 const BranchGradients& gradients) {
  const ScratchScope scope;
  if (needs.dx) multiply(gradients.dx, dout, weight);
  branch_backward(args, needs, dout, x, h, /*add_to_dx=*/true, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("lowrank_linear", TORCH_BOX(unpacked<lowrank_linear<lowrank_linear_cpu>>));
  m.impl("lowrank_linear_backward",
         TORCH_BOX(unpacked<lowrank_linear_backward<lowrank_linear_backward_cpu>>));
}

}  // namespace lowrank_ext::cpu
