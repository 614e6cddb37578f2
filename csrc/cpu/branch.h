// The low-rank branch on the CPU, forward and backward, for both ops that carry it.
#pragma once

#include <optional>

#include "../checks.h"
#include "../ops/branch.h"

namespace lowrank_ext::cpu {

// y [M, N] += scaling · out_scale ⊙ (mid(h) lora_bᵀ) and h [M, r] = drop(x) lora_aᵀ, x [M, K].
void branch_forward(const BranchArgs& args, const Tensor& x, const Tensor& y, const Tensor& h);

// dout [M, N], x [M, K] where lora_a needs a gradient, h [M, r] where needs.h(). base_dx [M, K] is
// the base's part of dx, to which the branch adds in place: cheaper than handing the vendor's
// product a seeded output.
BranchGradients branch_backward(const BranchArgs& args, const BranchNeeds& needs,
                                const Tensor& dout, const std::optional<Tensor>& x,
                                const std::optional<Tensor>& h,
                                const std::optional<Tensor>& base_dx);

}  // namespace lowrank_ext::cpu
