// lowrank_add on the CPU: y starts as a copy of base_out, and the branch is added in place.
#include "ops/lowrank_add.h"

#include "branch.h"
#include "matrix.h"

namespace lowrank_ext::cpu {
namespace {

void lowrank_add_cpu(const BranchArgs& args, const Tensor& base_out, const Tensor& x,
                     const Tensor& y, const Tensor& h) {
  const ScratchScope scope;
  convert(rows_of(y), rows_of(base_out), 1.0, y.size(0), y.size(1));
  branch_forward(args, x, y, h);
}

void lowrank_add_backward_cpu(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                              const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                              const BranchGradients& gradients) {
  const ScratchScope scope;
  branch_backward(args, needs, dout, x, h, /*add_to_dx=*/false, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("lowrank_add", TORCH_BOX(unpacked<lowrank_add<lowrank_add_cpu>>));
  m.impl("lowrank_add_backward",
         TORCH_BOX(unpacked<lowrank_add_backward<lowrank_add_backward_cpu>>));
}

}  // namespace lowrank_ext::cpu
